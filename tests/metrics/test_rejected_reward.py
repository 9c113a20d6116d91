"""RIP's two metrics by hand, and its rule."""

from __future__ import annotations

from pair_tables import sided

from prefsel.metrics import score_table
from prefsel.select import select_table

TABLE = sided(
    rm_a=[(3.0, 2.0), (3.0, 1.9), (2.5, 2.0), (4.0, 2.0), (2.0, 2.0), (9.0, None)],
    num_tokens=[(9, 50), (9, 50), (9, 49), (9, 80), (9, 50), (9, 60)],
)


def test_only_the_rejected_side_is_read() -> None:
    assert score_table(TABLE, "rejected_reward", rm="a")[:5].tolist() == [2.0, 1.9, 2.0, 2.0, 2.0]
    assert score_table(TABLE, "rejected_length").tolist() == [50, 50, 49, 80, 50, 60]
    only = TABLE.select(["rm_a_rejected", "num_tokens_rejected"])
    assert score_table(only, "rejected_reward", rm="a")[0] == 2.0
    assert score_table(only, "rejected_length")[0] == 50


def test_rip_keeps_its_three_limits_themselves() -> None:
    """r(y_l) ≥ 2, |y_l| ≥ 50, margin ≤ 1: pair 1 is rejected by the first, 2 by the second, 3 by the third."""
    table = {
        "pair_id": list(range(6)),
        "reward": score_table(TABLE, "rejected_reward", rm="a"),
        "length": score_table(TABLE, "rejected_length"),
        "margin": score_table(TABLE, "explicit_margin", rm="a"),
    }
    rules = [
        {"kind": "threshold", "score": "reward", "low": 2.0},
        {"kind": "threshold", "score": "length", "low": 50},
        {"kind": "threshold", "score": "margin", "high": 1.0},
    ]
    assert select_table(table, {"kind": "intersect", "rules": rules}).tolist() == [0, 4]
