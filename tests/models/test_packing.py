from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_groups

from prefsel.errors import UserError
from prefsel.models.chat import EncodedGroup
from prefsel.models.packing import ModelShape, flops_min, pack
from prefsel.models.trie import MIN_SHARED, Segment


def group(prompt, *responses, status=None, starts=()):
    return EncodedGroup(prompt, list(responses), status or ["ok"] * len(responses), 0, starts)


def test_a_segment_by_eye():
    (row,) = pack([group([10, 11, 12], [20, 21], [30])], 100)
    assert row.input_ids_T.tolist() == [10, 11, 12, 20, 21, 30]
    assert row.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3]
    assert row.rows_R.tolist() == [2, 3, 2]  # both first response tokens are predicted by the prompt's last row
    assert row.targets_R.tolist() == [20, 21, 30]
    assert (row.token_E.tolist(), row.completion_E.tolist()) == ([0, 1, 2], [0, 0, 1])
    assert row.completion_index == [(0, 0), (0, 1)]
    assert row.segments == (Segment(0, 3, ()), Segment(3, 5, ((0, 3),)), Segment(5, 6, ((0, 3),)))
    assert (row.trunk_tokens, row.head_rows, row.num_completions, row.repeated_prompt_tokens) == (6, 3, 2, 0)


def test_longest_first_into_the_fullest_row_that_holds_it():
    lengths = [3, 8, 5, 2]
    groups = [group([1], list(range(length - 1))) for length in lengths]
    rows = pack(groups, 10)
    assert [sorted(g for g, _ in row.completion_index) for row in rows] == [[1, 3], [0, 2]]


def test_a_group_above_the_budget_repeats_its_prompt():
    rows = pack([group([1, 2, 3], [4, 4], [5, 5], [6, 6, 6])], 8)
    assert [row.input_ids_T.tolist() for row in rows] == [[1, 2, 3, 4, 4, 5, 5], [1, 2, 3, 6, 6, 6]]
    assert [row.repeated_prompt_tokens for row in rows] == [0, 3]
    assert [row.completion_index for row in rows] == [[(0, 0), (0, 1)], [(0, 2)]]


def test_a_sequence_above_the_budget_has_a_row_of_its_own():
    assert [row.trunk_tokens for row in pack([group([1] * 5, [2] * 5)], 4)] == [10]


def test_only_ok_completions_are_packed():
    rows = pack([group([1], [2], [], status=["ok", "too_long"]), group([3], [], status=["too_long"]), group([4])], 100)
    assert [row.completion_index for row in rows] == [[(0, 0)]]
    assert pack([], 100) == []


def test_prompts_cut_differently_are_different_segments():
    (row,) = pack([group([1, 2, 3], [4], [5], [6], starts=(0, 2, 0))], 100)
    assert row.input_ids_T.tolist() == [1, 2, 3, 4, 6, 3, 5]
    assert row.position_ids_T.tolist() == [0, 1, 2, 3, 3, 0, 1]
    assert row.completion_index == [(0, 0), (0, 2), (0, 1)]
    assert row.repeated_prompt_tokens == 1


def test_a_system_prompt_is_computed_once_for_all_groups_of_a_row():
    system = list(range(100, 100 + MIN_SHARED))
    (row,) = pack([group([*system, 1, 2], [3], [4]), group([5] * 30, [6]), group([*system, 7], [8, 9])], 100)
    assert row.input_ids_T.tolist() == [*[5] * 30, 6, *system, 1, 2, 3, 4, 7, 8, 9]
    assert row.trunk_tokens == 31 + MIN_SHARED + 2 + 2 + 3
    assert row.shared_tokens == MIN_SHARED


def test_a_response_token_that_two_responses_share_passes_the_head_once():
    shared = list(range(50, 50 + MIN_SHARED))
    (row,) = pack([group([1, 2], [*shared, 3], [*shared, 4, 5])], 100)
    assert row.head_rows == MIN_SHARED + 3
    assert row.sums(torch.ones(row.head_rows)).tolist() == [MIN_SHARED + 1, MIN_SHARED + 2]
    assert row.shared_tokens == MIN_SHARED


@pytest.mark.parametrize("token_budget", [1, 50, 130, 10_000])
def test_every_completion_once_and_no_row_above_the_budget(token_budget):
    groups = random_groups([3, 1, 5, 2, 4, 1, 1])
    rows = pack(groups, token_budget)
    keys = [key for row in rows for key in row.completion_index]
    assert sorted(keys) == [(g, c) for g, one in enumerate(groups) for c in range(len(one.status))]
    for row in rows:
        assert row.trunk_tokens <= token_budget or row.num_completions == 1
        for number, (g, c) in enumerate(row.completion_index):
            expected = groups[g].completion_tokens[c]
            assert row.targets_R[row.token_E[row.completion_E == number]].tolist() == expected


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 7), st.integers(1, 4)), max_size=9), st.integers(1, 200))
def test_groups_that_begin_alike_never_fill_a_row_above_the_budget(shapes, token_budget):
    rng = random.Random(0)
    groups = [
        group(
            [(bits >> (i // 18)) & 1 for i in range(length)],
            *([rng.randrange(2)] * rng.randrange(30) for _ in range(k)),
        )
        for length, bits, k in shapes
    ]
    rows = pack(groups, token_budget)
    assert sum(map(len, (row.completion_index for row in rows))) == sum(len(one.status) for one in groups)
    alone = sum(len(g.prompt_tokens) + sum(map(len, g.completion_tokens)) for g in groups)
    counted = [row.trunk_tokens + row.shared_tokens - row.repeated_prompt_tokens for row in rows]
    assert sum(counted) == alone
    for row in rows:
        assert row.trunk_tokens <= token_budget or row.num_completions == 1
        assert row.shared_tokens >= 0


def test_an_empty_prompt_is_explained():
    with pytest.raises(UserError, match="nothing predicts the first response token"):
        pack([group([], [1])], 10)


def test_flops_min_by_hand():
    # P = 4, R = 2 and 3: 2t·9 + 2h·5 + 4dL·(4²/2 + 5·4 + 2²/2 + 3²/2) with t = 100, h = 10, L = 2, d = 8
    shape = ModelShape(trunk_parameters=100, head_parameters=10, num_layers=2, attention_width=8)
    groups = [group([1] * 4, [1] * 2, [1] * 3), group([1] * 7, [], status=["too_long"])]
    assert flops_min(groups, shape) == 1800 + 100 + 64 * (8 + 20 + 2 + 4.5)
