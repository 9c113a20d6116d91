"""The story of a run: its flow as boxes with counts and losses, and one paragraph of plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from prefsel.report.cells import duration, is_number, number, percent, plain, text_of
from prefsel.report.tables import STEPS, carried, evaluated, meaning, standard_error

WHAT = {
    "ingest": "input rows become prompts with their completions, and labelled pairs",
    "eligible": "which pairs may be selected at all, decided before any statistic is computed",
    "scratch": "small models trained on prompts that are then left out of the selection",
    "score": "every completion is read once by each model; counted in completions",
    "metric": "one score per eligible pair, from the numbers of its two completions",
    "select": "the pairs a rule keeps, exactly",
    "holdout": "pairs of held-out prompts, written out for evaluation",
    "train": "what was kept, trained on",
}
OPTIONAL = ("scratch", "holdout")
"""Steps whose absence says nothing."""
SET_ASIDE = ("not_selected", "holdout", "proxy", "unused")
"""Reasons that are no fault of the row."""
MAX_TOLD = 4
"""Trainings and selections the story names; the rest is in its section."""


@dataclass(frozen=True)
class Loss:
    """Rows that left at a step, for one reason."""

    reason: str
    count: str
    share: str
    width: float
    """Per cent of the step's rows, for the bar."""
    meaning: str
    kind: str
    """`loss`, `rest` (set aside, or not selected), `carried` (left at an earlier step already)."""


@dataclass(frozen=True)
class Box:
    """One stage, for one source, model, metric, selection or training."""

    name: str
    rows_in: str
    rows_out: str
    unit: str
    kept_width: float | None
    losses: list[Loss]
    notes: list[str]
    badge: str
    """`reused`, `failed`, or empty."""
    problem: str
    """Why it failed, or how many rows are unaccounted for; empty when all is well."""


@dataclass(frozen=True)
class Step:
    """A level of the flow; one that did not run has no boxes."""

    title: str
    what: str
    boxes: list[Box]


def flow(report: Mapping[str, Any]) -> list[Step]:
    """The steps of a run from top to bottom; those of another name than `tables.STEPS` come last."""
    stages = report.get("stages") or []
    known = [key for key in STEPS if key not in OPTIONAL or any(stage.get("stage") == key for stage in stages)]
    others = [str(stage.get("stage")) for stage in stages if stage.get("stage") not in STEPS]
    steps = []
    for key in [*known, *dict.fromkeys(others)]:
        boxes = [box(stage, report) for stage in stages if str(stage.get("stage")) == key]
        steps.append(Step(STEPS.get(key, key), WHAT.get(key, ""), boxes))
    return steps


def box(stage: Mapping[str, Any], report: Mapping[str, Any]) -> Box:
    """One stage's counts; widths are per cent of what came in."""
    rows_in, rows_out = stage.get("rows_in"), stage.get("rows_out")
    again = carried(stage, report.get("stages") or [])
    dropped = {reason: count for reason, count in (stage.get("dropped") or {}).items() if count}
    made = [
        loss(reason, count, rows_in, kind="rest" if reason in SET_ASIDE else "loss", why=meaning(reason))
        for reason, count in dropped.items()
        if reason not in again
    ]
    made.sort(key=lambda one: one.kind == "loss")
    if again:
        left = sum(dropped[reason] for reason in again if reason in dropped)
        made.append(loss("not eligible", left, rows_in, kind="carried", why="left at the step Eligibility"))
    is_failed = stage.get("status") == "failed" or bool(stage.get("error"))
    is_reused = stage.get("computed_shards") == 0 and bool(stage.get("shards"))
    return Box(
        name=text_of(stage.get("name")),
        rows_in=number(rows_in),
        rows_out=number(rows_out),
        unit=str(stage.get("unit") or "rows"),
        kept_width=width(rows_out, rows_in),
        losses=made,
        notes=notes(stage, report),
        badge="failed" if is_failed else "reused" if is_reused else "",
        problem=str(stage.get("error") or "") or unaccounted(stage),
    )


def loss(reason: str, count: Any, rows_in: Any, *, kind: str, why: str) -> Loss:
    """A loss with its share of what came in."""
    shown = reason.replace("_", " ").replace(":", ": ")
    return Loss(shown, number(count), percent(count, rows_in), width(count, rows_in) or 0.0, why, kind)


def width(part: Any, whole: Any) -> float | None:
    """Per cent of a bar; None when unknown."""
    return round(100 * part / whole, 3) if is_number(part) and is_number(whole) and whole else None


def unaccounted(stage: Mapping[str, Any]) -> str:
    """What breaks `rows in = rows out + Σ dropped`, in words; empty when it holds."""
    rows_in, rows_out, dropped = stage.get("rows_in"), stage.get("rows_out"), stage.get("dropped") or {}
    if not (is_number(rows_in) and is_number(rows_out) and all(map(is_number, dropped.values()))):
        return "its rows were not counted"
    missing = rows_in - rows_out - sum(dropped.values())
    return f"{number(missing)} {stage.get('unit') or 'rows'} unaccounted for" if missing else ""


def accounting(report: Mapping[str, Any]) -> tuple[int, int]:
    """How many stages account for every row, of how many."""
    stages = report.get("stages") or []
    return sum(not unaccounted(stage) for stage in stages), len(stages)


def notes(stage: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """What else a box says: what ingest made of its rows, and what a step was made from."""
    details, name = stage.get("details") or {}, stage.get("name")
    if stage.get("stage") == "ingest":
        made = [f"{number(details[key])} {word}" for key, word in _MADE.items() if is_number(details.get(key))]
        return [", ".join(made)] if made else []
    if stage.get("stage") == "select":
        return [f"by {one['metric']}" for one in report.get("selections") or [] if _is(one, name, "metric")]
    if stage.get("stage") == "metric":
        return [str(one["kind"]) for one in report.get("scores") or [] if one.get("metric") == name and one.get("kind")]
    if stage.get("stage") == "train":
        return [f"on {one['selection']}" for one in report.get("training") or [] if _is(one, name, "selection")]
    return []


_MADE = {"groups": "prompts", "pairs": "pairs", "ties": "ties without a label"}


def _is(one: Mapping[str, Any], name: Any, key: str) -> bool:
    return one.get("name") == name and bool(one.get(key))


# -------------------------------------------------------------------------------------------------------- story


def story(report: Mapping[str, Any]) -> Markup:
    """One paragraph: rows in, pairs eligible, kept, trained, held-out accuracy before and after."""
    run, stages = report.get("run") or {}, report.get("stages") or []
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        by_stage.setdefault(str(stage.get("stage")), []).append(stage)
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
        told.append(
            Markup("<code>{}</code> kept <b>{} pairs</b> ({})").format(
                text_of(one.get("name")), number(kept), percent(kept, eligible)
            )
        )
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
    start = f"{percent(before['accuracy'])} before, " if is_number(before.get("accuracy")) else ""
    of = f" ({number(pairs)} pairs)" if is_number(pairs) else ""
    # ± stands before the unit, as one number: 61.3 ± 2.7 %.
    reached = percent(after["accuracy"]).replace(" %", f"{spread} %")
    return Markup(", held-out accuracy {}<b>{}</b> after{}").format(start, reached, of)


def _listed(clauses: list[Markup], word: str, more: int) -> list[Markup]:
    if not clauses:
        return []
    rest = f"; {_several(more, 'more ' + word)} below" if more > 0 else ""
    return [Markup("; ").join(clauses) + rest + "."]
