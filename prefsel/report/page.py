"""The record of a run → one self-contained page: text, tables and figures in a single file that asks for nothing.

report ─┬─ verdict, story: sentences ─┐
        ├─ tables, trained: rows ─────┤
        ├─ flow: boxes ───────────────┼──▶ page.html.j2 ──▶ HTML
        └─ plots: inline SVG ─────────┘
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from prefsel.report import evaluated, evaluation_plots, plots, rounds, tables, trained, verdict
from prefsel.report.flow import accounting, flow
from prefsel.report.formatting import duration, is_number, number, one_decimal, percent, sort_key, text_of
from prefsel.report.summary import story

PREVIEW_CHARACTERS, PREVIEW_LINES = 420, 14
"""A text longer than this by half is folded after so much."""
MAX_CHARACTERS = 20_000
"""Of one text; a page stays a page whatever lies in the corpus."""
MANY_ROWS = 12
"""A table with more rows is folded."""
EXAMPLES = {
    "just kept": "Just kept: nearest to the cut, on its kept side",
    "just dropped": "Just dropped: nearest to the cut, on its other side",
    "kept": "Kept: a sample of all",
    "dropped": "Dropped: a sample of all",
}
"""Titles of the kinds of examples."""
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What HTML or UTF-8 cannot hold: controls, halves of surrogate pairs."""


def render(report: Mapping[str, Any]) -> str:
    """The page of a run. A pure function: the same record gives the same bytes.

    A section without data is absent. None and NaN are shown as –. Text from the corpus is escaped.

    Args:
        report: plain JSON values. `run` and `stages` must be there; everything else, at any depth, may be missing.

            run: run, name, started (ISO 8601), seconds, status, error, workspace, versions, hardware, config_yaml.
            stages: per stage and artifact: stage, name, unit, rows_in, rows_out, dropped {reason: count}, shards,
                computed_shards, seconds, artifact, fingerprint, details; of a failed one `status: failed`, error.
            scores: per metric: metric, kind, params, num_eligible, dropped, moments, length_correlation, length_unit,
                statistics, histogram {edges [bins + 1], counts [bins]} where no selection draws it; bins are even.
            selections: per selection: name, metric, rule, num_eligible, num_kept, thresholds, marks, moments,
                all_histogram, kept_histogram (equal edges), length {unit, all, kept}, strata, examples, dataset.
            random: names of the selections that are drawn at random.
            overlap: per two selections, see `overlap.overlaps`.
            training: per training: name, kind, selection, model, reference, num_pairs, settings, history, evaluations,
                held_out {before, after} (`Estimate`s of the accuracy in per cent), self_checks, seconds, artifact.
            rounds: per corpus that a model answered: name, arm, round, is_seeds, policy, reward (that decides),
                prompts, answers, lost, numbers {tokens or a reward: mean, error}, pairs, kept, trained, page (a file).
            comparisons: per selection, control and measure, see `verdict.comparisons`.
            warnings: sentences.
            evaluated: per model that answered prompts, see `evaluated.evaluated_sections`.
            evaluations, tables: given ones: title, note, columns, rows; evaluations stand on top.
            artifacts: path, fingerprint, rows, bytes, content.

    Returns:
        A complete HTML document.
    """
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            run=report.get("run") or {},
            story=story(report),
            steps=flow(report),
            accounting=accounting(report),
            stages=report.get("stages") or [],
            scores=report.get("scores") or [],
            selections=[
                dict(one, examples=_examples(one), is_random=one.get("name") in (report.get("random") or []))
                for one in report.get("selections") or []
            ],
            examples_titles=EXAMPLES,
            overlap=tables.overlap(report.get("overlap") or []),
            training=report.get("training") or [],
            comparisons=report.get("comparisons") or [],
            made=report.get("rounds") or [],
            warnings=_warnings(report),
            evaluated=report.get("evaluated") or [],
            evaluations=_with_rows(report.get("evaluations")),
            given=_with_rows(report.get("tables")),
            artifacts=report.get("artifacts") or [],
            sections=sections(report),
        )
    )
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)


