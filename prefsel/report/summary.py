"""The story of a run: one paragraph of plain numbers, from the rows read to the accuracy reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from prefsel.report.formatting import duration, is_number, number, percent, plain, text_of
from prefsel.report.trained import evaluated, standard_error, starts_at_reference

MAX_TOLD = 4
"""Trainings and selections the story names; the rest is in its section."""


def story(report: Mapping[str, Any]) -> Markup:
    """One paragraph: rows in, pairs eligible, kept, trained, held-out accuracy before and after."""
    run, stages = report.get("run") or {}, report.get("stages") or []
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        by_stage.setdefault(text_of(stage.get("stage")), []).append(stage)
    told = [
        *_ingested(by_stage.get("ingest", [])),
        *_eligible(by_stage.get("eligible", [])),
        *_selected(report.get("selections") or by_stage.get("select", [])),
        *_trained(report.get("training") or []),
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
    sentence = Markup("<b>{} pairs</b> ({}) were eligible").format(number(rows_out), percent(rows_out, rows_in))
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


def _selected(selections: Sequence[Mapping[str, Any]]) -> list[Markup]:
    told = []
    for one in selections[:MAX_TOLD]:
        kept = one.get("num_kept", one.get("rows_out"))
        eligible = one.get("num_eligible", one.get("rows_in"))
        if not is_number(kept):
            continue
        share = f" ({percent(kept, eligible)} of {number(eligible)})" if is_number(eligible) else ""
        clause = Markup("<code>{}</code> kept <b>{} pairs</b>").format(text_of(one.get("name")), number(kept))
        told.append(clause + share)
    more = len(selections) - MAX_TOLD
    return _listed(told, "selection", more)


def _trained(trainings: Sequence[Mapping[str, Any]]) -> list[Markup]:
    told = []
    for one in trainings[:MAX_TOLD]:
        clause = Markup("<code>{}</code> trained on <b>{} pairs</b>").format(
            text_of(one.get("name")), number(one.get("num_pairs"))
        )
        told.append(clause + _accuracy(one))
    return _listed(told, "training", len(trainings) - MAX_TOLD)


def _accuracy(training: Mapping[str, Any]) -> Markup:
    before, after = evaluated(training)
    if not is_number(after.get("accuracy")):
        return Markup("")
    error, pairs = standard_error(after), after.get("num_pairs")
    spread = f" ± {plain(round(100 * error, 1))}" if error is not None else ""
    # A policy that is its own reference orders nothing: its margins are zero up to rounding.
    told = is_number(before.get("accuracy")) and not starts_at_reference([training])
    start = f"{percent(before['accuracy'])} before, " if told else ""
    of = f" ({number(pairs)} pairs)" if is_number(pairs) else ""
    # ± stands before the unit, as one number: 61.3 ± 2.7 %.
    reached = percent(after["accuracy"]).replace(" %", f"{spread} %")
    return Markup(", held-out accuracy {}<b>{}</b> after{}").format(start, reached, of)


def _listed(clauses: list[Markup], word: str, more: int) -> list[Markup]:
    if not clauses:
        return []
    rest = f"; {_several(more, 'more ' + word)} below" if more > 0 else ""
    return [Markup("; ").join(clauses) + rest + "."]
