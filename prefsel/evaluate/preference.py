"""How well a policy orders held-out pairs: accuracy, margin, loss and calibration of its implicit rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.errors import NonFiniteError
from prefsel.evaluate.intervals import Estimate, Values, estimate
from prefsel.numbers.agreement import agreement
from prefsel.train.calibration import calibration


@dataclass(frozen=True)
class HeldOut:
    """Of a model's margins over held-out pairs; normal intervals over prompts, as on the report's page."""

    accuracy: Estimate
    """Share of the pairs that it orders as labelled, a tie as a half."""
    margin: Estimate
    """In nats, times beta."""
    loss: Estimate
    """ln(1 + exp(−margin)), the loss of DPO."""
    calibration_error: float
    """See `prefsel.train.calibration.calibration`."""
    bins: list[dict[str, Any]]
    """Its table."""


def margins_of(margins: pa.Table, when: str = "after") -> Values:
    """The margins of a table as `prefsel.train.heldout.MARGINS`, pairs as items; `when`: before, after."""
    return Values(margins["pair_id"].to_pylist(), margins["prompt_id"].to_pylist(), margins[when].to_numpy())


def agreements(margins: Values) -> Values:
    """1 for every pair that is ordered as labelled, 0.5 for a tie, 0 otherwise."""
    return Values(margins.items, margins.prompts, agreement(margins.value_N))


def held_out(margins: Values) -> HeldOut | None:
    """The numbers of held-out margins, "chosen is better" above 0; None without a pair.

    Raises:
        NonFiniteError: A margin is NaN or infinite; names the pairs.
    """
    bad = np.flatnonzero(~np.isfinite(margins.value_N))
    if len(bad):
        named = [margins.items[pair] for pair in bad[:5]]
        raise NonFiniteError(f"held-out margins: {len(bad)} are NaN or infinite, first of pairs {named}")
    losses = Values(margins.items, margins.prompts, np.logaddexp(0.0, -margins.value_N))
    accuracy, margin, loss = (estimate(one.value_N, one.prompts) for one in (agreements(margins), margins, losses))
    if accuracy is None or margin is None or loss is None:
        return None
    table = calibration(margins.value_N)
    return HeldOut(accuracy, margin, loss, table["expected_error"], table["bins"])
