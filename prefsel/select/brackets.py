"""One round for a threshold: what lies above, at and between two scores that surely enclose it, and likewise for ids.

    driver                                      shards
    fences  -> ScoreBracket(low, high) ->       answer: rows above, rows at high, the scores between, rows at low
    ties    -> IdBracket(score, low, high) ->   answer: tied rows whose id is below, the ids between

Scores are enclosed for certain. Ids are hashes, so where their threshold lies is a guess eight standard deviations
wide; when it fails, as it may for ids of other kinds, the digits of the radix search find it.

Suffixes as in `radix`: N rows of a shard, M rows inside, S strata, W = 2 words of an id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefsel.errors import IntegrityError
from prefsel.rules import Label
from prefsel.select import radix
from prefsel.select.fences import Bounds, Bracket

QueryKey = tuple[Label, int]
"""A stratum, and which of its searches: a band asks up to four."""
ALL_TIES = 4096
"""So few tied ids are asked for whole."""
WORD = 1 << radix.WORD_BITS


@dataclass(frozen=True)
class ScoreBracket:
    """A question about the rows of a stratum around two scores."""

    low: float
    high: float
    needs_ids: bool = False


@dataclass(frozen=True)
class Around:
    """Its answer."""

    num_above: int
    num_high: int
    """Rows with exactly the higher score."""
    inside_M: np.ndarray
    """Scores strictly between the two, in any order."""
    num_low: int
    """Rows with exactly the lower score; 0 where the two are one."""


@dataclass(frozen=True)
class IdBracket:
    """A question about the rows of a stratum with one score, around the first words of two ids."""

    score: float
    low: int
    high: int
    """First words, the last one included."""
    most_inside: int
    """Ids of a shard that are worth sending: twice what hashes would give."""
    needs_ids: bool = True


@dataclass(frozen=True)
class Tied:
    """Its answer."""

    num_below: int
    inside_MW: np.ndarray | None
    """Ids between the two, `>u8`; None: too many, the guess was wrong."""


NO_SCORES, NO_IDS = Around(0, 0, np.empty(0), 0), Tied(0, np.empty((0, 2), ">u8"))
"""Of a shard without the stratum that is asked about."""


# ------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class Scan:
    """The rows of a shard against brackets, one for each stratum."""

    is_above_N: np.ndarray
    row_M: np.ndarray
    """Rows from the lower to the higher score of their stratum, ascending."""
    score_M: np.ndarray
    code_M: np.ndarray | None
    high_M: np.ndarray
    """Whether each of them has exactly the higher score."""
    low_M: np.ndarray
    """Or exactly the lower one."""


def scan(score_N: np.ndarray, low_S: np.ndarray, high_S: np.ndarray, code_N: np.ndarray | None) -> Scan:
    """One pass over the scores of a shard, a block at a time.

    Args:
        score_N: float64, finite.
        low_S: lower scores by stratum, and one for code −1 at the end; inf for strata that are not asked about.
        high_S: higher ones.
        code_N: stratum of each row; None: all rows are of the first.
    """
    is_above_N, is_open_N = np.empty(len(score_N), bool), np.empty(len(score_N), bool)
    for block in radix.blocks(len(score_N), 2 * radix.BLOCK):
        code_B = 0 if code_N is None else code_N[block]
        np.greater(score_N[block], high_S[code_B], out=is_above_N[block])
        np.greater_equal(score_N[block], low_S[code_B], out=is_open_N[block])
    is_open_N ^= is_above_N
    row_M = np.flatnonzero(is_open_N)
    score_M, code_M = score_N[row_M], None if code_N is None else code_N[row_M]
    high_M = score_M == high_S[0 if code_M is None else code_M]
    low_M = (score_M == low_S[0 if code_M is None else code_M]) & ~high_M
    return Scan(is_above_N, row_M, score_M, code_M, high_M, low_M)


def limits(
    brackets: Mapping[QueryKey, ScoreBracket], number: int, labels: Sequence[Label]
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and higher scores by stratum for `scan`, [S + 1], of the brackets with one search number."""
    low_S, high_S = np.full(len(labels) + 1, np.inf), np.full(len(labels) + 1, np.inf)
    for place, label in enumerate(labels):
        if (label, number) in brackets:
            low_S[place], high_S[place] = brackets[label, number].low, brackets[label, number].high
    return low_S, high_S


def arounds(found: Scan, code_N: np.ndarray | None, labels: Sequence[Label]) -> dict[Label, Around]:
    """The answers of a shard that was scanned, by stratum."""
    inside_M = ~(found.high_M | found.low_M)
    if found.code_M is None or code_N is None:
        above, high, low = map(np.count_nonzero, (found.is_above_N, found.high_M, found.low_M))
        return {labels[0]: Around(int(above), int(high), found.score_M[inside_M], int(low))}
    rows_of = (code_N[found.is_above_N], found.code_M[found.high_M], found.code_M[found.low_M])
    above_S, high_S, low_S = (np.bincount(code_K, minlength=len(labels)).tolist() for code_K in rows_of)
    code_M, score_M = found.code_M[inside_M], found.score_M[inside_M]
    return {
        label: Around(above_S[place], high_S[place], score_M[code_M == place], low_S[place])
        for place, label in enumerate(labels)
    }


