"""What runs counted of what was planned: the plan that a workspace keeps, and the FLOPs, rows and seconds of stages.

prefsel plan -w W ─▶ W/plan.json ─┐
prefsel run  -w W ─▶ reports ─────┴─▶ planned beside counted, in the report; FLOPs a second, for the next plan
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefsel.config import Config
from prefsel.workspace.documents import find_document, read_document, write_document
from prefsel.workspace.manifest import config_text
from prefsel.workspace.storage import Storage

PATH = "plan.json"
NODES = {"score": "columns", "train": "model", "reward": "model"}
"""Stages that run models, and the kinds of nodes that they make."""


def keep_plan(storage: Storage, config: Config, document: Mapping[str, Any]) -> None:
    """Write what was planned into the workspace, with the configuration that it is of."""
    write_document(storage, PATH, {"config_yaml": config_text(config), "work": document["work"]}, indent=1)


def kept_plan(storage: Storage, config_yaml: str) -> list[dict[str, Any]]:
    """The planned work by node, if it was planned with this configuration; else nothing.

    Raises:
        DamagedError: The document is not what was written.
    """
    found = find_document(storage, PATH)
    return found["work"] if found is not None and found["config_yaml"] == config_yaml else []


def counted_work(stage: Mapping[str, Any]) -> dict[str, float | None] | None:
    """What a stage of a run counted, as `Work` plans it: `flops`, `tokens`, `items`, `seconds`; None: no model ran.

    Args:
        stage: A `StageReport` as a table. Its seconds are of the run that computed it, 0 in any later one.
    """
    details = stage["details"]
    seconds = stage["seconds"] if stage["computed_shards"] else None
    if stage["stage"] == "score" and (counters := details.get("counters", {})).get("flops_min"):
        # Prompts once a group, as if nothing were shared between groups and nothing repeated between rows.
        tokens = counters["trunk_tokens"] + counters.get("shared_tokens", 0) - counters.get("repeated_prompt_tokens", 0)
        found = {"flops": counters["flops_min"], "items": float(stage["rows_out"]), "seconds": seconds}
        return found | {"tokens": None if counters.get("padding_tokens") else tokens}
    if stage["stage"] in NODES and details.get("flops_train"):
        return {"flops": float(details["flops_train"]), "tokens": None, "items": None, "seconds": seconds}
    return None


def former_rates(storage: Storage) -> dict[str, float]:
    """FLOPs a second of wall time of every node that a run of the workspace made whole, the newest run first."""
    found: dict[str, float] = {}
    for name in reversed(storage.files("runs")):
        for stage in read_document(storage, name)["stages"]:
            node, counted = f"{NODES.get(stage['stage'])} {stage['name']}", counted_work(stage)
            is_whole = counted is not None and stage["computed_shards"] == stage["shards"] and bool(counted["seconds"])
            if counted is not None and is_whole and node not in found:
                found[node] = (counted["flops"] or 0.0) / (counted["seconds"] or 1.0)
    return found
