"""Numbers that came with the data, as completion columns: no model, no torch."""

from __future__ import annotations

import pyarrow as pa


def imported_columns(groups: pa.Table, fields: dict[str, str]) -> dict[str, list[list[float | None]]]:
    """Ratings of every completion as columns.

    Args:
        groups: schema `GROUPS`.
        fields: column name → key in the completions' `ratings`.

    Returns:
        Per column one list per group, aligned with its completions; None where the number did not come.
    """
    ratings = [[dict(c["ratings"] or ()) for c in row] for row in groups["completions"].to_pylist()]
    return {name: [[found.get(key) for found in row] for row in ratings] for name, key in fields.items()}
