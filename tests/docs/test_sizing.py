"""The worked costs of docs/sizing.md are those of the formulas."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_as_the_formulas_write_it() -> None:
    spec = importlib.util.spec_from_file_location("sizing", DOCS / "tools/sizing.py")
    assert spec is not None
    assert spec.loader is not None
    sizing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizing)
    text = (DOCS / "sizing.md").read_text(encoding="utf-8")
    assert sizing.page(text) == text, "run python docs/tools/sizing.py"


def test_a_worked_cost_by_hand() -> None:
    """1.5 B, 10⁶ pairs: 2t(P + 2R) twice, 2h·2R once, attention twice; then 30 % of three forwards."""
    t, h, p, r, d, layers = 1_310_195_712, 151_936 * 1536, 200, 300, 1536, 28
    trunk = 2 * t * (p + 2 * r) + 4 * d * layers * (p**2 / 2 + 2 * (r * p + r**2 / 2))
    forward = trunk + 2 * h * 2 * r
    score, train = 1e6 * (forward + trunk), 0.3 * 1e6 * 3 * forward
    assert f"| 1.5 B | 10⁶ | {score:.2e} | {train:.2e} |" in (DOCS / "sizing.md").read_text(encoding="utf-8")
