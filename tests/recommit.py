"""A shard of a workspace with another table, committed as a stage would: for tests of what readers make of it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage


def recommit(workspace: Path, file: Path, table: pa.Table) -> None:
    """Put `table` where the data of a shard lie, with an entry that says so."""
    artifact = Artifact(Storage(str(workspace)), str(file.parent.relative_to(workspace)))
    entry = artifact.entries()[file.stem]
    artifact.commit(file.stem, table, made_from=entry.input, attempt=entry.attempt, info=entry.info)
