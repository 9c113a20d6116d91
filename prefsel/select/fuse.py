"""Derived scores: one number per pair from several scores, with statistics of the whole population.

    statistics (each shard)  ->  fit (driver)  ->  derive (each shard)

What ranks decide takes positions instead of statistics (`ranks.py`). N: rows of a shard. M: those in the population.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from prefsel.errors import NonFiniteError, UserError
from prefsel.metrics.random_control import RandomControl
from prefsel.metrics.random_control import score as random_score
from prefsel.numbers.moments import Moments, merge_moments, standardise
from prefsel.pairs.rows import Rows
from prefsel.select.compose import Derived
from prefsel.select.ranks import doubled_ranks, weighted_ranks

MIDDLE = 50.0
"""Percentile that an intersection with a budget keeps the nearest pairs of."""
Partial: TypeAlias = Mapping[str, Moments]
"""Of one shard, by column."""
Fitted: TypeAlias = Mapping[str, Any]
"""Of the population, by column: moments as numbers; of ranks the count."""


def statistics(step: Derived, rows: Rows) -> Partial:
    """What one shard says about the population, for z-scores."""
    row_M = rows.rows_with(step.population)
    taken = slice(None) if row_M is None else row_M
    return {column: Moments.of(rows.scores[column][taken]) for column in step.scores}


def fit(step: Derived, parts: Sequence[Partial]) -> Fitted:
    """The statistics of the population, from all shards in corpus order; None of an empty one.

    Raises:
        UserError: a score is the same for all pairs, so that it has no z-score, or its moments overflow.
    """
    fitted: dict[str, Any] = {}
    for column in step.scores:
        moments = merge_moments(part[column] for part in parts)
        if moments.count and moments.is_constant:
            raise UserError(f"rule fuse: {column} is {moments.low:g} for all {moments.count:,} pairs: no z-score")
        if fault := moments.fault():
            raise UserError(f"rule fuse: {column}: {fault}")
        fitted[column] = moments.to_json() if moments.count else None
    return fitted


def derive(step: Derived, fitted: Fitted, rows: Rows, positions: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """The score of every row, float64 [N]; NaN outside the population.

    Args:
        step: how it is made.
        fitted: of the population.
        rows: of the shard.
        positions: int64 [M] by column, where ranks decide.

    Raises:
        NonFiniteError: a sum overflows.
    """
    row_M = rows.rows_with(step.population)
    row_M = np.arange(rows.num_rows) if row_M is None else row_M
    score_N = np.full(rows.num_rows, np.nan)
    if len(row_M):
        with np.errstate(over="ignore", invalid="ignore"):  # an error just below, with names
            found_M = _derived_scores(step, fitted, rows, row_M, positions or {}) + 0.0  # -0.0 is stored as 0.0
        if not np.isfinite(found_M).all():
            raise NonFiniteError(f"{step.label} of {', '.join(step.scores)}: a score is NaN or infinite; scale them")
        score_N[row_M] = found_M
    return score_N


def _derived_scores(
    step: Derived, fitted: Fitted, rows: Rows, row_M: np.ndarray, positions: Mapping[str, np.ndarray]
) -> np.ndarray:
    if step.how == "random":
        assert rows.ids_NW is not None, "whoever shuffles has read the pair_ids"
        return random_score({"pair_id": rows.ids_NW[row_M]}, RandomControl(seed=step.seed), {})
    if step.how == "agree":
        score_KM = np.stack([rows.scores[column][row_M] for column in step.scores])
        low_M, high_M = score_KM.min(axis=0), score_KM.max(axis=0)
        return np.where(low_M > 0, low_M, np.where(high_M < 0, high_M, 0.0))
    if step.how == "zscore":
        terms = [standardise(rows.scores[column][row_M], fitted[column]) for column in step.scores]
        return np.sum([weight * term_M for weight, term_M in zip(step.weights, terms)], axis=0)
    size = fitted[step.scores[0]]["count"]
    doubled = [doubled_ranks(positions[column], size) for column in step.scores]
    if step.how == "middle":
        # |pct − 50| = 50 · |doubled rank − size| / size: whole numbers, rounded once, so that equal distances tie.
        return -MIDDLE * np.max([np.abs(rank_M - size) for rank_M in doubled], axis=0) / size
    return weighted_ranks(doubled, step.weights, size)
