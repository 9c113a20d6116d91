"""The package as users install it: from a clone, or as a wheel; commands run from any directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

import prefsel

REPOSITORY = Path(__file__).resolve().parents[1]
PAIR = {"chosen": "good", "rejected": "bad", "score_chosen": 1.0, "score_rejected": 0.0}
CONFIG = {
    "name": "t",
    "sources": [{"name": "a", "paths": ["a.jsonl"]}],
    "scorers": [{"kind": "imported", "name": "gold"}],
    "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
    "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}}],
    "ray": {"num_cpus": 1, "object_store_gib": 0.25},
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository in a folder called like the package, as `git clone` makes it."""
    made = tmp_path_factory.mktemp("home") / "prefsel"
    made.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, made)
    shutil.copytree(REPOSITORY / "prefsel", made / "prefsel", ignore=shutil.ignore_patterns("__pycache__"))
    return made


def environment(folder: Path) -> Path:
    """A virtual environment that borrows the dependencies of this one; its own packages come first."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), *arguments, "--no-deps", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone())
    assert done.returncode == 0, done.stderr


def alone() -> dict[str, str]:
    """The environment of the tests without the path by which they find the package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def call(python: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python.with_name("prefsel")), *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, env=alone())


def run_from(python: Path, directory: Path) -> None:
    """A whole run, with a Ray and its workers, from `directory`."""
    rows = [PAIR | {"prompt": f"p{number}"} for number in range(4)]
    (directory / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    done = call(python, directory, "run", "c.yaml", "--workspace", "w")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "kept      top: 2 of 4 pairs (50.0%)" in done.stdout


@pytest.mark.slow
def test_an_editable_install_runs_above_its_clone(clone: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    pip(python, "install", "--editable", str(clone))
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    assert [path for path in site.glob("*.pth") if path.read_text().strip() == str(clone)], "an install by path file"
    assert call(python, clone.parent, "--version").stdout == f"prefsel {prefsel.__version__}\n"
    run_from(python, clone.parent)
    assert not list(clone.glob("*.egg-info")), "the clone stays as it was"


@pytest.mark.slow
def test_a_wheel_runs_beside_an_unrelated_package_of_its_name(clone: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    pip(python, "wheel", str(clone), "--wheel-dir", str(tmp_path / "wheels"))
    wheel = next((tmp_path / "wheels").glob("prefsel-*.whl"))
    assert wheel.name == f"prefsel-{prefsel.__version__}-py3-none-any.whl"
    kinds = {".py", ".j2", ".js", ".typed", ".yaml"}
    inside = {path.relative_to(clone).as_posix() for path in (clone / "prefsel").rglob("*") if path.is_file()}
    expected = {name for name in inside if Path(name).suffix in kinds or name.endswith("py.typed")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert names == expected
    assert "Requires-Python: >=3.11" in metadata
    pip(python, "install", str(wheel))
    (tmp_path / "here" / "prefsel").mkdir(parents=True)
    (tmp_path / "here" / "prefsel" / "__init__.py").write_text("raise RuntimeError('another package of this name')\n")
    run_from(python, tmp_path / "here")
