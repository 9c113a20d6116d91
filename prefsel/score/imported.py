"""Numbers that came with the data, as completion columns: no model, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from prefsel.score.contract import ScoredShard

RATINGS = "completions.list.element.ratings"
"""The column of a groups shard that holds the numbers, inside its lists: no text is read with it."""


def imported_columns(groups: pa.Table, fields: Mapping[str, str]) -> ScoredShard:
    """Ratings of every completion as columns.

    Args:
        groups: schema `GROUPS`; ingest let only finite numbers in.
        fields: column name → key in the completions' `ratings`.
    """
    ratings = [[dict(c["ratings"] or ()) for c in row] for row in groups["completions"].to_pylist()]
    columns = {name: [[found.get(key) for found in row] for row in ratings] for name, key in fields.items()}
    lacking = ([key for key in fields.values() if found.get(key) is None] for row in ratings for found in row)
    dropped = Counter(f"missing_{keys[0]}" for keys in lacking if keys)
    return ScoredShard(columns, dict(dropped))


def rating_names(groups: pa.Table) -> list[str]:
    """Names of all numbers that came with the completions of a whole shard, sorted; it needs `RATINGS` only."""
    completions = pc.list_flatten(groups["completions"].combine_chunks())
    return sorted(pc.unique(pc.struct_field(completions, "ratings").keys).to_pylist())
