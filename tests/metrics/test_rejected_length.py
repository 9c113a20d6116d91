"""Rejected length by hand; RIP's rule stands in `test_rejected_reward.py`."""

from __future__ import annotations

import numpy as np
from pair_tables import sided

from prefsel.metrics import score_table


def test_the_length_of_the_rejected_completion() -> None:
    table = sided(num_tokens=[(9, 50), (9, None), (None, 7)], num_tokens_p=[(1, 2), (1, 3), (1, 4)])
    np.testing.assert_array_equal(score_table(table, "rejected_length"), [50, np.nan, 7])
    assert score_table(table, "rejected_length", length="num_tokens_p").tolist() == [2, 3, 4]
