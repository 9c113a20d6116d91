from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from prefsel.errors import NonFiniteError
from prefsel.evaluate.intervals import Values
from prefsel.evaluate.preference import agreements, held_out, margins_of
from prefsel.train.heldout import MARGINS

TABLE = pa.table(
    {
        "pair_id": ["a", "b", "c", "d"],
        "prompt_id": ["p", "p", "q", "r"],
        "before": [0.0] * 4,
        "after": [1.0, -2.0, 0.0, 3.0],
    },
    schema=MARGINS,
)


def test_numbers_of_four_pairs() -> None:
    found = held_out(margins_of(TABLE))
    assert found is not None
    assert found.accuracy.mean == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.margin.mean == pytest.approx(0.5)
    assert found.loss.mean == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in (1, -2, 0, 3)) / 4)
    assert (found.margin.num_items, found.margin.num_prompts) == (4, 3)
    # Confidences 0.731 right, 0.881 wrong, 0.5 a tie, 0.953 right: each alone in its bin.
    sure = [1 / (1 + math.exp(-abs(m))) for m in (1, -2, 0, 3)]
    assert found.calibration_error == pytest.approx(((1 - sure[0]) + sure[1] + 0 + (1 - sure[3])) / 4)
    assert sum(one["num_pairs"] for one in found.bins) == 4


def test_a_policy_that_equals_its_reference_is_a_coin() -> None:
    assert agreements(margins_of(TABLE, "before")).value_N.tolist() == [0.5] * 4
    found = held_out(margins_of(TABLE, "before"))
    assert found is not None
    assert (found.accuracy.mean, found.accuracy.low, found.accuracy.high) == (0.5, 0.5, 0.5)
    assert found.loss.mean == pytest.approx(math.log(2))


def test_nothing_and_what_is_no_number() -> None:
    assert held_out(Values([], [], np.zeros(0))) is None
    with pytest.raises(NonFiniteError, match=r"2 are NaN or infinite, first of pairs \['b', 'c'\]"):
        held_out(Values(["a", "b", "c"], ["p"] * 3, np.array([0.0, np.nan, np.inf])))
