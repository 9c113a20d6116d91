"""How many pairs rules keep of a hundred to a hundred and twenty, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from prefsel.plan.kept import kept_pairs
from prefsel.plan.survey import Estimate

ELIGIBLE = Estimate(110, 100, 120)
BAND = {"kind": "band", "score": "score_a", "low": 25, "high": 75}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"kind": "top", "score": "score_a", "ratio": 0.3}, (33, 30, 36)),
        ({"kind": "top", "score": "score_a", "count": 7}, (7, 7, 7)),
        (BAND, (55, 50, 60)),
        (BAND | {"low": 0, "high": 10, "reverse": True}, (99, 90, 108)),
        ({"kind": "above", "score": "score_a", "threshold": 0.0}, (110, 0, 120)),
        ({"kind": "intersect", "rules": [BAND, BAND]}, (55, 0, 60)),
        ({"kind": "intersect", "rules": [BAND], "budget": {"count": 9}}, (9, 9, 9)),
        ({"kind": "dedupe", "by": "prompt", "rule": {"kind": "top", "score": "score_a", "ratio": 0.5}}, (55, 0, 60)),
    ],
)
def test_kept(rule: dict[str, Any], kept: tuple[float, float, float]) -> None:
    found, note = kept_pairs(rule, ELIGIBLE)
    assert (found.value, found.low, found.high) == pytest.approx(kept)
    assert bool(note) == (found.low == 0)
