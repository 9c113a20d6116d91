"""What was planned beside what a run counted, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prefsel.plan.counted import NODES, counted_work
from prefsel.workspace.manifest import StageReport


def planned_table(planned: Sequence[Mapping[str, Any]], reports: Sequence[StageReport]) -> dict[str, Any] | None:
    """One row per node that runs a model and was planned; None without any.

    Args:
        planned: The work of a document of `prefsel plan` for the same configuration.
        reports: Of the run's stages.
    """
    counted = {f"{NODES.get(one.stage)} {one.name}": counted_work(asdict(one)) for one in reports}
    rows = []
    for work in planned:
        found = counted.get(work["node"])
        if work["missing"] or found is None:
            continue
        row: list[Any] = [work["node"]]
        for name, unit in (("flops", 1e9), ("tokens", 1.0), ("items", 1.0)):
            number = found[name]
            row += [work[name]["value"] / unit, None if number is None else number / unit]
        low, high = (work["flops"][end] / 1e9 for end in ("low", "high"))
        # Read whole; a tokenizer trained later, or blocks and shared prompts of a training, still differ a little.
        is_exact = work["kind"] == "scoring" and not work["note"]
        row.insert(2, f"{low:,.3g} to {high:,.3g}" if low != high else "exact" if is_exact else "about")
        rows.append([*row, work["seconds_here"], found["seconds"]])
    if not rows:
        return None
    columns = ["node", "GFLOPs, planned", "95 %", "counted", "tokens, planned", "counted", "rows, planned", "counted"]
    columns += ["seconds, planned", "counted"]
    note = (
        "By `prefsel plan` with this configuration, before the run. Of a scorer: the least FLOPs that its groups need. "
        "Of a training: the least for its pairs one by one; attention goes by blocks, which adds a percent, or more to "
        "a tiny model, and pairs of a batch that share a prompt take less. Rows of a training are pairs over all "
        "epochs. Seconds are planned only where a former run or --calibrate gave a speed, and counted only of what "
        "this run computed."
    )
    return {"title": "Planned and counted", "note": note, "columns": columns, "rows": rows}
