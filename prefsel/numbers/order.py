"""Order statistics over shards, exactly: the one mechanism behind thresholds, bands, quotas, quantiles and ties.

    driver                                          every shard
    RangeQuery: between which two values?   ──▶     RangeCounts: rows below, at either value, above, and a Summary of
    locate: narrow the range, ask again     ◀──     the values strictly between: all of them when few, else 256

A Summary encloses every rank for certain, and what is asked next lies strictly inside what was asked before, so the
search ends whatever the values are. Counts travel, rows stay: the driver holds O(shards).

A row's place is decided by its score, then by the first and the second word of its pair_id: three numbers, found one
after the other by the same loop, each among the rows that share those before it.

Shape suffixes: E values of all Summaries, S shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from prefsel.errors import IntegrityError, UserError
from prefsel.numbers.ranges import (
    ALL_WORDS,
    EVERYTHING,
    WORD_BITS,
    Ask,
    Number,
    Range,
    RangeCounts,
    RangeQuery,
    Summary,
    positions,
)


@dataclass(frozen=True)
class Located:
    """One word of the searched row's key, and how the rows that share the words before it lie around it, by shard."""

    value: Number
    below_S: np.ndarray
    """int64, like the next two."""
    at_S: np.ndarray
    above_S: np.ndarray
    next_words: Sequence[np.ndarray] | None = None
    """The following word of the rows that have this one, by shard, where the shards have told."""

    @property
    def below(self) -> int:
        """Rows with a smaller word, in all shards."""
        return int(self.below_S.sum())

    @property
    def at(self) -> int:
        """Rows with this word."""
        return int(self.at_S.sum())

    @property
    def above(self) -> int:
        """Rows with a larger word."""
        return int(self.above_S.sum())


@dataclass(frozen=True)
class Target:
    """The row that is searched for: the last one of the first `count`."""

    count: int
    """At least 1, at most `size`."""
    size: int
    """All rows of the stratum."""
    start: Range = EVERYTHING
    """What to ask about first."""
    ids: Range | None = None
    """If `start` is one score: where among the ids of its rows to look in the same round."""
    descending: bool = False
    """Large scores come first (and small pair_ids, always)."""
    by_id: bool = False
    """Rows that tie are told apart by their pair_id; else the score alone is wanted."""

    def rank(self, found: Sequence[Located]) -> int:
        """Ascending rank of the row's next word, among the rows that share the words found."""
        if not found:
            return self.size - self.count if self.descending else self.count - 1
        score, *words = found
        return self.count - 1 - (score.above if self.descending else score.below) - sum(word.below for word in words)

    def is_met(self, found: Sequence[Located]) -> bool:
        """Whether no further word is needed: there is none, or all rows that tie are among the first."""
        if not found or (self.by_id and len(found) < 3):
            return len(found) == 1 and self.rank(found) + 1 == found[0].at
        return True

    def kept_S(self, found: Sequence[Located]) -> np.ndarray:
        """How many of the first `count` rows each shard has, int64."""
        score, *words = found
        before_S = score.above_S if self.descending else score.below_S
        return before_S + sum((word.below_S for word in words), start=np.int64(0)) + found[-1].at_S


def target(summaries: Sequence[Summary], count: int, *, descending: bool = False, by_id: bool = False) -> Target:
    """The last of the first `count` of all summarised rows, and where to look for it.

    Args:
        summaries: of one stratum, by shard.
        count: at least 1, at most the number of rows.
        descending: see `Target`.
        by_id: see `Target`.
    """
    known = _Known.of(summaries)
    start = known.enclose(known.size - count if descending else count - 1)
    ids = None
    if by_id and start.low == start.high:
        below, upto = known.about(start.low)
        place = count - 1 - (known.size - upto if descending else below)
        if place + 1 < upto - below:  # the tie is cut
            ids = likely_ids(place, upto - below, spread=known.spread)
    return Target(count, known.size, start, ids, descending, by_id)


