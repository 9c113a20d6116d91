from __future__ import annotations

import pytest
from tiny_models import random_groups

from prefsel.errors import UserError
from prefsel.models.chat import EncodedGroup
from prefsel.models.tree import ModelShape, Segment, flops_min, pack


def group(prompt, *responses, status=None, starts=()):
    return EncodedGroup(prompt, list(responses), status or ["ok"] * len(responses), 0, starts)


def test_a_segment_by_eye():
    (row,) = pack([group([10, 11, 12], [20, 21], [30])], 100)
    assert row.input_ids_T.tolist() == [10, 11, 12, 20, 21, 30]
    assert row.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3]
    assert row.rows_R.tolist() == [2, 3, 2]  # both first response tokens are predicted by the prompt's last row
    assert row.targets_R.tolist() == [20, 21, 30]
    assert row.completion_R.tolist() == [0, 0, 1]
    assert row.completion_index == [(0, 0), (0, 1)]
    assert row.segments == (Segment(0, 3, (2, 1)),)
    assert row.segments[0].responses == [(3, 5), (5, 6)]
    assert (row.trunk_tokens, row.head_rows, row.num_completions, row.repeated_prompt_tokens) == (6, 3, 2, 0)


def test_longest_first_into_the_fullest_row_that_holds_it():
    lengths = [3, 8, 5, 2]
    groups = [group([1], list(range(length - 1))) for length in lengths]
    rows = pack(groups, 10)
    assert [[g for g, _ in row.completion_index] for row in rows] == [[1, 3], [2, 0]]


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
            assert row.targets_R[row.completion_R == number].tolist() == expected


def test_an_empty_prompt_is_explained():
    with pytest.raises(UserError, match="nothing predicts the first response token"):
        pack([group([], [1])], 10)


def test_flops_min_by_hand():
    # P = 4, R = 2 and 3: 2t·9 + 2h·5 + 4dL·(4²/2 + 5·4 + 2²/2 + 3²/2) with t = 100, h = 10, L = 2, d = 8
    shape = ModelShape(trunk_parameters=100, head_parameters=10, num_layers=2, attention_width=8)
    groups = [group([1] * 4, [1] * 2, [1] * 3), group([1] * 7, [], status=["too_long"])]
    assert flops_min(groups, shape) == 1800 + 100 + 64 * (8 + 20 + 2 + 4.5)
