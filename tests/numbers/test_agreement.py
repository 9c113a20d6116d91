from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefsel.numbers.agreement import agreement

MARGINS = st.lists(st.floats(-30, 30) | st.just(0.0), min_size=1, max_size=60)


@given(MARGINS)
def test_ties_count_half_in_numpy_and_torch_alike(margins: list[float]) -> None:
    """A tie is decided by a coin: the mean over both outcomes of every tie is the accuracy."""
    wins = sum(margin > 0 for margin in margins)
    ties = sum(margin == 0 for margin in margins)
    expected = (wins + (wins + ties)) / 2 / len(margins)
    assert agreement(np.array(margins)).mean() == pytest.approx(expected)
    assert agreement(torch.tensor(margins, dtype=torch.float64)).mean().item() == pytest.approx(expected)


def test_a_policy_that_is_its_reference_is_a_coin() -> None:
    assert agreement(np.zeros(7)).mean() == 0.5
    assert agreement(np.array([-0.0, 0.0, 1e-300, -1e-300, math.inf, -math.inf])).tolist() == [0.5, 0.5, 1, 0, 1, 0]