@dataclass(frozen=True)
class _Known:
    """What the Summaries of several shards say about all their rows.

    A value at or above the summarised one of place p has p + 1 values of its shard at or below it; one at or below the
    next summarised value, of place q, has at most q below it.
    """

    value_E: np.ndarray
    """Ascending within each shard."""
    least_E: np.ndarray
    """Rows that a value surely has at or below it, from this one on."""
    most_E: np.ndarray
    """Rows that a value may have below it, beyond this one."""
    size: int
    spread: float
    """Standard deviation of `about`, if rows lie evenly between the values of each shard."""

    @classmethod
    def of(cls, summaries: Sequence[Summary]) -> _Known:
        given = [one for one in summaries if one.count]
        least, most = zip(*(_weights(one.count, len(one.values)) for one in given))
        gaps = [0 if one.is_complete else one.count / len(one.values) for one in given]
        return cls(
            value_E=np.concatenate([one.values for one in given]),
            least_E=np.concatenate(least),
            most_E=np.concatenate(most),
            size=sum(one.count for one in given),
            spread=math.sqrt(sum(gap * gap for gap in gaps) / 12),
        )

    def enclose(self, rank: int) -> Range:
        """Two of the values, which surely enclose that of an ascending rank."""
        order_E = np.argsort(self.value_E)
        least_E, most_E = self.least_E[order_E], self.most_E[order_E]
        low = np.searchsorted(np.cumsum(most_E) - most_E, rank, side="right") - 1
        high = np.searchsorted(np.cumsum(least_E), rank + 1)
        return Range(*(self.value_E[order_E[place]].item() + 0 for place in (low, high)))  # + 0 makes -0.0 a 0.0

    def about(self, value: Number) -> tuple[float, float]:
        """How many rows lie below a value, and up to it: the middle of what is possible."""
        is_below_E, is_upto_E = self.value_E < value, self.value_E <= value
        below, upto = (
            (int(self.least_E[is_in_E].sum()) + int(self.most_E[is_in_E].sum())) / 2
            for is_in_E in (is_below_E, is_upto_E)
        )
        return below, upto


@lru_cache(maxsize=1024)
def _weights(count: int, num_values: int) -> tuple[np.ndarray, np.ndarray]:
    place_E = positions(count, num_values)
    return np.diff(place_E + 1, prepend=0), np.diff(place_E, append=count)


def likely_ids(place: float, size: float, *, spread: float = 0.0) -> Range:
    """Where the first word of the id of an ascending place lies if ids are hashes: eight standard deviations wide.

    Ids of other kinds may lie elsewhere: then `locate` asks about all of them.

    Args:
        place: among `size` ids.
        size: how many there are.
        spread: standard deviation of `place` and `size`.
    """
    size = max(1.0, size)
    share = min(1.0, max(0.0, (place + 1) / (size + 1)))
    width = 8 * math.sqrt(share * (1 - share) / size) + 8 * (1 + spread) / size
    low, high = (int(min(1.0, max(0.0, edge)) * 2.0**WORD_BITS) for edge in (share - width, share + width))
    return Range(min(low, ALL_WORDS.high), min(high, ALL_WORDS.high))


