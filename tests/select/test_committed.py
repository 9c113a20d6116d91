"""Rules over committed score shards against a full sort, and how often the stage reads each column of a shard."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import groupby
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefsel.numbers import ranges
from prefsel.pairs.reader import PairReader
from prefsel.pairs.score_shards import LENGTHS, ScoreReader, committed_summaries, score_table, shard_info
from prefsel.rules import parse_rule
from prefsel.schema import ID
from prefsel.select.compose import Keep, compile_rule
from prefsel.select.evaluate import ShardQuery, answer, decide_leaf, kept
from prefsel.select.thresholds import Decided
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

# Moments of scores such as -1.7e308 overflow; they are no part of a selection.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Row = tuple[float | None, bytes, str | None]
"""Score (None: the pair has none), pair_id, aspect."""

values = st.one_of(
    st.none(),
    st.sampled_from([0.5, 0.5, 0.5, -0.0, 0.0, 1e9, 1e9 + 1e-6, -5e-324, 5e-324, -1.7e308]),
    st.floats(allow_nan=False, allow_infinity=False),
)


class Found:
    """What a rule of one leaf keeps of committed shards, and the columns that were read of each shard to know it."""

    def __init__(self, folder: str, shards: Sequence[Sequence[Row]], rule: dict[str, Any]) -> None:
        artifact = Artifact(Storage(folder), "scores/uf")
        refs = [commit(artifact, number, rows) for number, rows in enumerate(shards)]
        plan = compile_rule(parse_rule(rule))
        leaf, reader = plan.keep, ScoreReader(PairReader(artifact.storage, eligible=""), {"score_x": "scores"})
        assert isinstance(leaf, Keep)
        self.reads: Counter[str] = Counter()

        def ask(asked: ShardQuery) -> list[Any]:
            return [answer(asked, reader.rows(ref, ["score_x"], ids=asked.needs_ids, by=leaf.by)) for ref in refs]

        real = ScoreReader.table

        def counting(reader: ScoreReader, shard: ShardRef, column: str, names: list[str]) -> pa.Table:
            self.reads.update(names)
            return real(reader, shard, column, names)

        summaries = committed_summaries(artifact.entries().values(), leaf.by)
        with mock.patch.object(ScoreReader, "table", counting):
            self.decided: Decided = decide_leaf(leaf, ask, committed=summaries)
        decided = [self.decided.thresholds]
        masks = [kept(leaf, decided, reader.rows(ref, ["score_x"], ids=True, by=leaf.by)) for ref in refs]
        if self.decided.kept_S is not None:
            assert self.decided.kept_S.tolist() == [int(mask.sum()) for mask in masks]
        self.kept = {row[1] for mask, rows in zip(masks, shards) for row, is_kept in zip(rows, mask) if is_kept}


def commit(artifact: Artifact, number: int, rows: Sequence[Row]) -> ShardRef:
    name = f"{number:03d}"
    like = {
        "pair_id": pa.array([row[1] for row in rows], ID),
        "source": pa.array(["uf"] * len(rows)),
        "aspect": pa.array([row[2] for row in rows], pa.string()),
    }
    score_N = np.array([np.nan if row[0] is None else row[0] for row in rows]) + 0.0
    dropped = pa.array(["missing_x" if row[0] is None else None for row in rows], pa.string())
    unknown = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    table = score_table(like, score_N, dropped, unknown)
    info = shard_info(table, unknown)
    artifact.commit(name, table, made_from=name, attempt=artifact.log_attempt(name), info=info)
    return ShardRef("uf", name, "train", number)


def best(rows: Sequence[Row], k: int, reverse: bool) -> set[bytes]:
    """A full sort."""
    return {row[1] for row in sorted(rows, key=lambda row: (row[0] if reverse else -row[0], row[1]))[:k]}


def by_quota(rows: Sequence[Row], share: Fraction, reverse: bool) -> set[bytes]:
    """A full sort of each stratum, seats by largest remainders."""
    in_order = sorted(rows, key=lambda row: (row[2] is not None, row[2] or ""))
    strata = [list(part) for _, part in groupby(in_order, key=lambda row: row[2])]
    k = int(share * len(rows))
    exact = [Fraction(k * len(part), len(rows)) for part in strata]
    seats = [int(one) for one in exact]
    for place in sorted(range(len(strata)), key=lambda place: (seats[place] - exact[place], place))[: k - sum(seats)]:
        seats[place] += 1
    return set().union(*(best(part, seat, reverse) for part, seat in zip(strata, seats)))


@settings(deadline=None, max_examples=150)
@given(st.lists(values, min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 9), st.booleans(), st.data())
def test_a_rule_keeps_what_a_full_sort_keeps(scores, num_shards, seed, reverse, data) -> None:
    rng = np.random.default_rng(seed)
    # Counted ids on odd seeds: no hashes, so that a guess of where their threshold lies is wrong.
    ids = [n.to_bytes(16, "big") if seed % 2 else rng.bytes(16) for n in rng.permutation(len(scores)).tolist()]
    aspects = [("help", "truth", None)[n] for n in rng.integers(0, 3, len(scores))]
    place = rng.integers(0, num_shards, len(scores))
    rows = list(zip(scores, ids, aspects))
    shards = [[row for row, at in zip(rows, place) if at == number] for number in range(num_shards)]
    scored = [row for row in rows if row[0] is not None]
    percent = data.draw(st.integers(1, 100))
    rule: dict[str, Any] = {"kind": "top", "score": "score_x", "ratio": percent / 100, "reverse": reverse}
    k = int(Fraction(percent, 100) * len(scored))
    num_values = data.draw(st.sampled_from([2, 3, 256]))
    few = mock.patch.multiple(ranges, FEW=num_values, MAX_VALUES=num_values)
    with few, tempfile.TemporaryDirectory() as folder:
        assert Found(folder, shards, rule).kept == best(scored, k, reverse)
    if scored:
        with few, tempfile.TemporaryDirectory() as folder:
            found = Found(folder, shards, {**rule, "kind": "quota", "by": ["aspect"]})
        assert found.kept == by_quota(scored, Fraction(percent, 100), reverse)


def _edge(known: np.ndarray, percent: int) -> Fraction:
    """The percentile between two order statistics, without rounding: an edge of −2e-324 is below 0."""
    ranked = sorted(map(Fraction, known.tolist()))
    place = Fraction(percent * (len(ranked) - 1), 100)
    before, behind = ranked[place.__floor__()], ranked[place.__ceil__()]
    return before + (behind - before) * (place - place.__floor__())


@settings(deadline=None, max_examples=40)
@example([0.5, 0.5, -0.0, -5e-324], 1, False, True)
@given(st.lists(values, min_size=1, max_size=40), st.integers(1, 4), st.booleans(), st.booleans())
def test_bands_and_complements(scores, num_shards, reverse, is_band) -> None:
    rows = [(score, bytes([n]) * 16, None) for n, score in enumerate(scores)]
    shards = [rows[number::num_shards] for number in range(num_shards)]
    known = np.array([score for score in scores if score is not None])
    if not len(known):
        return
    low = _edge(known, 20) if is_band else Fraction(0.25)
    high = _edge(known, 70) if is_band else None
    named = {"low": 20, "high": 70} if is_band else {"threshold": 0.25}
    rule = {"kind": "band" if is_band else "above", "score": "score_x", **named, "reverse": reverse}
    with np.errstate(over="ignore"), tempfile.TemporaryDirectory() as folder:
        found = Found(folder, shards, rule)
    edges = found.decided.thresholds.edges
    assert edges is not None
    np.testing.assert_allclose(edges[0], float(low), rtol=1e-12)
    inside = [
        low < Fraction(row[0]) and (high is None or Fraction(row[0]) < high) for row in rows if row[0] is not None
    ]
    ids = [row[1] for row in rows if row[0] is not None]
    assert found.kept == {one for one, is_inside in zip(ids, inside) if is_inside != reverse}


SHAPES: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], int]] = {
    "normal": (lambda rng, n: rng.standard_normal(n), 0),
    "ties": (lambda rng, n: np.where(rng.random(n) < 0.4, 0.25, rng.standard_normal(n)), 1),
    "offset": (lambda rng, n: 1e6 + rng.standard_normal(n), 0),
}


@pytest.mark.parametrize("kind", ["top", "quota"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_read_once_and_ids_only_where_the_cut_ties(tmp_path, shape: str, kind: str) -> None:
    rng, (make, ids_read) = np.random.default_rng(3), SHAPES[shape]
    rows = [(score, rng.bytes(16), ("a", "b")[n % 2]) for n, score in enumerate(make(rng, 24_000).tolist())]
    shards = [rows[start : start + 4000] for start in range(0, 24_000, 4000)]
    rule = {"kind": kind, "score": "score_x", "ratio": 0.3, **({"by": ["aspect"]} if kind == "quota" else {})}
    found = Found(str(tmp_path), shards, rule)
    assert found.kept == (best(rows, 7200, False) if kind == "top" else by_quota(rows, Fraction(3, 10), False))
    assert found.reads["score"] == len(shards)
    assert found.reads["pair_id"] == len(shards) * ids_read
    assert found.reads["aspect"] == (len(shards) if kind == "quota" else 0)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_stratum_without_seats_keeps_nothing(tmp_path, reverse: bool) -> None:
    rows = [(0.5, b"a" * 16, None), (0.5, b"b" * 16, "truth")]  # one seat, which goes to the first stratum
    rule = {"kind": "quota", "by": ["aspect"], "score": "score_x", "count": 1, "reverse": reverse}
    assert Found(str(tmp_path), [rows], rule).kept == {b"a" * 16}


def test_a_shard_may_lack_every_stratum_that_ties(tmp_path) -> None:
    shards = [
        [(0.5, bytes([n]) * 16, "help") for n in range(4)],
        [(0.5, bytes([n]) * 16, "truth") for n in range(4, 6)],
    ]
    rule = {"kind": "quota", "by": ["aspect"], "score": "score_x", "count": 2}
    assert Found(str(tmp_path / "two"), shards, rule).kept == {bytes([0]) * 16, bytes([4]) * 16}
    assert Found(str(tmp_path / "one"), shards, {**rule, "count": 1}).kept == {bytes([0]) * 16}


def test_summaries_of_a_ledger_written_before_are_read(tmp_path) -> None:
    """The ledger of a shard of 600 rows, as the version before this mechanism wrote it."""
    values_N = np.arange(600.0)
    artifact = Artifact(Storage(str(tmp_path)), "scores/uf")
    commit(artifact, 0, [(value, bytes([n % 256, n // 256] * 8), None) for n, value in enumerate(values_N.tolist())])
    (row,) = next(iter(artifact.entries().values())).info["histograms"]
    # Four places of 600: 0, 199, 399, 599; little-endian float64 in base64.
    assert row["fences"] == "AAAAAAAAAAAAAAAAAOBoQAAAAAAA8HhAAAAAAAC4gkA="
    assert set(row) == {"source", "aspect", "bins", "counts", "fences", "rows"}
    assert LENGTHS == ("chosen_length", "rejected_length")
