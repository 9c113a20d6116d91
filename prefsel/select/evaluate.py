"""A plan applied to shards: the cut of every leaf from counting rounds, then the mask of the rows it keeps.

    cut_leaf (driver)  -- Asked -->  answer (each shard)  ->  Cut      for every leaf
    cuts  ->  kept (each shard)

`keep_rows` does all of it, derived scores included, over shards that are in memory: the library's way. A stage goes
the same way with committed shards. N: rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefsel.rules import Above, Label, Quota
from prefsel.select import dedupe as best
from prefsel.select import fuse, radix
from prefsel.select.brackets import QueryKey
from prefsel.select.compose import Derived, Keep, Node, Plan
from prefsel.select.cuts import Cut, Question, ShardScores, decide, keep, label_text, merge_histograms, quantiles, reply
from prefsel.select.fences import Bounds
from prefsel.select.rows import Rows


@dataclass(frozen=True)
class Asked:
    """What the driver wants to know of every shard about one leaf."""

    leaf: Keep
    length_edges: tuple[float, ...] | None = None
    """Of strata by `length_bin`, once they are known."""
    is_length: bool = False
    """About the differences in length rather than the score."""
    queries: Mapping[QueryKey, Question] | None = None
    """None: histograms by stratum."""

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to answer."""
        return any(query.needs_ids for query in (self.queries or {}).values())


AskLeaf = Callable[[Asked], Sequence[Mapping[Any, Any]]]
"""Sends it to every shard, and returns the answers in any order."""


def answer(asked: Asked, rows: Rows) -> Mapping[Any, Any]:
    """What one shard says: histograms by stratum, or answers by query."""
    leaf = asked.leaf
    if asked.is_length:
        scores = ShardScores(rows.known_gaps([leaf.column, *leaf.population]))
    else:
        scores, _ = rows.select(
            leaf.column, leaf.population, by=leaf.by, length_edges=asked.length_edges, ids=asked.needs_ids
        )
    return scores.histograms() if asked.queries is None else reply(asked.queries, scores)


def cut_leaf(
    leaf: Keep,
    ask: AskLeaf,
    *,
    committed: Mapping[Label, radix.Histogram] | None = None,
    bounds: Mapping[Label, Bounds] | None = None,
    max_candidates: int = radix.MAX_CANDIDATES,
) -> Cut:
    """The cut of one leaf over the corpus.

    Args:
        leaf: of a plan.
        ask: to every shard (`answer`).
        committed: its histograms by stratum, when they are known without asking.
        bounds: of its scores by stratum, when they are known.
        max_candidates: see `cuts.decide`.

    Raises:
        UserError: as of `cuts.decide`.
    """
    if isinstance(leaf.rule, Above):
        return decide(leaf.rule, {}, lambda queries: [])
    edges = _length_edges(leaf, ask, max_candidates)
    asked = Asked(leaf, edges)
    histograms = committed if committed is not None else merge_histograms(ask(asked))
    cut = decide(
        leaf.rule,
        histograms or {(): radix.Histogram.merge([])},
        lambda queries: ask(replace(asked, queries=queries)),
        bounds=bounds,
        max_candidates=max_candidates,
    )
    return replace(cut, length_edges=edges)


def _length_edges(leaf: Keep, ask: AskLeaf, max_candidates: int) -> tuple[float, ...] | None:
    rule = leaf.rule
    if not isinstance(rule, Quota) or "length_bin" not in rule.by:
        return None
    asked = Asked(leaf, is_length=True)
    counted = merge_histograms(ask(asked))[()]
    if not counted.total:
        return (0.0,) * (rule.length_bins - 1)
    shares = [place / rule.length_bins for place in range(1, rule.length_bins)]

    def ask_lengths(queries: dict[QueryKey, Any]) -> Sequence[Mapping[QueryKey, Any]]:
        return ask(replace(asked, queries=queries))

    return tuple(quantiles(counted, shares, ask_lengths, max_candidates=max_candidates))


