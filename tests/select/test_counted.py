"""Rows kept of every shard, told by the answers, against the rows that are kept of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.rules import parse_rule
from prefsel.select import cuts
from prefsel.select.counted import Heard
from prefsel.select.fences import Bounds, fences

scores = st.lists(
    st.one_of(st.sampled_from([0.5, 0.5, 0.5, 0.0, 1e9]), st.floats(allow_nan=False, allow_infinity=False)),
    min_size=1,
    max_size=60,
)


def told(score_N, ids_NW, code_N, place_N, rule, *, has_bounds=True):
    """What the answers say of each shard, and the rows the cut keeps of it."""
    labels = [("a",), ("b",)] if code_N is not None else [()]
    code = np.zeros(len(score_N), int) if code_N is None else code_N
    parts = [np.flatnonzero(place_N == number) for number in range(place_N.max() + 1)]
    shards = [cuts.ShardScores(score_N[p], ids_NW[p], None if code_N is None else code_N[p], labels) for p in parts]
    bounds = {
        label: Bounds.of([(int((code[p] == at).sum()), fences(score_N[p][code[p] == at])) for p in parts])
        for at, label in enumerate(labels)
        if (code == at).any()
    }
    heard = Heard()

    def ask(queries):
        replies = [cuts.reply(queries, shard) for shard in shards]
        heard.note(queries, replies)
        return replies

    histograms = cuts.merge_histograms(shard.histograms() for shard in shards)
    histograms = {label: one for label, one in histograms.items() if one.total}
    cut = cuts.decide(parse_rule(rule), histograms, ask, bounds=bounds if has_bounds else None)
    sizes = [{label: int((code[p] == at).sum()) for at, label in enumerate(labels)} for p in parts]
    return heard.num_kept(cut, sizes), [int(cuts.keep(cut, shard).sum()) for shard in shards]


@settings(deadline=None, max_examples=300)
@given(scores, st.integers(1, 4), st.integers(0, 99), st.booleans(), st.booleans(), st.integers(1, 100))
def test_answers_tell_what_is_kept_of_each_shard(values, num_shards, seed, reverse, is_quota, percent) -> None:
    rng, num_rows = np.random.default_rng(seed), len(values)
    ids_NW = rng.integers(0, 2**64, (num_rows, 2), np.uint64).astype(">u8")
    code_N = rng.integers(0, 2, num_rows) if is_quota else None
    rule = {"kind": "quota", "by": ["aspect"]} if is_quota else {"kind": "top"}
    rule |= {"score": "score_x", "ratio": percent / 100, "reverse": reverse}
    counted, kept = told(np.array(values) + 0.0, ids_NW, code_N, rng.integers(0, num_shards, num_rows), rule)
    assert counted == kept


@pytest.mark.parametrize("has_bounds", [True, False])
def test_digits_do_not_tell(has_bounds: bool) -> None:
    ids_NW = np.stack([np.zeros(5000), np.arange(5000)], axis=1).astype(">u8")
    rule = {"kind": "top", "score": "score_x", "count": 700}
    counted, kept = told(np.zeros(5000), ids_NW, None, np.arange(5000) % 3, rule, has_bounds=has_bounds)
    assert sum(kept) == 700
    assert counted is None
