"""The story of a run up to its verdict: one paragraph of plain numbers, from the rows read to the eligible pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prefsel.report.formatting import duration, is_number, number, percent, text_of


def story(report: Mapping[str, Any]) -> Markup:
    """One paragraph: rows in, pairs in them, pairs that could be selected, and the time it all took."""
    run, stages = report.get("run") or {}, report.get("stages") or []
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        by_stage.setdefault(text_of(stage.get("stage")), []).append(stage)
    told = [
        *_ingested(by_stage.get("ingest", [])),
        *_eligible(by_stage.get("eligible", [])),
    ]
    if is_number(run.get("seconds")):
        hardware = run.get("hardware") or {}
        parts = [f"{number(hardware[key])} {word}" for key, word in _PARTS.items() if hardware.get(key)]
        on = f" on {' and '.join(parts)}" if parts else ""
        told.append(Markup("The run took <b>{}</b>{}.").format(duration(run["seconds"]), on))
    return Markup(" ").join(told)


_PARTS = {"cpus": "CPU cores", "gpus": "GPUs"}


def _total(stages: Sequence[Mapping[str, Any]], key: str) -> float | int:
    return sum(stage[key] for stage in stages if is_number(stage.get(key)))


def _several(count: int, one: str) -> str:
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def _ingested(stages: Sequence[Mapping[str, Any]]) -> list[Markup]:
    if not stages:
        return []
    dropped: dict[str, float] = {}
    for stage in stages:
        for reason, count in (stage.get("dropped") or {}).items():
            kind = reason.partition(":")[0]
            dropped[kind] = dropped.get(kind, 0) + (count if is_number(count) else 0)
    lost = [f"{number(count)} {_LOST.get(kind, kind)}" for kind, count in dropped.items() if count]
    made = [stage.get("details") or {} for stage in stages]
    groups, pairs = _total(made, "groups"), _total(made, "pairs")
    sentence = Markup("<b>{} rows</b> were read from {}").format(
        number(_total(stages, "rows_in")), _several(len(stages), "source")
    )
    sentence += ("; " + " and ".join(lost) if lost else "") + "."
    if pairs:
        sentence += Markup(" They hold {} prompts and <b>{} pairs</b>.").format(number(groups), number(pairs))
    return [sentence]


_LOST = {"quarantined": "were quarantined", "duplicate": "were duplicates"}


def _eligible(stages: Sequence[Mapping[str, Any]]) -> list[Markup]:
    if not stages:
        return []
    rows_in, rows_out = _total(stages, "rows_in"), _total(stages, "rows_out")
    dropped = [(count, reason) for stage in stages for reason, count in (stage.get("dropped") or {}).items() if count]
    lost = [f"{number(count)} {_NOT_ELIGIBLE.get(reason, reason)}" for count, reason in sorted(dropped, reverse=True)]
    sentence = Markup("<b>{} pairs</b> ({}) could be selected").format(number(rows_out), percent(rows_out, rows_in))
    return [sentence + ("; of the others " + ", ".join(lost) if lost else "") + "."]


_NOT_ELIGIBLE = {
    "holdout": "are held out",
    "holdout_prompt": "share a held-out prompt",
    "excluded_prompt": "have an excluded prompt",
    "proxy": "train the models made here",
    "validation": "are what selection aims at",
    "duplicate": "are duplicates",
    "contradiction": "contradict another label",
}
