"""What changed between two versions, or two selections: which pairs entered and left, how score and length moved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefsel.errors import UserError, invalid
from prefsel.publishing.versions import files_of, read_file, require_pointer, versions
from prefsel.report.opened import open_workspace
from prefsel.workspace.folders import read_seal, read_sealed
from prefsel.workspace.storage import Storage

LENGTHS = ("num_tokens_chosen", "num_tokens_rejected")


@dataclass(frozen=True)
class Difference:
    """Two sets of pairs, `a` and `b`."""

    entered: list[str]
    """Ids of the pairs of b that a has not, sorted."""
    left: list[str]
    """Ids of the pairs of a that b has not, sorted."""
    unchanged: int
    means: dict[str, tuple[float | None, float | None]]
    """Means over a and over b, of the score and the lengths in tokens; None where one does not have the number."""
    drift: float | None
    """Mean difference, b - a, of the scores of the pairs in both; None without scores or such pairs."""

    def lines(self, a: str, b: str) -> Iterator[str]:
        """For people."""
        yield f"diff {a} -> {b}: {len(self.entered):,} entered, {len(self.left):,} left, {self.unchanged:,} unchanged"
        for name, (before, after) in self.means.items():
            yield f"  mean {name:<22} {_text(before)} -> {_text(after)}"
        yield f"  score of pairs in both      {_text(self.drift)} on average, b - a"

    def write(self, output: str) -> None:
        """One line per changed pair, `pair_id` and `change`, as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with open(output, "w", encoding="utf-8") as file:
                for change, ids in (("entered", self.entered), ("left", self.left)):
                    file.writelines(json.dumps({"pair_id": one, "change": change}) + "\n" for one in ids)
        except OSError as error:
            raise UserError(f"--output: cannot write {output}: {error.strerror}") from error


def compare(storage: Storage, a: str, b: str) -> Difference:
    """Compare two sets of pairs by pair_id; ids, scores and lengths of both are in memory.

    Args:
        storage: The workspace; of one whose last run did not finish, published versions can be compared.
        a: A selection or control, or `NAME/v0001` or `NAME/current` of what is published.
        b: Another one.

    Raises:
        UserError: one of them is none of these.
        IntegrityError: a file of one of them is gone or altered.
    """
    table_a, table_b = (_pairs(storage, one) for one in (a, b))
    ids_a, ids_b = (table["pair_id"].combine_chunks() for table in (table_a, table_b))
    entered = ids_b.filter(pc.invert(pc.is_in(ids_b, value_set=ids_a)))
    left = ids_a.filter(pc.invert(pc.is_in(ids_a, value_set=ids_b)))
    names = [name for name in ("score", *LENGTHS) if name in table_a.column_names or name in table_b.column_names]
    drift = None
    if all("score" in table.column_names for table in (table_a, table_b)):
        both = table_a.select(["pair_id", "score"]).join(
            table_b.select(["pair_id", "score"]), "pair_id", join_type="inner", right_suffix="_b"
        )
        drift = pc.mean(pc.subtract(both["score_b"], both["score"])).as_py()
    return Difference(
        sorted(entered.to_pylist()),
        sorted(left.to_pylist()),
        len(ids_b) - len(entered),
        {name: (_mean(table_a, name), _mean(table_b, name)) for name in names},
        drift,
    )


def _pairs(storage: Storage, what: str) -> pa.Table:
    """Ids with scores and lengths, as far as there are any."""
    name, _, version = what.partition("/")
    if not version:
        opened = open_workspace(storage.uri)
        report = opened.contents.selection(name)
        dataset = report.details.get("dataset")
        if dataset and (seal := read_seal(storage, dataset)):
            return _rows(
                {one: partial(read_sealed, storage, dataset, one, file) for one, file in seal["files"].items()}
            )
        score = f"score_{report.details.get('metric')}"
        table = opened.pairs(selection=name)
        wanted = [one for one in ("pair_id", score, *LENGTHS) if one in table.schema.names]
        found = opened.pairs(wanted, selection=name).to_table()
        return found.rename_columns(["score" if one == score else one for one in wanted])
    if version == "current":
        version = require_pointer(storage, name)[0].version
    there = versions(storage, name)
    if version not in there:
        raise invalid(what, version, there or f"none: {name!r} is not published")
    return _rows({one: partial(read_file, storage, name, version, one) for one in files_of(storage, name, version)})


def _rows(files: Mapping[str, Callable[[], bytes]]) -> pa.Table:
    """Of the data among the files of a dataset, each with how it is read."""
    tables = []
    for read in (files[one] for one in sorted(files) if one.endswith(".parquet") and one.startswith("data/")):
        parquet = pq.ParquetFile(pa.BufferReader(read()))
        wanted = [one for one in ("pair_id", "score", *LENGTHS) if one in parquet.schema_arrow.names]
        tables.append(parquet.read(columns=wanted))
    return pa.concat_tables(tables)


def _mean(table: pa.Table, name: str) -> float | None:
    return pc.mean(table[name]).as_py() if name in table.column_names else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
