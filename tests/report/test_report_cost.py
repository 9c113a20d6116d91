"""What scoring took: counters of the stage reports as cells that a person can check."""

from __future__ import annotations

import pytest

from prefsel.report.cost import scoring_table
from prefsel.score.summary import merge_facts, shares
from prefsel.workspace.manifest import StageReport


def report(name: str, **details: object) -> StageReport:
    return StageReport("score", name, "completions", 4, 4, {}, 1, 1, 1.0, f"columns/{name}@0", "0", dict(details))


def test_every_counter_of_a_scorer_has_its_cell() -> None:
    counters = {"trunk_tokens": 200.0, "head_rows": 120.0, "padding_tokens": 50.0, "seconds_model": 4.0}
    counters |= {"flops_model": 3e9, "flops_min": 2e9, "flops_possible": 8e9, "oom_halvings": 1.0}
    facts = {"matmul_flops_per_s": 2e9, "token_budget": 8192.0, "token_budget_least": 4096.0}
    pool = {"overall": 0.5, "steady": 0.98}
    found = report("policy", counters=counters, shares=shares(counters), facts=facts, pool=pool)
    table = scoring_table([found, report("imported", counters={})])
    assert table is not None
    assert len(table["rows"]) == 1
    row = dict(zip(table["columns"], table["rows"][0]))
    assert row["scorer"] == "policy"
    assert row["padding %"] == 25
    assert row["useful MFU %"] == 25  # 2 of 8 GFLOP
    assert row["FLOPs over least"] == 1.5
    assert row["peak GFLOP/s"] == 2
    assert (row["token budget"], row["in the end"], row["halved"]) == (8192, 4096, 1)
    assert row["pool busy %"] == pytest.approx(98)


def test_without_a_model_there_is_no_table() -> None:
    assert scoring_table([report("imported", counters={})]) is None


def test_facts_keep_the_largest_and_of_least_ones_the_smallest() -> None:
    assert merge_facts([{"error": 1, "b_least": 5}, {"error": 2, "b_least": 3}]) == {"error": 2, "b_least": 3}
