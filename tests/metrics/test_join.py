"""The flat pair table against a dictionary lookup, with column sets in another order and with holes."""

from __future__ import annotations

import pyarrow as pa

from prefsel.metrics.join import pair_table
from prefsel.schema import GROUPS, PAIRS, columns_schema


def ident(number: int) -> bytes:
    return number.to_bytes(16, "big")


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


GROUP_ROWS = [
    {
        "prompt_id": ident(prompt),
        "prompt": [{"role": "user", "content": f"p{prompt}"}],
        "completions": [
            {"completion_id": ident(100 * prompt + k), "messages": message(f"{prompt}.{k}"), "ratings": []}
            for k in range(count)
        ],
        "provenance": None,
    }
    for prompt, count in ((1, 3), (2, 2))
]
PAIR_ROWS = [
    {"pair_id": ident(1000 + n), "mirror_id": ident(2000 + n), "prompt_id": ident(p), "chosen": c, "rejected": r}
    for n, (p, c, r) in enumerate([(2, 1, 0), (1, 0, 2), (1, 2, 1)])
]


def test_values_follow_completion_ids_not_positions() -> None:
    groups = pa.Table.from_pylist(GROUP_ROWS, GROUPS)
    pairs = pa.Table.from_pylist(PAIR_ROWS, PAIRS)
    columns = pa.Table.from_pylist(
        [  # prompts and completions in another order, one completion absent, one null
            {"prompt_id": ident(2), "completion_ids": [ident(201), ident(200)], "rm_a": [21.0, 20.0]},
            {"prompt_id": ident(1), "completion_ids": [ident(102), ident(100)], "rm_a": [None, 10.0]},
        ],
        columns_schema(["rm_a"]),
    )
    flat = pair_table(pairs, groups, [columns], source="s")
    assert flat["rm_a_chosen"].to_pylist() == [21.0, 10.0, None]
    assert flat["rm_a_rejected"].to_pylist() == [20.0, None, None]
    assert flat["rm_a_max"].to_pylist() == [21.0, 10.0, 10.0]
    assert flat["rm_a_min"].to_pylist() == [20.0, 10.0, 10.0]


def test_empty_shard_keeps_its_schema() -> None:
    flat = pair_table(PAIRS.empty_table(), GROUPS.empty_table(), [columns_schema(["rm_a"]).empty_table()], source="s")
    assert flat.num_rows == 0
    assert {"rm_a_chosen", "rm_a_rejected", "rm_a_max", "rm_a_min"} <= set(flat.column_names)
