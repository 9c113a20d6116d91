"""The import direction of DESIGN: who may know Ray, who may know torch, and that no stage knows another."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "prefsel"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_KNOW_RAY = {"pipeline.py", "cli.py", "tasks.py", "exchange.py", "session.py", "demo.py"}
# Lower rank may not import higher. A file not named here has the rank of its kind, see `rank`.
LEVELS = ["errors", "workspace", "pure", "models", "loop", "stage", "pipeline", "cli"]
GROUND = {"errors", "schema", "progress", "config", "configfile", "__init__"}
ENGINE = {
    *("score/windows.py", "score/probes.py", "score/engine.py", "score/scorers.py", "score/together.py"),
    *("score/assigned.py", "score/generated.py", "score/influence.py", "score/validation.py"),
    *("generate/sample.py", "world/demo.py"),
    *("selftest/subject.py", "selftest/findings.py", "selftest/ways.py", "selftest/diagnosis.py", "selftest/check.py"),
}
PURE_TRAINING = {
    *("train/losses.py", "train/deepspeed_config.py"),
    *("train/reward_losses.py", "train/reward_config.py", "train/calibration.py"),
}
# The scoring stage in parts: what runs in an actor (and counts for Ray's metrics), the pool, who shares it, tangents.
SCORING = {f"score/{name}.py" for name in ("telemetry", "actor", "pool", "sharing", "tangents")}
MAY_KNOW_RAY |= SCORING
STAGE_LEVEL = {"tasks.py", "exchange.py", "session.py", "check.py"} | SCORING


def imported(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules a file imports, those inside functions included unless `top_level_only`."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def rank(path: str) -> int:
    """Level of a file of the package in the import order."""
    name = path.removesuffix(".py")
    if path in ENGINE or (path.startswith("train/") and path not in PURE_TRAINING and "stage" not in path):
        kind = "loop"
    elif path.startswith("workspace/") or name in GROUND:
        kind = "workspace"
    elif path.startswith("models/"):
        kind = "models"
    elif path.endswith("/stage.py") or path in STAGE_LEVEL:
        kind = "stage"
    elif path in {"pipeline.py"}:
        kind = "pipeline"
    elif path in {"cli.py", "demo.py"}:
        kind = "cli"
    else:
        kind = "pure"
    return LEVELS.index(kind)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_only_stages_and_entry_points_know_ray(file: Path) -> None:
    knows = any(name == "ray" or name.startswith("ray.") for name in imported(file))
    assert not knows or file.name == "stage.py" or relative(file) in MAY_KNOW_RAY


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_point_downwards(file: Path) -> None:
    path = relative(file)
    for name in imported(file, top_level_only=True):
        target = PACKAGE.parent / (name.replace(".", "/") + ".py")
        if name.startswith("prefsel.") and target.is_file():
            assert rank(relative(target)) <= rank(path), f"{path} imports {name}, which lies above it"


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "stage.py"], ids=relative)
def test_no_stage_imports_another(file: Path) -> None:
    others = {name for name in imported(file) if name.endswith(".stage")}
    assert not others


def test_importing_the_package_is_light() -> None:
    code = "import prefsel, sys; bad = {'torch', 'ray', 'transformers'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_script_shadows_the_standard_library() -> None:
    names = {file.stem for file in (PACKAGE.parent / "jobs").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
