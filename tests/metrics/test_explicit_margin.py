"""Explicit margin by hand."""

from __future__ import annotations

import pyarrow as pa

from prefsel.metrics import score_table

TABLE = pa.table({"rm_a_chosen": [1.0, 0.0, 2.5], "rm_a_rejected": [0.5, 2.0, 2.5]})


def test_signed_and_absolute() -> None:
    assert score_table(TABLE, "explicit_margin", rm="a").tolist() == [0.5, -2.0, 0.0]
    assert score_table(TABLE, "explicit_margin", rm="a", absolute=True).tolist() == [0.5, 2.0, 0.0]