def split_ids(
    ids_NW: np.ndarray, row_M: np.ndarray, low_M: np.ndarray | np.uint64, high_M: np.ndarray | np.uint64
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the first word of the id of each tied row is below its bracket, and whether it is inside."""
    first_M = ids_NW[:, 0][row_M].astype(np.uint64)
    is_below_M = first_M < low_M
    is_inside_M = first_M <= high_M
    is_inside_M ^= is_below_M
    return is_below_M, is_inside_M


def tied(bracket: IdBracket, num_below: int, inside_MW: np.ndarray) -> Tied:
    """The answer of a shard whose rows were split."""
    return Tied(num_below, inside_MW if len(inside_MW) <= bracket.most_inside else None)


# ------------------------------------------------------------------------------------------------------- driver

Ask = Callable[[dict[QueryKey, ScoreBracket | IdBracket]], Sequence[Mapping[QueryKey, object]]]


def locate_scores(
    searches: Mapping[QueryKey, radix.Search], bounds: Mapping[Label, Bounds], ask: Ask
) -> dict[QueryKey, radix.Search]:
    """Searches whose score one round has found; not those whose bracket holds too many rows, or has no bounds.

    Args:
        searches: not begun.
        bounds: by stratum.
        ask: sends questions to every shard; one mapping of answers per shard, in any order.

    Raises:
        IntegrityError: the rows that answered are not those of the bounds.
    """
    brackets: dict[QueryKey, Bracket] = {}
    for key, search in searches.items():
        if (known := bounds.get(key[0])) is not None:
            rank = known.num_rows - 1 - search.rank if search.descending else search.rank
            bracket = known.bracket(rank)
            if bracket.most_inside <= search.max_candidates:
                brackets[key] = bracket
    if not brackets:
        return {}
    replies = ask({key: ScoreBracket(bracket.low, bracket.high) for key, bracket in brackets.items()})
    found = {}
    for key, bracket in brackets.items():
        answers = [reply[key] for reply in replies]
        assert all(isinstance(answer, Around) for answer in answers)
        found[key] = _at_score(searches[key], bracket, bounds[key[0]].num_rows, answers)  # type: ignore[arg-type]
    return found


def _at_score(search: radix.Search, bracket: Bracket, num_rows: int, answers: Sequence[Around]) -> radix.Search:
    """The search once its score is known: ranks are now among the rows that tie with it."""
    num_above, num_high, num_low = (
        sum(getattr(answer, name) for answer in answers) for name in ("num_above", "num_high", "num_low")
    )
    inside_M = np.concatenate([answer.inside_M for answer in answers])
    num_below = num_rows - num_above - num_high - len(inside_M) - num_low
    rank = num_rows - 1 - search.rank if search.descending else search.rank
    place = rank - num_below
    if num_below < 0 or not 0 <= place < num_low + len(inside_M) + num_high:
        raise IntegrityError(f"search for rank {rank} of {num_rows}: the rows are not those of the committed fences")
    if place < num_low:
        score, less, size = bracket.low, num_below, num_low
    elif place < num_low + len(inside_M):
        score = float(np.partition(inside_M, place - num_low)[place - num_low])
        less = num_below + num_low + int(np.count_nonzero(inside_M < score))
        size = int(np.count_nonzero(inside_M == score))
    else:
        score, less, size = bracket.high, num_below + num_low + len(inside_M), num_high
    key = int(radix.order_keys(np.array([score]))[0])
    before = num_rows - less - size if search.descending else less
    return replace(
        search,
        rank=search.rank - before,
        known=radix.WORD_BITS,
        prefix=key ^ int(radix.ALL_ONES) if search.descending else key,
        size=size,
    )


def locate_ids(searches: Mapping[QueryKey, radix.Search], ask: Ask) -> dict[QueryKey, radix.Search]:
    """The searches, further on where the score is known and its ties are cut: their id, if the guess was right.

    Args:
        searches: begun, or done.
        ask: as of `locate_scores`.
    """
    brackets = {
        key: id_bracket(search)
        for key, search in searches.items()
        if search.known == radix.WORD_BITS and not search.is_done
    }
    if not brackets:
        return dict(searches)
    replies = ask(dict(brackets))
    return {
        key: _at_id(search, [reply[key] for reply in replies]) if key in brackets else search  # type: ignore[misc]
        for key, search in searches.items()
    }


def id_bracket(search: radix.Search) -> IdBracket:
    """Where the id of the searched row surely lies when ids are uniform: eight standard deviations to either side."""
    score, size = radix.found_score(search), search.size
    assert size is not None, "the score is known, and how many rows have it"
    if size <= ALL_TIES:
        return IdBracket(score, 0, WORD - 1, ALL_TIES)
    share = (search.rank + 1) / (size + 1)
    width = 8 * math.sqrt(share * (1 - share) / size) + 8 / size
    low, high = max(0.0, share - width), min(1.0, share + width)
    return IdBracket(score, int(low * WORD), min(WORD - 1, int(high * WORD)), ALL_TIES + int(2 * (high - low) * size))


def _at_id(search: radix.Search, answers: Sequence[Tied]) -> radix.Search:
    given = [answer.inside_MW for answer in answers if answer.inside_MW is not None]
    num_below = sum(answer.num_below for answer in answers)
    ids_MW = np.concatenate(given).astype(np.uint64) if given else np.empty((0, 2), np.uint64)
    place = search.rank - num_below
    if len(given) < len(answers) or not 0 <= place < len(ids_MW):
        return search  # ids that are no hashes
    order_M = np.lexsort((ids_MW[:, 1], ids_MW[:, 0]))
    words = [int(word) for word in ids_MW[order_M[place]]]
    is_equal_M = (ids_MW[:, 0] == np.uint64(words[0])) & (ids_MW[:, 1] == np.uint64(words[1]))
    prefix = (search.prefix << 2 * radix.WORD_BITS) | (words[0] << radix.WORD_BITS) | words[1]
    size = int(is_equal_M.sum())
    before = num_below + int(np.flatnonzero(is_equal_M[order_M])[0])
    found = replace(search, rank=search.rank - before, known=3 * radix.WORD_BITS, prefix=prefix, size=size)
    radix.require_unique(found)
    return found