def sections(report: Mapping[str, Any]) -> dict[str, str]:
    """Anchor → title of the sections that have something to say, in order."""
    run, selections = report.get("run") or {}, report.get("selections") or []
    training, evaluations = report.get("training") or [], _with_rows(report.get("evaluations"))
    has = {
        "verdict": ("Verdict", bool(selections or training)),
        "rounds": ("Generated answers", bool(report.get("rounds"))),
        "evaluation": ("Evaluation", bool(evaluations or training or report.get("evaluated"))),
        "selections": ("Selections", bool(selections)),
        "overlap": ("Overlap", bool(report.get("overlap"))),
        "examples": ("Examples", any(one.get("examples") for one in selections)),
        "scores": ("Scores", bool(report.get("scores"))),
        "length": ("Length bias", bool(tables.length_bias(selections).rows)),
        "training": ("Training", bool(training)),
        "flow": ("Flow", bool(report.get("stages"))),
        "costs": ("Models and costs", bool(_with_rows(report.get("tables")))),
        "timings": ("Timings", bool(report.get("stages"))),
        "configuration": ("Configuration", bool(run.get("config_yaml") or run.get("versions") or run.get("hardware"))),
        "artifacts": ("Artifacts and hashes", bool(report.get("artifacts"))),
    }
    return {anchor: title for anchor, (title, is_there) in has.items() if is_there}


def _with_rows(given: Any) -> list[Mapping[str, Any]]:
    """The given tables that have rows."""
    return [one for one in given or [] if one.get("rows")]


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What speaks against the numbers of the run, and what it did not measure."""
    parts = (report.get(key) or [] for key in ("selections", "training", "random", "comparisons"))
    selections, training, random, found = parts
    policies = [one for one in training if one.get("kind") != "reward"]
    unsaid = verdict.not_shown(selections, policies, random, found) if selections else ()
    return [*(report.get("warnings") or []), *unsaid]


def _examples(selection: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The examples of a selection by kind, in the order in which kinds first appear."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in selection.get("examples") or []:
        kinds.setdefault(str(one.get("kind") or "pair"), []).append(one)
    return list(kinds.items())


def _when(value: Any) -> str:
    """A moment in ISO 8601, for people."""
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return text_of(value)
    return f"{moment:%Y-%m-%d %H:%M:%S} {moment.tzname() or ''}".strip()


def _is_long(text: str) -> bool:
    return len(text) > 1.5 * PREVIEW_CHARACTERS or text.count("\n") > 1.5 * PREVIEW_LINES


def _preview(text: str) -> str:
    """The beginning of a long text, up to a space near the limit."""
    head = "\n".join(text[:PREVIEW_CHARACTERS].split("\n")[:PREVIEW_LINES])
    return head[: head.rfind(" ")] if " " in head[PREVIEW_CHARACTERS // 2 :] else head


def _capped(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}… (cut after {MAX_CHARACTERS:,} of {len(text):,} characters)"


def _one_line(text: Any, limit: int = 110) -> str:
    line = " ".join(str(text or "").split())
    return line if len(line) <= limit else line[:limit].rstrip() + "…"


def _breakable(text: Any) -> Markup:
    """Text in which a line may break after the joints of a name or a path."""
    return Markup(re.sub(r"([_:/@])(?=.)", r"\1<wbr>", str(escape(text))))  # nosec B704 # escaped here


def _slug(judgement: str) -> str:
    """A judgement as the name of a class."""
    return judgement.replace(" ", "-")


@cache
def script() -> tuple[str, str]:
    """The page's script, and its hash as a Content-Security-Policy names it."""
    text = (files("prefsel.report") / "page.js").read_text(encoding="utf-8")
    return text, f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("prefsel", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "one_decimal": one_decimal,
        "two_decimals": lambda value: f"{value:.2f}" if is_number(value) else text_of(None),
        "percent": percent,
        "duration": duration,
        "text": text_of,
        "when": _when,
        "preview": _preview,
        "capped": _capped,
        "one_line": _one_line,
        "json": _json,
        "breakable": _breakable,
        "sort_key": sort_key,
        "slug": _slug,
    }
    made.tests |= {"long": _is_long}
    text, digest = script()
    made.globals |= {"script": Markup(text), "script_hash": digest}  # nosec B704 # our own file
    made.globals |= {"tables": tables, "trained": trained, "verdict": verdict, "plots": plots, "MANY_ROWS": MANY_ROWS}
    made.globals |= {"rounds": rounds, "evaluation": evaluated, "evaluation_plots": evaluation_plots}
    return made