def narrow(rank: int, size: int, asked: Range, counts: Sequence[RangeCounts]) -> Located | Range:
    """The value of an ascending rank, or a smaller range that it lies in.

    Args:
        rank: among all rows that answered.
        size: how many there must be.
        asked: the range that was asked about.
        counts: the answers of all shards.

    Raises:
        IntegrityError: other rows answered than those that were summarised.
    """
    below_S, low_S, inside_S, high_S, above_S = np.array(
        [(one.below, one.at_low, one.inside.count, one.at_high, one.above) for one in counts], np.int64
    ).T
    if (total := int((below_S + low_S + inside_S + high_S + above_S).sum())) != size:
        raise IntegrityError(f"search for rank {rank}: {total} rows answered, expected {size}: the scores have changed")
    place = rank - int(below_S.sum())
    num_low, num_inside, num_high = (int(num_S.sum()) for num_S in (low_S, inside_S, high_S))
    if not 0 <= place < num_low + num_inside + num_high:
        if asked == asked.widest:
            raise IntegrityError(f"search for rank {rank}: it is not among all {size} rows: the scores have changed")
        return asked.widest
    if place < num_low:
        return Located(asked.low, below_S, low_S, inside_S + high_S + above_S)
    if place >= num_low + num_inside:
        return Located(asked.high, below_S + low_S + inside_S, high_S, above_S)
    inside = [one.inside for one in counts]
    if not all(one.is_complete for one in inside):
        return _Known.of(inside).enclose(place - num_low)
    all_inside = np.concatenate([one.values for one in inside if one.count])
    value = np.partition(all_inside, place - num_low)[place - num_low].item()
    ends = [np.searchsorted(one.values, [value], side) for one in inside for side in ("left", "right")]
    first_S, last_S = np.concatenate(ends).reshape(-1, 2).T
    following = [one.next_words_between(first, last) for one, first, last in zip(inside, first_S, last_S)]
    told = [words for words in following if words is not None]
    return Located(
        value + 0,
        below_S + low_S + first_S,
        last_S - first_S,
        inside_S - last_S + high_S + above_S,
        told if len(told) == len(following) else None,
    )


def locate(targets: Mapping[Any, Target], ask: Ask) -> dict[Any, list[Located]]:
    """The words of every searched row: its score and, where ties are cut, both words of its pair_id.

    All rows are searched for in the same rounds.

    Args:
        targets: by the key of their queries.
        ask: sends queries to every shard.

    Raises:
        IntegrityError: the rows change between two rounds.
        UserError: rows of one score and one pair_id straddle a cut.
    """
    found: dict[Any, list[Located]] = {key: [] for key in targets}
    asked: dict[Any, list[RangeQuery]] = {}
    for key, one in targets.items():
        asked[key] = [RangeQuery(one.start)]
        if one.ids is not None:
            asked[key].append(RangeQuery(one.ids, (one.start.low,)))
    while asked:
        replies = ask(asked)
        turns = {
            key: [_advance(targets[key], found[key], queries, [reply[key] for reply in replies])]
            for key, queries in asked.items()
        }
        asked = {key: [query for query in queries if query is not None] for key, queries in turns.items()}
        asked = {key: queries for key, queries in asked.items() if queries}
    return found


def _advance(
    one: Target, found: list[Located], queries: Sequence[RangeQuery], replies: Sequence[Sequence[RangeCounts]]
) -> RangeQuery | None:
    """Add to `found` the words that one round has told; returns what to ask next, None when the row is known."""
    for turn, query in enumerate(queries):
        step = narrow(one.rank(found), _size(one, found), query.range, [reply[turn] for reply in replies])
        if isinstance(step, Range):
            return RangeQuery(step, query.prefix)
        found.append(step)
        if not one.is_met(found) and step.next_words is not None:
            told = [RangeCounts.all_of(Summary(len(words), np.sort(words))) for words in step.next_words]
            last = narrow(one.rank(found), step.at, ALL_WORDS, told)
            assert isinstance(last, Located), "all of them were told"
            found.append(last)
        if one.is_met(found):
            _require_unique(one, found)
            return None
    prefix = tuple(word.value for word in found)
    is_first_word = len(found) == 1
    return RangeQuery(likely_ids(one.rank(found), found[0].at) if is_first_word else ALL_WORDS, prefix)


def _size(one: Target, found: Sequence[Located]) -> int:
    return found[-1].at if found else one.size


def _require_unique(one: Target, found: Sequence[Located]) -> None:
    if len(found) == 3 and one.rank(found) + 1 < found[-1].at:
        twice = (int(found[1].value) << WORD_BITS) | int(found[2].value)
        raise UserError(
            f"pair_id: {found[-1].at} rows share the pair_id {twice:032x} and their score; pair_ids must be unique"
        )