def kept(node: Node, cuts: Sequence[Cut], rows: Rows) -> np.ndarray:
    """Which rows of a shard a node of a plan keeps, bool [N].

    Args:
        node: a leaf, or an intersection.
        cuts: of all leaves of the plan, by number.
        rows: of the shard, with pair_ids when a cut `needs_ids`.
    """
    if isinstance(node, Keep):
        cut = cuts[node.number]
        scores, row_M = rows.select(
            node.column, node.population, by=node.by, length_edges=cut.length_edges, ids=cut.needs_ids
        )
        is_kept_M = keep(cut, scores)
        is_kept_M = ~is_kept_M if node.is_complement else is_kept_M
        return is_kept_M if row_M is None else _scattered(row_M[is_kept_M], rows.num_rows)
    is_kept_N = kept(node.parts[0], cuts, rows)
    for part in node.parts[1:]:
        is_kept_N &= kept(part, cuts, rows)
    if node.is_complement:
        row_M = rows.having(node.population)
        is_there_N = np.ones(rows.num_rows, bool) if row_M is None else _scattered(row_M, rows.num_rows)
        return is_there_N & ~is_kept_N
    return is_kept_N


def _scattered(row_M: np.ndarray, num_rows: int) -> np.ndarray:
    is_in_N = np.zeros(num_rows, bool)
    is_in_N[row_M] = True
    return is_in_N


def stratum_names(plan: Plan, cuts: Sequence[Cut], rows: Rows, row_K: np.ndarray) -> list[str]:
    """The stratum of some kept rows; that of an intersection is the corpus."""
    node = plan.keep
    if not isinstance(node, Keep) or not node.by:
        return [label_text(())] * len(row_K)
    edges = cuts[node.number].length_edges
    scores, row_M = rows.select(node.column, node.population, by=node.by, length_edges=edges)
    assert scores.code_N is not None, "a leaf with columns of strata has strata"
    place_K = row_K if row_M is None else np.searchsorted(row_M, row_K)
    names = [label_text(label) for label in scores.labels]
    return [names[code] for code in scores.code_N[place_K]]


# ------------------------------------------------------------------------------------------------------ in memory


def keep_rows(
    plan: Plan, shards: Sequence[Rows], *, max_candidates: int = radix.MAX_CANDIDATES
) -> tuple[list[np.ndarray], list[Rows]]:
    """Which rows of each shard a rule keeps, bool [N] each, and the shards with their derived scores.

    Args:
        plan: of the rule.
        shards: in corpus order, with the plan's inputs, pair_ids, keys and strata.
        max_candidates: see `cuts.decide`.

    Raises:
        UserError: a score without spread where its z-score is wanted; as of `cuts.decide`.
        NonFiniteError: a derived score overflows.
    """
    for step in plan.derived:
        shards = [rows.with_score(step.column, score_N) for rows, score_N in zip(shards, derived(step, shards))]

    def ask(asked: Asked) -> Sequence[Mapping[Any, Any]]:
        return [answer(asked, rows) for rows in shards]

    cuts = [cut_leaf(leaf, ask, max_candidates=max_candidates) for leaf in plan.leaves]
    return [kept(plan.keep, cuts, rows) for rows in shards], list(shards)


def derived(step: Derived, shards: Sequence[Rows]) -> list[np.ndarray]:
    """One derived score of every shard, float64 [N] each; NaN where a pair has none."""
    if step.how != "best":
        fitted = fuse.fit(step, [fuse.statistics(step, rows) for rows in shards])
        return [fuse.derive(step, fitted, rows) for rows in shards]
    parts = [keyed(step, rows, number, 1)[0] for number, rows in enumerate(shards)]
    drops = best.losers(best.KeyedRows.merge(parts))
    return [best_scores(step, rows, drops.row_M[drops.shard_M == number]) for number, rows in enumerate(shards)]


def keyed(step: Derived, rows: Rows, shard_no: int, num_partitions: int) -> list[best.KeyedRows]:
    """The population of a dedupe in one shard, by partition."""
    assert rows.ids_NW is not None, "whoever dedupes has read the pair_ids"
    row_M = rows.having(step.population)
    row_M = np.arange(rows.num_rows) if row_M is None else row_M
    return best.partition(
        rows.keys[step.by][row_M],
        rows.scores[step.scores[0]][row_M],
        rows.ids_NW[row_M],
        row_M,
        descending=step.descending,
        shard_no=shard_no,
        num_partitions=num_partitions,
    )


def best_scores(step: Derived, rows: Rows, lost_M: np.ndarray) -> np.ndarray:
    """The score of a dedupe, float64 [N]: that of the population without the rows it lost; NaN elsewhere."""
    score_N = np.full(rows.num_rows, np.nan)
    row_M = rows.having(step.population)
    taken = slice(None) if row_M is None else row_M
    score_N[taken] = rows.scores[step.scores[0]][taken]
    score_N[lost_M] = np.nan
    return score_N
