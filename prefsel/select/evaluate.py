"""A plan applied to shards: the thresholds of every leaf from counting rounds, then the mask of the rows it keeps.

    decide_leaf (driver)  -- ShardQuery -->  answer (each shard)  ->  Thresholds      for every leaf
    thresholds  ->  kept (each shard)

The library goes this way over one table (`table.py`), a stage over committed shards. N: rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.numbers.quantiles import quantiles
from prefsel.numbers.ranges import Queries, Replies, Summary
from prefsel.numbers.shard_values import ShardValues
from prefsel.pairs.rows import Rows
from prefsel.rules import Above, Between, Label, Quota
from prefsel.select.compose import CompiledRule, Keep, Node
from prefsel.select.thresholds import Decided, Thresholds, decide, keep, label_text


@dataclass(frozen=True)
class ShardQuery:
    """What the driver wants to know of every shard about one leaf."""

    leaf: Keep
    length_edges: tuple[float, ...] | None = None
    """Of strata by `length_bin`, once they are known."""
    is_length: bool = False
    """About the differences in length rather than the score."""
    queries: Queries | None = None
    """None: Summaries by stratum."""

    @property
    def needs_ids(self) -> bool:
        """Whether a shard must read its pair_ids to answer."""
        return any(query.needs_ids for asked in (self.queries or {}).values() for query in asked)


AskLeaf = Callable[[ShardQuery], Sequence[Mapping[Any, Any]]]
"""Sends it to every shard, and returns the answers, always in the same order of shards."""


def answer(asked: ShardQuery, rows: Rows) -> Mapping[Any, Any]:
    """What one shard says: Summaries by stratum, or answers by query."""
    leaf = asked.leaf
    if asked.is_length:
        values = ShardValues(rows.length_gaps([leaf.column, *leaf.population]))
    else:
        values, _ = rows.select(
            leaf.column, leaf.population, by=leaf.by, length_edges=asked.length_edges, ids=asked.needs_ids
        )
    return values.summaries() if asked.queries is None else values.answer(asked.queries)


def decide_leaf(leaf: Keep, ask: AskLeaf, *, committed: Mapping[Label, Sequence[Summary]] | None = None) -> Decided:
    """The thresholds of one leaf over the corpus.

    Args:
        leaf: of a plan.
        ask: to every shard (`answer`).
        committed: the Summaries of its scores by stratum, when they are known without asking.

    Raises:
        UserError: as of `thresholds.decide`.
    """
    if isinstance(leaf.rule, Above) or (isinstance(leaf.rule, Between) and not leaf.by):
        return decide(leaf.rule, {}, lambda queries: [])
    edges = _length_edges(leaf, ask)
    asked = ShardQuery(leaf, edges)
    summaries = committed if committed is not None else by_label(ask(asked))
    found = decide(leaf.rule, summaries or {(): []}, ask_about(asked, ask))
    return replace(found, thresholds=replace(found.thresholds, length_edges=edges))


def ask_about(asked: ShardQuery, ask: AskLeaf) -> Callable[[Queries], Sequence[Replies]]:
    """Queries of `numbers.order` as questions about one leaf."""
    return lambda queries: ask(replace(asked, queries=queries))


def by_label(replies: Sequence[Mapping[Label, Summary]]) -> dict[Label, list[Summary]]:
    """The Summaries that shards answered with, by stratum."""
    found: dict[Label, list[Summary]] = {}
    for reply in replies:
        for label, summary in reply.items():
            found.setdefault(label, []).append(summary)
    return found


def _length_edges(leaf: Keep, ask: AskLeaf) -> tuple[float, ...] | None:
    rule = leaf.rule
    if not isinstance(rule, Quota) or "length_bin" not in rule.by:
        return None
    asked = ShardQuery(leaf, is_length=True)
    summaries = by_label(ask(asked))
    if not sum(one.count for one in summaries[()]):
        return (0.0,) * (rule.length_bins - 1)
    wanted = {place: ((), place / rule.length_bins) for place in range(1, rule.length_bins)}
    return tuple(edge.value for edge in quantiles(wanted, summaries, ask_about(asked, ask)).values())


def kept(node: Node, thresholds: Sequence[Thresholds], rows: Rows) -> np.ndarray:
    """Which rows of a shard a node of a plan keeps, bool [N].

    Args:
        node: a leaf, or an intersection.
        thresholds: of all leaves of the plan, by number.
        rows: of the shard, with pair_ids when a leaf's `needs_ids`.
    """
    if isinstance(node, Keep):
        found = thresholds[node.number]
        scores, row_M = rows.select(
            node.column, node.population, by=node.by, length_edges=found.length_edges, ids=found.needs_ids
        )
        is_kept_M = keep(found, scores)
        is_kept_M = ~is_kept_M if node.is_complement else is_kept_M
        return is_kept_M if row_M is None else _scattered(row_M[is_kept_M], rows.num_rows)
    is_kept_N = kept(node.parts[0], thresholds, rows)
    for part in node.parts[1:]:
        is_kept_N &= kept(part, thresholds, rows)
    if node.is_complement:
        row_M = rows.rows_with(node.population)
        is_there_N = np.ones(rows.num_rows, bool) if row_M is None else _scattered(row_M, rows.num_rows)
        return is_there_N & ~is_kept_N
    return is_kept_N


def _scattered(row_M: np.ndarray, num_rows: int) -> np.ndarray:
    is_in_N = np.zeros(num_rows, bool)
    is_in_N[row_M] = True
    return is_in_N


def flipped(plan: CompiledRule, rows: Rows, row_K: np.ndarray) -> np.ndarray | None:
    """Which of some kept rows have their label turned, bool [K]; None where the rule turns none.

    Args:
        plan: of the rule.
        rows: of the shard, with the score that turns.
        row_K: the kept rows, ascending.
    """
    return None if plan.flips is None else rows.scores[plan.flips][row_K] < 0


def stratum_names(plan: CompiledRule, thresholds: Sequence[Thresholds], rows: Rows, row_K: np.ndarray) -> pa.Array:
    """The stratum of some kept rows, text [K]; that of an intersection is the corpus."""
    node = plan.keep
    if not isinstance(node, Keep) or not node.by:
        return pa.repeat(pa.scalar(label_text(())), len(row_K))
    edges = thresholds[node.number].length_edges
    values, row_M = rows.select(node.column, node.population, by=node.by, length_edges=edges)
    assert values.code_N is not None, "a leaf with columns of strata has strata"
    place_K = row_K if row_M is None else np.searchsorted(row_M, row_K)
    names = pa.array([label_text(label) for label in values.labels], pa.string())
    return names.take(pa.array(values.code_N[place_K]))
