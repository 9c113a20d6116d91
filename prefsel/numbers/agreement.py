"""How far margins agree with their labels: what every accuracy in the package is the mean of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Numbers = TypeVar("Numbers", "Tensor", npt.NDArray[Any])


def agreement(margins: Numbers) -> Numbers:
    """How far the sign of a margin agrees with a label that says "chosen is better"; its mean is the accuracy.

    A tie is no verdict and counts half, as a coin would: a policy that still equals its reference has an accuracy of
    one half, not of zero.

    Args:
        margins: Any shape, numpy or torch.

    Returns:
        1.0 where the margin is above 0, 0.5 where it is 0, 0.0 where it is below (or NaN).
    """
    return ((margins > 0) * 1.0 + (margins >= 0) * 1.0) / 2
