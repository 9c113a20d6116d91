"""Ledger entries of a column set → the stage's report: counts, counters, what was measured, how busy the pool was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prefsel.errors import PrefselError, TemplateError
from prefsel.reasons import TEMPLATE_NOTES
from prefsel.score.contract import TemplateUse, join_uses
from prefsel.score.utilization import span_of, utilization
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import merge_counts
from prefsel.workspace.manifest import StageReport


def report(node: Any, done: Mapping[str, Entry], computed: int, seconds: float) -> StageReport:
    """The stage's counts in completions, with the engine's counters added up.

    Args:
        node: the column set's node of the plan: `name`, `path`, `fingerprint`, and the scorer as `spec`.
        done: ledger entries of its shards.
        computed: shards that this run computed.
        seconds: what that took.

    Raises:
        PrefselError: more completions are poisoned than allowed.
        TemplateError: most completions do not fit the template.
    """
    infos = [entry.info for entry in done.values()]
    dropped = merge_counts(info["dropped"] for info in infos)
    completions = sum(info["completions"] for info in infos)
    _require_scored(node.name, infos, dropped, completions, node.spec.max_poison_fraction)
    return StageReport(
        stage="score",
        name=node.name,
        unit=node.spec.unit,
        rows_in=completions,
        rows_out=completions - sum(dropped.values()),
        dropped=dropped,
        shards=len(done),
        computed_shards=computed,
        seconds=seconds,
        artifact=node.path,
        details={"kind": node.spec.kind, **measured(infos), **_carried(infos), "range": bounds(done.values())},
    )


def _carried(infos: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Completions whose numbers were made in other shards, before their file changed; nothing where there are none."""
    total = sum(info.get("carried", 0) for info in infos)
    return {"carried": total} if total else {}


def _require_scored(
    label: str, infos: Sequence[Mapping[str, Any]], dropped: Mapping[str, int], completions: int, allowed: float
) -> None:
    """Refuse columns with too many holes; errors as `report`."""
    poisoned = dropped.get("poisoned", 0)
    if poisoned > allowed * completions:
        first = next(info["poisoned"][:3] for info in infos if info["poisoned"])
        raise PrefselError(
            f"score {label}: the model gave NaN or infinity for {poisoned:,} of {completions:,} completions, "
            f"first {first}; max_poison_fraction is {allowed:g}"
        )
    if 2 * (refused := dropped.get("template_error", 0)) > completions:
        first = next(info["template_error"] for info in infos if info["template_error"])
        raise TemplateError(
            f"score {label}: {refused:,} of {completions:,} completions do not fit the template: {first}"
        )


def measured(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counters, facts, the shares that follow from them, and why rows were padded, as far as there are any."""
    counters: dict[str, float] = {}
    for info in infos:
        for name, value in info["counters"].items():
            counters[name] = counters.get(name, 0) + value
    spans = [span for info in infos if (span := span_of(info))]
    use = join_uses(TemplateUse(**info["template"]) for info in infos if info.get("template"))
    found = {
        "counters": counters,
        "facts": merge_facts(info.get("facts", {}) for info in infos),
        "shares": shares(counters),
        "pool": utilization(spans),
        "padded_because": next((info["padded_because"] for info in infos if info["padded_because"]), ""),
        "template": asdict(use) if use else None,
    }
    return {name: value for name, value in found.items() if value or name == "counters"}


def template_lines(use: Mapping[str, Any]) -> list[str]:
    """What the chat template of a column set did, one sentence for each kind of it: how often, and the first example.

    Args:
        use: `TemplateUse` as a dictionary, as `measured` gives it.
    """
    lines = []
    for kind, text in TEMPLATE_NOTES.items():
        if kind in use["notes"]:
            count, example = use["notes"][kind]
            lines.append(f"template {use['name']}: {count:,} completions: {text}; first: {example}")
    return lines


def shares(counters: Mapping[str, float]) -> dict[str, float]:
    """What of the trunk's tokens is padding, how far the FLOPs lie above F_min, and useful MFU.

    Useful MFU is F_min ÷ what the device's matrix products could have done in the model's seconds; `flops_possible`
    adds that up shard by shard, so that actors on different devices count each with its own peak.
    """
    parts = {
        "padding": ("padding_tokens", "trunk_tokens"),
        "flops_over_min": ("flops_model", "flops_min"),
        "useful_mfu": ("flops_min", "flops_possible"),
    }
    return {
        name: counters.get(part, 0.0) / counters[whole] for name, (part, whole) in parts.items() if counters.get(whole)
    }


def merge_facts(many: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Facts of several shards: the largest of each, the smallest of those that end in `_least`."""
    facts: dict[str, float] = {}
    for one in many:
        for name, value in one.items():
            choose = min if name.endswith("_least") else max
            facts[name] = choose(facts.get(name, value), value)
    return facts


def bounds(entries: Iterable[Entry]) -> dict[str, list[float]]:
    """Smallest and largest value of every column."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        for name, column in entry.columns.items():
            if column["min"] is not None:
                low, high = found.get(name, [column["min"], column["max"]])
                found[name] = [min(low, column["min"]), max(high, column["max"])]
    return found
