"""The import direction of the rooms: who may know whom, and who may know Ray. The table knows folders, not files."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "prefsel"

# From the ground up: a room imports only itself and rooms of lines above its own.
FLOORS = (
    {"display"},
    {"errors", "reasons", "schema", "progress", "interrupts", "version"},
    {"plugins"},
    {"config"},
    {"rules"},
    {"workspace"},
    {"ingest", "numbers"},
    {"withdraw"},
    {"pairs"},
    {"metrics"},
    {"select"},
    {"models"},
    {"generate", "trl"},
    {"selfplay"},
    {"scratch"},
    {"train"},
    {"world"},
    {"evaluate"},
    {"score"},
    {"plan"},
    {"report", "selftest", "closing", "status", "draft"},
    {"publishing"},
    {"__init__"},
    {"stages", "environment"},
    {"making", "damage"},
    {"play"},
    {"pipeline"},
    {"mend", "refresh"},
    {"garbage"},
    {"demo"},
    {"cli"},
)
KNOW_RAY = {"stages", "pipeline", "cli"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, a package by its own."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = ("prefsel", *file.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports(file: Path) -> set[str]:
    """Modules and names that a file imports, dotted, those inside functions and for type checkers included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = modules()
IMPORTS = {name: imports(file) for name, file in MODULES.items()}


def room(name: str) -> str:
    """The room that a module, or a name in it, lies in: the folder or file directly in the package."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and any(parts[1] in names for names in FLOORS) else "__init__"


def test_every_room_has_a_floor() -> None:
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    assert rooms == set().union(*FLOORS) - {"__init__"}


def test_rooms_import_rooms_below() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if other.split(".")[0] == "prefsel" and room(other) != room(name) and floor[room(other)] >= floor[room(name)]
    ]
    assert not wrong, "not below: " + "; ".join(sorted(wrong))


def test_no_module_imports_itself_through_others() -> None:
    arrows = {
        name: {other if other in MODULES else other.rpartition(".")[0] for other in others} & MODULES.keys()
        for name, others in IMPORTS.items()
    }
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_only_stages_and_entry_points_know_ray() -> None:
    knowing = {name for name, others in IMPORTS.items() if any(other.split(".")[0] == "ray" for other in others)}
    assert not {name for name in knowing if room(name) not in KNOW_RAY}
    assert any(room(name) == "stages" for name in knowing)


def test_importing_the_package_is_light() -> None:
    code = "import prefsel, sys; bad = {'torch', 'ray', 'transformers'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_script_shadows_the_standard_library() -> None:
    names = {file.stem for file in (PACKAGE.parent / "jobs").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)
