"""Who scores whom: the union of the parts is every model's own scores where it may score, and nothing elsewhere."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_scorers import TEXTS, table
from tiny_models import bpe_tokenizer, randomize, tiny_reward

from prefsel.config import CrossFit
from prefsel.ingest.identity import fold_of
from prefsel.score.cross_fit_scoring import CrossFitScorer, FoldModel, trained_on
from prefsel.score.scorers import RewardModelScorer

NOBODY = pa.array([], pa.binary(16))


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Two reward models with different weights."""
    made = []
    for scale in (0.3, 0.2):
        path = tmp_path_factory.mktemp("reward")
        randomize(tiny_reward(), scale).save_pretrained(path)
        bpe_tokenizer().save_pretrained(path)
        made.append(RewardModelScorer(name="rm", path=str(path), dtype="fp32", device="cpu"))
    return made


def numbers(shard):
    return shard.columns["rm_rm"]


def pairs_of(groups, aspects):
    """One pair per prompt and aspect."""
    ids = groups["prompt_id"].to_pylist()
    rows = [(one, aspect) for one, own in zip(ids, aspects) for aspect in own]
    return pa.table({"prompt_id": pa.array([r[0] for r in rows], pa.binary(16)), "aspect": [r[1] for r in rows]})


def test_each_fold_is_scored_by_the_model_that_left_it_out(rewards):
    groups, cross_fit = table(), CrossFit(folds=2, seed=3)
    folds = fold_of(groups["prompt_id"], folds=2, seed=3)
    assert len(set(folds)) == 2
    scorer = CrossFitScorer([FoldModel(one, fold, NOBODY) for fold, one in enumerate(rewards)], cross_fit, None)
    got = scorer.score(groups)
    alone = [numbers(one.score(groups)) for one in rewards]
    expected = [alone[fold][row] for row, fold in enumerate(folds)]
    assert [len(row) for row in numbers(got)] == [len(responses) for _, responses in TEXTS]
    for row, want in zip(numbers(got), expected):
        assert row == pytest.approx(want, rel=1e-5)
    assert alone[0] != alone[1]
    assert got.dropped == {}
    assert got.counters["completions"] == sum(map(len, alone[0]))


def test_same_tokens_and_what_the_template_did_come_from_every_part(rewards):
    texts = [(f"the <s> cat {n}", ["a dog", "a mat", "a dog"] if n in (1, 6) else ["a dog", "a mat"]) for n in range(8)]
    groups, cross_fit = table(texts), CrossFit(folds=2, seed=3)
    folds = fold_of(groups["prompt_id"], folds=2, seed=3)
    assert len({folds[1], folds[6]}) == 2
    scorer = CrossFitScorer([FoldModel(one, fold, NOBODY) for fold, one in enumerate(rewards)], cross_fit, None)
    got = scorer.score(groups)
    assert got.same_as == {1: (None, None, 0), 6: (None, None, 0)}
    counts = {kind: count for kind, (count, _) in got.template.notes.items()}
    assert counts == {"special_text": 18, "same_tokens": 2}


def test_prompts_it_was_trained_on_are_left_out_and_counted(rewards):
    groups = table()
    seen = groups["prompt_id"].combine_chunks().take(pa.array([0, 1]))
    got = CrossFitScorer([FoldModel(rewards[0], None, seen)], None, None).score(groups)
    assert numbers(got)[:2] == [[None, None], [None, None, None]]
    assert numbers(got)[2:] == [pytest.approx(row) for row in numbers(rewards[0].score(groups))[2:]]
    assert got.dropped == {"trained_on": 5}


def test_prompts_labelled_only_with_its_own_aspect_are_left_out(rewards):
    groups = table()
    pairs = pairs_of(groups, [["honesty"], ["honesty", "brevity"], ["brevity"], [None]])
    got = CrossFitScorer([FoldModel(rewards[0], None, NOBODY)], None, "honesty").score(groups, pairs)
    assert [None not in row for row in numbers(got)] == [False, True, True, True]
    assert got.dropped == {"own_aspect": 2}


def test_nothing_to_score_gives_nulls(rewards):
    groups = table()
    got = CrossFitScorer([FoldModel(rewards[0], None, groups["prompt_id"].combine_chunks())], None, None).score(groups)
    assert all(value is None for row in numbers(got) for value in row)
    assert got.dropped == {"trained_on": 9}


def test_trained_on_is_read_from_beside_the_weights(tmp_path):
    assert len(trained_on(tmp_path)) == 0
    pq.write_table(pa.table({"prompt_id": pa.array([b"x" * 16], pa.binary(16))}), tmp_path / "trained_on.parquet")
    assert trained_on(tmp_path).to_pylist() == [b"x" * 16]
