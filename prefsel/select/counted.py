"""How many rows of each shard a top or a quota keeps, from what the shards said when its cut was sought.

    rounds about a leaf ──▶ Heard ──▶ rows kept of every shard, without reading any of them again

Counting was a pass of its own over the scores, and over the pair_ids where a threshold ties. A shard that answered for
brackets has said all of it. Rounds of digits, which speak of one bin only, have not: then the rows are counted.

Suffixes as in `brackets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefsel.rules import Label
from prefsel.select import radix
from prefsel.select.brackets import Around, IdBracket, QueryKey, ScoreBracket, Tied
from prefsel.select.cuts import Cut, Threshold


@dataclass
class Heard:
    """The questions about one leaf, and the answers of every shard, in corpus order."""

    brackets: dict[QueryKey, ScoreBracket] = field(default_factory=dict)
    scores: list[Mapping[QueryKey, Around]] = field(default_factory=list)
    ids: list[Mapping[QueryKey, Tied]] = field(default_factory=list)
    is_complete: bool = True
    """Whether nothing else was asked."""

    def note(self, queries: Mapping[QueryKey, Any] | None, replies: Sequence[Mapping[Any, Any]]) -> None:
        """Remember one round."""
        kinds = {type(query) for query in (queries or {}).values()}
        if queries and kinds == {ScoreBracket}:
            self.brackets, self.scores = dict(queries), list(replies)
        elif kinds == {IdBracket}:
            self.ids = list(replies)
        else:
            self.is_complete = False

    def num_kept(self, cut: Cut, sizes: Sequence[Mapping[Label, int]]) -> list[int] | None:
        """Rows kept of every shard; None: the answers do not say.

        Args:
            cut: that the rounds ended with, of a top or a quota.
            sizes: rows of each shard by stratum.
        """
        given = {label: one for label, one in cut.thresholds.items() if one is not None}
        if not self.is_complete or cut.edges is not None or (given and not self.scores):
            return None
        return [sum(self._of(shard, *one, sizes[shard]) for one in given.items()) for shard in range(len(sizes))]

    def _of(self, shard: int, label: Label, last: Threshold, sizes: Mapping[Label, int]) -> int:
        key = (label, 0)
        bracket, around = self.brackets[key], self.scores[shard][key]
        above = around.num_above + int(np.count_nonzero(around.inside_M > last.score))
        above += around.num_high if bracket.high > last.score else 0
        if last.score in (bracket.high, bracket.low):
            num_tied = around.num_high if last.score == bracket.high else around.num_low
        else:
            num_tied = int(np.count_nonzero(around.inside_M == last.score))
        before = above if last.descending else sizes.get(label, 0) - above - num_tied
        return before + (num_tied if last.pair_id is None else _up_to(self.ids[shard][key], last.pair_id))


def _up_to(answer: Tied, pair_id: int) -> int:
    assert answer.inside_MW is not None, "a wrong guess is followed by digits"
    first, second = (np.uint64(word) for word in divmod(pair_id, 1 << radix.WORD_BITS))
    first_M, second_M = answer.inside_MW[:, 0], answer.inside_MW[:, 1]
    return answer.num_below + int(np.count_nonzero((first_M < first) | ((first_M == first) & (second_M <= second))))
