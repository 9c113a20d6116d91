"""Numbers that came with the data: aligned with completions, absent where they did not come."""

from __future__ import annotations

import pyarrow as pa

from prefsel.schema import GROUPS
from prefsel.score.imported import imported_columns


def groups(*ratings: list[dict[str, float]]) -> pa.Table:
    rows = [
        {
            "prompt_id": bytes([number]) * 16,
            "completions": [
                {"completion_id": bytes([number, k]) * 8, "messages": [], "ratings": list(found.items())}
                for k, found in enumerate(row)
            ],
        }
        for number, row in enumerate(ratings)
    ]
    return pa.Table.from_pylist(rows, GROUPS)


def test_a_completion_that_lacks_a_number_is_null_and_counted_once() -> None:
    table = groups([{"score": 1.0, "honesty": 4.0}, {"honesty": 2.0}], [{"score": -0.5}, {}])
    shard = imported_columns(table, {"rm_gpt4": "score"})
    assert shard.columns == {"rm_gpt4": [[1.0, None], [-0.5, None]]}
    assert shard.dropped == {"missing_score": 2}
    both = imported_columns(table, {"ratings_score": "score", "ratings_honesty": "honesty"})
    assert both.columns["ratings_honesty"] == [[4.0, 2.0], [None, None]]
    assert both.dropped == {"missing_score": 2, "missing_honesty": 1}


def test_no_groups_no_columns_lost() -> None:
    assert imported_columns(GROUPS.empty_table(), {"rm_x": "score"}).columns == {"rm_x": []}
