"""IFD margin as a ratio of perplexities, one pair at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_tables import float_table, random_columns, rows_of, score_shards, sided

from prefsel.errors import NonFiniteError, UserError
from prefsel.metrics import score_table

SIDES = ("chosen", "rejected")
NAMES = [f"{p}_{s}" for p in ("logps_p", "logps_p_uncond", "num_tokens_p", "num_tokens_p_uncond") for s in SIDES]


def perplexity(logps: float, tokens: int) -> float:
    return math.exp(-logps / tokens)


def naive(row: dict, own_counts: bool) -> float:
    """ppl(y|x) / ppl(y) of chosen minus rejected."""
    count = "num_tokens_p_uncond" if own_counts else "num_tokens_p"
    difficulty = []
    for side in SIDES:
        needed = [row[f"{p}_{side}"] for p in ("logps_p", "num_tokens_p", "logps_p_uncond", count)]
        if None in needed:
            return math.nan
        difficulty.append(perplexity(needed[0], needed[1]) / perplexity(needed[2], needed[3]))
    return difficulty[0] - difficulty[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.sampled_from([1, 3, 60]), st.booleans())
def test_equals_the_definition_for_any_sharding(num_rows: int, num_shards: int, own_counts: bool) -> None:
    columns = random_columns(NAMES, num_rows, scale=20.0)
    table = float_table(columns)
    if not own_counts:
        table = table.drop_columns([f"num_tokens_p_uncond_{side}" for side in SIDES])
    found, _ = score_shards(table, "ifd_margin", num_shards, policy="p")
    np.testing.assert_allclose(found, [naive(row, own_counts) for row in rows_of(columns)], rtol=1e-9, atol=1e-9)


def test_a_prompt_that_tells_nothing_gives_zero() -> None:
    same = [(-8.0, -6.0)]
    table = sided(logps_p=same, logps_p_uncond=same, num_tokens=[(4, 2)])
    assert score_table(table, "ifd_margin", policy="p").tolist() == [0.0]


def test_faults_are_named() -> None:
    table = sided(logps_p=[(-1, -1)], logps_p_uncond=[(-1, -1)], num_tokens_p=[(1, 1)], num_tokens_p_uncond=[(1, 0)])
    with pytest.raises(UserError, match="num_tokens_p_uncond_rejected: got 0; valid: at least 1 response token"):
        score_table(table, "ifd_margin", policy="p")
    table = sided(logps_p=[(-1e4, -1)], logps_p_uncond=[(-1, -1)], num_tokens=[(1, 1)])
    with pytest.raises(NonFiniteError, match=r"score_ifd_margin: 1 scores overflow, first at rows \[0\]"):
        score_table(table, "ifd_margin", policy="p")
