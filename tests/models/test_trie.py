from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.models.trie import MIN_SHARED, Segment, TokenSequence, common_length, lay_out

LONG = list(range(100, 100 + MIN_SHARED))


def trie_of(*entries, same_group=False):
    keys = [(0, number) if same_group else (number, 0) for number in range(len(entries))]
    return lay_out([TokenSequence(key, tokens, prompt_length) for key, (tokens, prompt_length) in zip(keys, entries)])


def rows(path):
    return [row for start, end in path.rows for row in range(start, end)]


def test_a_trie_by_eye():
    system, turn = LONG, [1] * MIN_SHARED
    trie = trie_of(([*system, *turn, 7], 32), ([*system, *turn, 8, 9], 32), ([*system, 5], 16))
    n = MIN_SHARED
    assert trie.tokens == system + turn + [7, 8, 9, 5]
    assert trie.positions == [*range(2 * n), 2 * n, 2 * n, 2 * n + 1, n]
    assert trie.segments == [
        Segment(0, n, ()),
        Segment(n, 2 * n, ((0, n),)),
        Segment(2 * n, 2 * n + 1, ((0, 2 * n),)),
        Segment(2 * n + 1, 2 * n + 3, ((0, 2 * n),)),
        Segment(2 * n + 3, 2 * n + 4, ((0, n),)),
    ]
    assert [path.rows for path in trie.paths] == [
        ((0, 2 * n + 1),),
        ((0, 2 * n), (2 * n + 1, 2 * n + 3)),
        ((0, n), (2 * n + 3, 2 * n + 4)),
    ]


def test_a_short_common_beginning_is_repeated_unless_it_is_a_prompt():
    assert len(trie_of(([1, 2, 3, 4], 3), ([1, 2, 3, 5], 3)).tokens) == 8
    assert len(trie_of(([1, 2, 3, 4], 3), ([1, 2, 3, 5], 3), same_group=True).tokens) == 5
    assert len(trie_of(([*LONG[:-1], 4], 20), ([*LONG[:-1], 5], 20)).tokens) == 2 * MIN_SHARED
    assert len(trie_of(([*LONG, 4], 20), ([*LONG, 5], 20)).tokens) == MIN_SHARED + 2


def test_a_prompt_that_continues_another_groups_response():
    first = ([1] * 20 + [2] * 20, 20)
    second = ([1] * 20 + [2] * 20 + [3] * 5 + [4], 45)
    trie = trie_of(first, second)
    assert len(trie.tokens) == 46
    assert trie.paths[0].response_rows().tolist() == list(range(20, 40))
    assert trie.paths[1].response_rows().tolist() == [45]
    assert trie.paths[1].response_rows(before=1).tolist() == [44]


def test_equal_sequences_and_sequences_that_end_inside_others():
    long, n = [*LONG, *LONG], 2 * MIN_SHARED
    trie = trie_of((long, 1), (long, 1), ([*long, 9], 1), (long[:1], 1), same_group=True)
    assert trie.tokens == [*long, 9]
    assert {path.key[1]: rows(path) for path in trie.paths} == {
        0: list(range(n)),
        1: list(range(n)),
        2: list(range(n + 1)),
        3: [0],
    }


def test_responses_of_another_group_join_all_or_none():
    base = list(range(1, MIN_SHARED + 1))
    short = [([*base, 50], 5), ([*base[:5], 99], 5)]
    entries = [TokenSequence((0, i), *one) for i, one in enumerate(short)]
    entries += [TokenSequence((1, i), *one) for i, one in enumerate([([*base, 60], 10), ([*base[:10], 98], 10)])]
    alone = 5 + 12 + 1 + 10 + 7 + 1
    assert len(lay_out(entries).tokens) <= alone


def test_a_chain_of_prefixes_is_no_recursion():
    text = [random.Random(0).randrange(50) for _ in range(40_000)]
    trie = trie_of(*((text[: MIN_SHARED * n], 1) for n in range(1, 2500)), same_group=True)
    assert trie.tokens == text[: MIN_SHARED * 2499]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 60),
            st.lists(st.lists(st.integers(0, 1), max_size=60), min_size=1, max_size=4),
            st.integers(0, 2**20),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_every_sequence_is_there_and_no_group_costs_more_than_alone(groups):
    entries, alone = [], 0
    for number, (prompt_length, responses, bits) in enumerate(groups):
        # Few distinct prompts, so that they begin alike; responses that go on as other prompts do.
        text = [(bits >> (i // 20)) & 1 for i in range(prompt_length + 60)]
        prompt, responses = text[:prompt_length], [text[prompt_length:][: len(r)] + r[:9] for r in responses]
        entries += [TokenSequence((number, i), prompt + response, len(prompt)) for i, response in enumerate(responses)]
        alone += len(prompt) + sum(map(len, responses))
    trie = lay_out(entries)
    assert len(trie.tokens) <= alone
    assert sorted(path.key for path in trie.paths) == sorted(entry.key for entry in entries)
    covered = [row for run in trie.segments for row in range(run.start, run.end)]
    assert covered == list(range(len(trie.tokens)))
    context_of = {row: (run, row) for run in trie.segments for row in range(run.start, run.end)}
    by_key = {entry.key: entry for entry in entries}
    for path in trie.paths:
        entry, own = by_key[path.key], rows(path)
        assert [trie.tokens[row] for row in own] == entry.tokens
        assert [trie.positions[row] for row in own] == list(range(len(own)))
        assert path.response_rows().tolist() == own[entry.prompt_length :]
        assert path.response_rows(before=1).tolist() == own[entry.prompt_length - 1 : len(own) - 1]
        for place, row in enumerate(own):  # what the row attends to is the sequence up to it
            run, _ = context_of[row]
            seen = [r for start, end in run.context for r in range(start, end)] + list(range(run.start, row + 1))
            assert seen == own[: place + 1]


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_length(first, second):
    expected = 0
    while expected < min(len(first), len(second)) and first[expected] == second[expected]:
        expected += 1
    assert common_length(first, second) == expected
