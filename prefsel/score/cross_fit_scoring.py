"""Who may score whom: several models that share a corpus, each kept from the prompts it was trained on.

A model that has seen a prompt's label says how well it remembers, not what it would say of new text: a reward model of
an aspect scores the prompts of the other aspects, and of cross-fitted models each prompt goes to the one whose
training left it out. What a model was trained on is read from the file that lies beside its weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefsel.config import CrossFit
from prefsel.ingest.identity import fold_of
from prefsel.schema import TRAINED_ON
from prefsel.score.contract import ScoredShard, join_uses
from prefsel.score.summary import merge_facts


@dataclass(frozen=True)
class FoldModel:
    """A loaded scorer, and the prompts it must not score."""

    scorer: Any
    """Has `begin(groups)`, and `score` that takes what it gives."""
    fold: int | None
    """Scores only the prompts of this fold; None: of all."""
    trained_on: pa.Array
    """prompt_ids, `binary(16)`."""


def trained_on(folder: str | Path) -> pa.Array:
    """The prompts that the model in `folder` must not score; none when it does not say."""
    file = Path(folder) / TRAINED_ON
    if not file.is_file():
        return pa.array([], pa.binary(16))
    return pq.read_table(file)["prompt_id"].combine_chunks().cast(pa.binary(16))


class CrossFitScorer:
    """Gives every group to the one model that may score it, and leaves out those that none may."""

    def __init__(self, candidates: Sequence[FoldModel], cross_fit: CrossFit | None, own_aspect: str | None) -> None:
        """Take over loaded scorers.

        Args:
            candidates: One, or one per fold.
            cross_fit: How prompts are dealt to folds; None: one candidate takes all.
            own_aspect: Leave out prompts whose pairs are all labelled with this aspect; they belong to the training
                data of a model that was not cross-fitted, whether it drew them or not.
        """
        self.candidates, self.cross_fit, self.own_aspect = candidates, cross_fit, own_aspect

    def score(self, groups: pa.Table, pairs: pa.Table | None = None) -> ScoredShard:
        """Columns for all groups, null where no candidate may score; arguments as `begin`."""
        return self.begin(groups, pairs)()

    def begin(self, groups: pa.Table, pairs: pa.Table | None = None) -> Callable[[], ScoredShard]:
        """Deal the groups out and begin to tokenise them; what it returns runs the models.

        Args:
            groups: `schema.GROUPS`.
            pairs: prompt_id and aspect of the shard's pairs; needed with `own_aspect`.
        """
        ids = groups["prompt_id"].combine_chunks()
        is_own_G = np.zeros(len(ids), bool)
        if self.own_aspect is not None and pairs is not None:
            others = pairs.filter(pc.not_equal(pairs["aspect"], self.own_aspect).fill_null(True))
            own = pairs.filter(pc.equal(pairs["aspect"], self.own_aspect).fill_null(False))
            is_own_G = _among(ids, own["prompt_id"]) & ~_among(ids, others["prompt_id"])
        fold_G = fold_of(ids, **self.cross_fit.model_dump()) if self.cross_fit else np.zeros(len(ids), np.int64)
        dropped: Counter[str] = Counter()
        sizes_G = pc.list_value_length(groups["completions"].combine_chunks()).to_numpy()
        dropped["own_aspect"] = int(sizes_G[is_own_G].sum())
        parts: list[tuple[np.ndarray, Any, Any]] = []
        for candidate in self.candidates:
            is_mine_G = ~is_own_G & (candidate.fold is None or fold_G == candidate.fold)
            is_seen_G = is_mine_G & _among(ids, candidate.trained_on)
            dropped["trained_on"] += int(sizes_G[is_seen_G].sum())
            row_M = np.flatnonzero(is_mine_G & ~is_seen_G)
            scorer = candidate.scorer
            parts.append((row_M, scorer, scorer.begin(groups.take(pa.array(row_M)))))
        return lambda: joined([(row_M, scorer.score(begun)) for row_M, scorer, begun in parts], sizes_G, dropped)


def joined(parts: Sequence[tuple[np.ndarray, ScoredShard]], sizes_G: np.ndarray, dropped: Counter[str]) -> ScoredShard:
    """Columns of parts of a shard as columns of the shard, counts added up."""
    first = parts[0][1]
    columns: dict[str, Any] = {
        name: [[None] * int(size) for size in sizes_G] for name in dict.fromkeys(n for _, s in parts for n in s.columns)
    }
    counters: defaultdict[str, float] = defaultdict(float)
    for row_M, shard in parts:
        for name, values in shard.columns.items():
            for row, value in zip(row_M.tolist(), values):
                columns[name][row] = value
        dropped.update(shard.dropped)
        for counter, count in shard.counters.items():
            counters[counter] += count
    return replace(
        first,
        columns=columns,
        dropped={reason: count for reason, count in dropped.items() if count},
        counters=dict(counters),
        poisoned=[one for _, shard in parts for one in shard.poisoned],
        padded_because=next((s.padded_because for _, s in parts if s.padded_because), ""),
        template_error=next((s.template_error for _, s in parts if s.template_error), ""),
        facts=merge_facts(shard.facts for _, shard in parts),
        template=join_uses(shard.template for _, shard in parts),
        same_as={int(row_M[row]): places for row_M, shard in parts for row, places in shard.same_as.items()},
    )


def _among(ids: pa.Array, wanted: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return pc.is_in(ids, value_set=pa.array(wanted.to_pylist(), pa.binary(16))).to_numpy(zero_copy_only=False)
