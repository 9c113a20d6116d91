"""Filtered DPO by hand, from both names its column goes by."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pair_tables import score_shards

from prefsel.errors import NonFiniteError
from prefsel.metrics import score_table

CHOSEN, GENERATED = [1.0, 1.0, 2.5, None, 1.0], [0.5, 1.0, 3.0, 1.0, None]
EXPECTED = "[0.5, 0.0, -0.5, nan, nan]"


@pytest.mark.parametrize("column", ["rm_a_generated", "rm_a_generated_chosen"])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_better_than_what_was_generated(column: str, num_shards: int) -> None:
    table = pa.table({"rm_a_chosen": CHOSEN, column: GENERATED})
    found, _ = score_shards(table, "filtered_dpo", num_shards, rm="a")
    assert str(found.tolist()) == EXPECTED


def test_nan_is_a_fault() -> None:
    table = pa.table({"rm_a_chosen": [1.0], "rm_a_generated": [float("nan")]})
    with pytest.raises(NonFiniteError, match="rm_a_generated: 1 values"):
        score_table(table, "filtered_dpo", rm="a")
