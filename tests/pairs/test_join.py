"""The flat pair table against a dictionary lookup, with column sets in another order and with holes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefsel.pairs.join import group_spread, pair_table, same_tokens
from prefsel.schema import GROUPS, PAIRS, SAME_AS, columns_schema


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
    assert flat["rm_a_mean"].to_pylist() == [20.5, 10.0, 10.0]
    assert flat["rm_a_var"].to_pylist() == [0.25, 0.0, 0.0]


def test_empty_shard_keeps_its_schema() -> None:
    flat = pair_table(PAIRS.empty_table(), GROUPS.empty_table(), [columns_schema(["rm_a"]).empty_table()], source="s")
    assert flat.num_rows == 0
    assert [name for name in flat.column_names if name.startswith("rm_a")] == [
        *("rm_a_chosen", "rm_a_rejected", "rm_a_max", "rm_a_min", "rm_a_mean", "rm_a_var"),
    ]
    assert all(flat[name].type == pa.float64() for name in flat.column_names if name.startswith("rm_a"))


def test_only_rewards_have_a_mean() -> None:
    groups, pairs = pa.Table.from_pylist(GROUP_ROWS, GROUPS), pa.Table.from_pylist(PAIR_ROWS, PAIRS)
    columns = pa.Table.from_pylist(
        [
            {"prompt_id": ident(p), "completion_ids": [ident(100 * p + k) for k in range(n)], "logps_p": [-1.0] * n}
            for p, n in ((1, 3), (2, 2))
        ],
        columns_schema(["logps_p"]),
    )
    flat = pair_table(pairs, groups, [columns], source="s")
    assert {"logps_p_max", "logps_p_min"} <= set(flat.column_names)
    assert not {"logps_p_mean", "logps_p_var"} & set(flat.column_names)
    flat = pair_table(pairs, groups, [columns], source="s", spread=False)
    assert not {"logps_p_max", "logps_p_min"} & set(flat.column_names)


values = st.none() | st.floats(-1e6, 1e6) | st.sampled_from([0.1, 0.2, 1e9 + 0.1])


@settings(deadline=None)
@given(st.lists(st.lists(values, max_size=6), max_size=12))
@example([[0.1] * 3, [], [None, 0.7, 0.7, 0.7], [0.1] * 6])  # 0.1 + 0.1 + 0.1 is not 0.3
def test_the_spread_of_a_group_is_that_of_its_values(groups: list[list[float | None]]) -> None:
    flat = [math.nan if value is None else value for group in groups for value in group]
    lengths = np.array([len(group) for group in groups], np.int64)
    found = group_spread(np.array(flat, float), lengths, with_moments=True)
    for place, group in enumerate(groups):
        known = [value for value in group if value is not None]
        row = {name: value_G[place] for name, value_G in found.items()}
        if not known:
            assert all(math.isnan(value) for value in row.values())
            continue
        exact = [Fraction(value) for value in known]
        mean = sum(exact) / len(exact)
        variance = sum((value - mean) ** 2 for value in exact) / len(exact)
        assert (row["max"], row["min"]) == (max(known), min(known))
        assert row["mean"] == pytest.approx(float(mean), rel=0, abs=1e-15 * max(map(abs, known)))
        assert row["var"] == pytest.approx(float(variance), rel=1e-12, abs=1e-300)
        if len(set(known)) == 1:  # not a remainder of rounding, which would decide between ties
            assert (row["mean"], row["var"]) == (known[0], 0.0)


def test_pairs_of_the_same_tokens_are_found_by_completion_ids() -> None:
    groups = pa.Table.from_pylist(GROUP_ROWS, GROUPS)
    pairs = pa.Table.from_pylist(PAIR_ROWS, PAIRS)  # 201 and 200; 100 and 102; 102 and 101
    column_set = pa.Table.from_pylist(
        [  # prompts and completions in another order, one absent
            {"prompt_id": ident(2), "completion_ids": [ident(201), ident(200)], SAME_AS: None},
            {"prompt_id": ident(1), "completion_ids": [ident(102), ident(100)], SAME_AS: [None, 0]},
        ],
        columns_schema([]).append(pa.field(SAME_AS, pa.list_(pa.int32()))),
    )
    assert same_tokens(pairs, groups, column_set).to_pylist() == [False, True, False]
    both = column_set.set_column(2, SAME_AS, pa.array([[None, 0], [None, None]], pa.list_(pa.int32())))
    assert same_tokens(pairs, groups, both).to_pylist() == [True, False, False]


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=5), min_size=1, max_size=4))
def test_pairs_of_the_same_tokens_against_a_comparison_of_the_tokens(tokens: list[list[int]]) -> None:
    rows = [
        {
            "prompt_id": ident(prompt),
            "completions": [{"completion_id": ident(100 * prompt + k)} for k in range(len(kinds))],
        }
        for prompt, kinds in enumerate(tokens)
    ]
    groups = pa.Table.from_pylist(rows, GROUPS)
    every = [(p, c, r) for p, kinds in enumerate(tokens) for c in range(len(kinds)) for r in range(len(kinds))]
    pairs = pa.Table.from_pylist([{"prompt_id": ident(p), "chosen": c, "rejected": r} for p, c, r in every], PAIRS)
    first = [
        [None if kinds.index(kind) == n else kinds.index(kind) for n, kind in enumerate(kinds)] for kinds in tokens
    ]
    column_set = pa.table(
        {
            "prompt_id": groups["prompt_id"],
            "completion_ids": [[c["completion_id"] for c in row["completions"]] for row in rows],
            SAME_AS: pa.array(
                [one if any(n is not None for n in one) else None for one in first], pa.list_(pa.int32())
            ),
        }
    )
    expected = [tokens[p][c] == tokens[p][r] for p, c, r in every]
    assert same_tokens(pairs, groups, column_set).to_pylist() == expected
