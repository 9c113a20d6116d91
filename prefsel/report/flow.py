"""The flow of a run as boxes: what came in at every step, what went on, and what left for which reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefsel.reasons import MISSING, SET_ASIDE, meaning
from prefsel.report.formatting import is_number, number, percent, text_of
from prefsel.report.tables import STEPS, carried
from prefsel.score.summary import template_lines

WHAT = {
    "ingest": "input rows become prompts with their completions, and labelled pairs",
    "prompts": "which prompts a model answers, each once, or those that it makes of others",
    "generate": "responses of a model to every prompt, as many as were asked for",
    "pair": "which responses to a prompt are chosen and rejected, by what the judges gave",
    "eligible": "which pairs may be selected at all, decided before any statistic is computed",
    "scratch": "small models trained on prompts that are then left out of the selection",
    "reward": "Bradley–Terry reward models, each kept from the prompts it was trained on",
    "tangent": "validation gradients: the directions along which influence is measured",
    "fuse": "several scores made one, or one pair kept of each prompt",
    "score": "every completion is read once by each model; counted in completions",
    "metric": "one score per eligible pair, from the numbers of its two completions",
    "select": "the pairs a rule keeps, exactly",
    "holdout": "pairs of held-out prompts, written out for evaluation",
    "train": "what was kept, trained on",
    "evaluate": "what models answer to prompts that nothing was trained on, and what judges say of it",
}
OPTIONAL = ("prompts", "generate", "pair", "scratch", "reward", "tangent", "fuse", "holdout", "evaluate")
"""Steps whose absence says nothing."""


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
    others = [text_of(stage.get("stage")) for stage in stages if stage.get("stage") not in STEPS]
    steps = []
    for key in [*known, *dict.fromkeys(others)]:
        boxes = [box(stage, report) for stage in stages if text_of(stage.get("stage")) == key]
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
    # The rest of missing_* is the name of a column, and stays one.
    column = reason.removeprefix(MISSING)
    shown = f"missing {column}" if column != reason else reason.replace("_", " ").replace(":", ": ")
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
    refused = [f"{reason}: {example}" for reason, example in (details.get("examples") or {}).items()]
    if stage.get("stage") == "ingest":
        made = [f"{number(details[key])} {word}" for key, word in _MADE.items() if details.get(key)]
        fields = [f"{use}: {', '.join(names)}" for use, names in (details.get("fields") or {}).items() if names]
        return ([", ".join(made)] if made else []) + [f"fields {one}" for one in fields] + refused
    if stage.get("stage") == "score" and (use := details.get("template")):
        ending = [] if use.get("ending") is None else [f"template {use['name']} ends an answer with {use['ending']!r}"]
        return ending + template_lines(use)
    if stage.get("stage") == "select":
        return [f"by {one['metric']}" for one in report.get("selections") or [] if _is(one, name, "metric")]
    if stage.get("stage") == "metric":
        return [str(one["kind"]) for one in report.get("scores") or [] if one.get("metric") == name and one.get("kind")]
    if stage.get("stage") == "train":
        return [
            f"on {one['selection']}" for one in report.get("training") or [] if _is(one, name, "selection")
        ] + refused
    return []


_MADE = {
    "groups": "prompts",
    "pairs": "pairs",
    "ties": "ties without a label",
    "absent_ratings": "ratings off their scale",
    "opposed": "pairs of completions labelled both ways, by different aspects",
    "unpaired": "prompts whose responses do not differ in label or rating",
}


def _is(one: Mapping[str, Any], name: Any, key: str) -> bool:
    return one.get("name") == name and bool(one.get(key))
