from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from committed import Corpus, commit_corpus

from prefsel.report.examples import KINDS, Candidate, ExamplesWanted, candidates, pick, transcript
from prefsel.rules import parse_rule
from prefsel.select.compose import compile_rule

TOP = {"kind": "top", "score": "score_s", "ratio": 0.3}


def wanted(rule: dict[str, Any], cuts: dict[str, tuple[float, ...]], near: int, sample: int, corpus: Corpus) -> Any:
    numbers = dict(zip(KINDS, (near, near, sample, sample)))
    return ExamplesWanted(corpus.reader, compile_rule(parse_rule(rule)), "selections/x", cuts, None, numbers)


def found(corpus: Corpus, asked: ExamplesWanted) -> dict[str, list[tuple[bytes, float]]]:
    """The picked examples by kind: ids and scores."""
    picked = pick([candidates(shard, asked) for shard in corpus.shards], asked)
    by_kind: dict[str, list[tuple[bytes, float]]] = {}
    for (shard, row), (kind, one) in picked.items():
        assert (one.shard, one.row) == (shard, row)
        by_kind.setdefault(kind, []).append((corpus.ids[shard][row], one.score))
    return by_kind


def test_the_nearest_to_the_cut_of_the_whole_corpus(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = [None if n % 5 == 0 else float(score) for n, score in enumerate(rng.normal(size=90))]
    corpus = commit_corpus(tmp_path, [scores[:10], scores[10:70], scores[70:]])
    kept = corpus.keep("selections/x", TOP)
    known = {
        one: score for ids, part in zip(corpus.ids, corpus.scores) for one, score in zip(ids, part) if score is not None
    }
    cut = min(known[one] for one in kept)
    shown = found(corpus, wanted(TOP, {"all": (cut,)}, 4, 3, corpus))
    above, below = sorted(known[one] for one in kept), sorted(s for one, s in known.items() if one not in kept)
    assert [score for _, score in shown["just kept"]] == above[:4]
    assert [score for _, score in shown["just dropped"]] == below[:-5:-1]
    # The sample is of what is not shown already, kept and dropped, from several shards.
    near = {one for kind in ("just kept", "just dropped") for one, _ in shown[kind]}
    for kind in ("kept", "dropped"):
        ids = {one for one, _ in shown[kind]}
        assert len(ids) == 3
        assert not ids & near
        assert all((one in kept) == (kind == "kept") for one in ids)


@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 20, 20), (7, 40, 13)])
def test_the_same_examples_for_any_sharding(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    scores = [float(score) for score in np.random.default_rng(1).integers(0, 6, 60)]  # many ties at the cut
    ends = np.cumsum(sizes)
    corpus = commit_corpus(tmp_path, [scores[end - size : end] for size, end in zip(sizes, ends)])
    corpus.keep("selections/x", TOP)
    shown = found(corpus, wanted(TOP, {"all": (4.0,)}, 3, 3, corpus))
    one = commit_corpus(tmp_path / "one", [scores])
    one.keep("selections/x", TOP)
    assert shown == found(one, wanted(TOP, {"all": (4.0,)}, 3, 3, one))


def test_the_sample_is_no_best_of_and_differs_from_the_first_ids(tmp_path: Path) -> None:
    scores = [float(n) for n in range(400)]
    corpus = commit_corpus(tmp_path, [scores[:200], scores[200:]])
    kept = corpus.keep("selections/x", {**TOP, "ratio": 0.5})
    shown = found(corpus, wanted(TOP, {}, 0, 40, corpus))
    sample = [score for _, score in shown["kept"]]
    assert np.mean(sample) == pytest.approx(300, abs=3 * 58 / 40**0.5)  # uniform over 200 to 399
    assert {one for one, _ in shown["kept"]} != set(sorted(kept)[:40])


def test_a_band_has_two_cuts(tmp_path: Path) -> None:
    corpus = commit_corpus(tmp_path, [[float(n) for n in range(11)]])
    rule = {"kind": "band", "score": "score_s", "low": 20, "high": 80}
    corpus.keep("selections/x", rule)
    shown = found(corpus, wanted(rule, {"all": (2.0, 8.0)}, 2, 0, corpus))
    assert sorted(score for _, score in shown["just kept"]) == [3.0, 7.0]
    assert sorted(score for _, score in shown["just dropped"]) == [2.0, 8.0]


def test_a_quota_has_a_cut_per_stratum(tmp_path: Path) -> None:
    # Source a: 0 to 9, source b: 100 to 109; the best three of each.
    corpus = commit_corpus(tmp_path, [[float(n) for n in range(10)], [100.0 + n for n in range(10)]])
    rule = {"kind": "quota", "score": "score_s", "by": "source", "ratio": 0.3}
    for number in (0, 1):
        corpus.keep_rows("selections/x", number, [7, 8, 9])
    shown = found(corpus, wanted(rule, {"a": (7.0,), "b": (107.0,)}, 2, 0, corpus))
    assert sorted(score for _, score in shown["just kept"]) == [7.0, 107.0]
    assert sorted(score for _, score in shown["just dropped"]) == [6.0, 106.0]


def test_without_a_cut_nothing_is_near_it(tmp_path: Path) -> None:
    corpus = commit_corpus(tmp_path, [[float(n) for n in range(10)]])
    corpus.keep("selections/x", TOP)
    assert set(found(corpus, wanted(TOP, {}, 2, 2, corpus))) == {"kept", "dropped"}


def test_each_pair_is_shown_once() -> None:
    one, two = Candidate(0.0, 0.1, 0, 0, 1.0), Candidate(0.5, 0.2, 1, 3, 2.0)
    parts = [{"just kept": [one, two], "just dropped": [], "kept": [one, two], "dropped": []}]
    asked: Any = type("Asked", (), {"number": dict(zip(KINDS, (1, 1, 2, 2)))})
    assert [(place, kind) for place, (kind, _) in pick(parts, asked).items()] == [
        ((0, 0), "just kept"),
        ((1, 3), "kept"),
    ]


def test_transcripts() -> None:
    assert transcript([{"role": "user", "content": "hi"}]) == "hi"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert transcript(turns) == "user: hi\n\nassistant: ho"


def test_a_transcript_shows_calls_and_tools() -> None:
    call = {"role": "assistant", "content": None, "rest": '{"tool_calls": [{"name": "f"}]}'}
    assert transcript([call]) == '{"tool_calls": [{"name": "f"}]}'
    asked = {"role": "user", "content": "hi", "rest": '{"tools": []}'}
    assert transcript([asked, call, {"role": "tool", "content": "4", "rest": None}]) == (
        'user: hi\n{"tools": []}\n\nassistant: {"tool_calls": [{"name": "f"}]}\n\ntool: 4'
    )
