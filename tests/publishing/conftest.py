"""A finished run with two selections, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from finished_runs import finish

from prefsel.workspace.storage import Storage


@pytest.fixture(scope="package")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A workspace, and the same one after a run that keeps more."""
    folder = tmp_path_factory.mktemp("finished")
    finish(folder, 0.3)
    shutil.copytree(folder / "w", folder / "first")
    finish(folder, 0.5)
    return folder / "first", folder / "w"


@pytest.fixture
def place(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    """The first workspace, to be changed."""
    return Path(shutil.copytree(finished[0], tmp_path / "w"))


@pytest.fixture
def storage(place: Path) -> Storage:
    return Storage(str(place))
