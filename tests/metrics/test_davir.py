"""DavIR by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pair_tables import sided

from prefsel.errors import UserError
from prefsel.metrics import score_table


def table(policy: list[tuple], base: list[tuple]):
    return sided(logps_p=policy, logps_b=base)


def test_relative_gain_of_chosen_less_that_of_rejected() -> None:
    """−10 → −5 is a gain of 0.5, −20 → −15 one of 0.25: the same 5 nats are worth less where more was to be lost."""
    found = score_table(
        table(
            [(-5.0, -15.0), (-15.0, -5.0), (-10.0, -20.0), (-1.0, None)], [(-10.0, -20.0)] * 2 + [(-10.0, -20.0)] * 2
        ),
        "davir",
        policy="p",
        base="b",
    )
    np.testing.assert_array_equal(found, [0.5 - 0.25, -0.5 - 0.75, 0.0, np.nan])


def test_a_base_that_is_certain_has_nothing_to_gain_and_much_to_lose() -> None:
    unchanged, worse = score_table(
        table([(0.0, -5.0), (-0.5, -5.0)], [(0.0, -10.0)] * 2), "davir", policy="p", base="b"
    )
    assert unchanged == 0.0 - 0.5
    assert worse == pytest.approx(-0.5 / 1e-6 - 0.5, rel=1e-12)
    (coarse,) = score_table(table([(-0.5, -5.0)], [(0.0, -10.0)]), "davir", policy="p", base="b", floor=0.1)
    assert coarse == pytest.approx(-5.5, rel=1e-12)


def test_a_model_against_itself_is_refused() -> None:
    with pytest.raises(UserError, match="base: got 'p', the policy itself"):
        score_table(table([], []), "davir", policy="p", base="p")
