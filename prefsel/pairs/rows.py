"""The pairs of a shard as rules read them: scores by column, and what tells strata and duplicates apart.

N: rows of the shard. M: those that have all the scores asked for. W = 2 words of an id, K words of a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.errors import UserError
from prefsel.numbers.columns import strata
from prefsel.numbers.shard_values import ShardValues
from prefsel.rules import Label


@dataclass(frozen=True)
class Rows:
    """All pairs of one shard, or of a whole table, in order; those that cannot be selected included."""

    scores: Mapping[str, np.ndarray]
    """Column → float64 [N], finite, NaN where the pair has no score."""
    ids_NW: np.ndarray | None = None
    """pair_ids as two big-endian words."""
    texts: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)
    """`source` and `aspect`, as far as strata need them."""
    lengths: tuple[np.ndarray, np.ndarray] | None = None
    """|y_w| and |y_l| in the length unit, float64 [N] each, NaN where unknown; as far as strata need them."""
    keys: Mapping[str, np.ndarray] = field(default_factory=dict)
    """`prompt`, `pair` → uint64 [N, K], equal for what a dedupe keeps one of."""
    complete_columns: frozenset[str] = frozenset()
    """Columns known to have a score in every row."""
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What `select` found before: a search asks for the same rows several times."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(next(iter(self.scores.values())))

    def with_score(self, column: str, score_N: np.ndarray) -> Rows:
        """The same rows with one more score."""
        return replace(self, scores={**self.scores, column: score_N})

    def rows_with(self, columns: Sequence[str]) -> np.ndarray | None:
        """The rows, int64 [M], that have all of these scores; None: all rows have."""
        partly = [column for column in columns if column not in self.complete_columns]
        if not partly:
            return None
        is_there_N = ~np.isnan(self.scores[partly[0]])
        for column in partly[1:]:
            is_there_N &= ~np.isnan(self.scores[column])
        return np.flatnonzero(is_there_N)

    def select(
        self,
        column: str,
        population: Sequence[str],
        *,
        by: Sequence[str] = (),
        length_edges: tuple[float, ...] | None = None,
        ids: bool = False,
    ) -> tuple[ShardValues, np.ndarray | None]:
        """One score of the rows that have all scores of `population` and this one, and which rows these are.

        Args:
            column: the score.
            population: other scores the rows must have.
            by: columns of the strata.
            length_edges: inner edges of the bins of `length_bin`.
            ids: also the pair_ids.
        """
        asked = (column, tuple(population), tuple(by), length_edges, ids)
        if asked not in self.memo:
            self.memo[asked] = self._select(column, population, by, length_edges, ids)
        return self.memo[asked]

    def _select(
        self, column: str, population: Sequence[str], by: Sequence[str], edges: tuple[float, ...] | None, ids: bool
    ) -> tuple[ShardValues, np.ndarray | None]:
        row_M = self.rows_with([column, *population])
        taken = slice(None) if row_M is None else row_M
        codes, labels = self._strata(by, edges, row_M) if by else (None, [()])
        words = self.ids_NW[taken] if ids and self.ids_NW is not None else None
        return ShardValues(self.scores[column][taken], words, codes, labels), row_M

    @property
    def gap_N(self) -> np.ndarray:
        """| |y_w| − |y_l| |, float64, NaN where unknown."""
        assert self.lengths is not None, "whoever asks for lengths has read them"
        with np.errstate(over="ignore"):  # an error in `length_gaps`, with names
            return np.abs(self.lengths[0] - self.lengths[1])

    def length_gaps(self, columns: Sequence[str]) -> np.ndarray:
        """The known differences in length of the rows that have all of these scores.

        Raises:
            UserError: a difference overflows.
        """
        row_M = self.rows_with(columns)
        gap_M = self.gap_N if row_M is None else self.gap_N[row_M]
        if (is_huge_M := np.isinf(gap_M)).any():
            row = int(np.flatnonzero(is_huge_M)[0] if row_M is None else row_M[is_huge_M][0])
            chosen, rejected = (length_N[row] for length_N in self.lengths or ())
            raise UserError(
                f"length_bin: the difference of two lengths overflows in {is_huge_M.sum()} rows, first in row {row}: "
                f"num_tokens_chosen {chosen:g}, num_tokens_rejected {rejected:g}; lengths are numbers of tokens"
            )
        return gap_M[~np.isnan(gap_M)]

    def _strata(
        self, by: Sequence[str], length_edges: tuple[float, ...] | None, row_M: np.ndarray | None
    ) -> tuple[np.ndarray, list[Label]]:
        columns = []
        for name in by:
            if name == "length_bin":
                assert length_edges is not None, "edges come before strata"
                columns.append(length_bins(self.gap_N if row_M is None else self.gap_N[row_M], length_edges))
            else:
                columns.append(self.texts[name] if row_M is None else self.texts[name].take(pa.array(row_M)))
        return strata(columns)


def length_bins(gap_M: np.ndarray, edges: Sequence[float]) -> pa.ChunkedArray:
    """The bin of each value as text, counted from 1: one more than the number of inner edges at or below it.

    Null where the value is NaN. Names are padded with zeros, so that they sort as the bins do.
    """
    width = len(str(len(edges) + 1))
    names = pa.array([f"length-{place + 1:0{width}d}" for place in range(len(edges) + 1)])
    bin_M = np.searchsorted(np.asarray(edges), gap_M, side="right")
    return pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array(bin_M, mask=np.isnan(gap_M)), names)])
