"""The record of a run → one self-contained page: text, tables and figures in a single file that asks for nothing.

report ─┬─ flow: boxes and story ─┐
        ├─ tables: rows of cells ─┼──▶ page.html.j2 ──▶ HTML
        └─ plots: inline SVG ─────┘
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from prefsel.report import plots, tables, trained
from prefsel.report.flow import accounting, flow
from prefsel.report.formatting import duration, number, one_decimal, percent, text_of
from prefsel.report.summary import story

PREVIEW_CHARACTERS, PREVIEW_LINES = 420, 14
"""A text longer than this by half is folded after so much."""
MAX_CHARACTERS = 20_000
"""Of one text; a page stays a page whatever lies in the corpus."""
MANY_ROWS = 12
"""A table with more rows is folded."""
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
                statistics, histogram {edges [bins + 1], counts [bins]}; bins need not be even.
            selections: per selection: name, metric, rule, num_eligible, num_kept, thresholds, all_histogram,
                kept_histogram (equal edges), length {unit, all, kept}, strata, examples, dataset.
            training: per training: name, selection, model, reference, num_pairs, settings, history, evaluations,
                self_checks, seconds, artifact.
            tables: given ones: title, note, columns, rows.
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
            selections=[dict(one, examples=_examples(one)) for one in report.get("selections") or []],
            training=report.get("training") or [],
            given=[one for one in report.get("tables") or [] if one.get("rows")],
            artifacts=report.get("artifacts") or [],
            sections=sections(report),
        )
    )
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)


def sections(report: Mapping[str, Any]) -> dict[str, str]:
    """Anchor → title of the sections that have something to say, in order."""
    run, selections = report.get("run") or {}, report.get("selections") or []
    has = {
        "flow": ("Flow", bool(report.get("stages"))),
        "scores": ("Scores", bool(report.get("scores"))),
        "selections": ("Selections", bool(selections)),
        "length": ("Length bias", bool(tables.length_bias(selections).rows)),
        "examples": ("Examples", any(one.get("examples") for one in selections)),
        "training": ("Training", bool(report.get("training"))),
        "results": ("Results", any(one.get("rows") for one in report.get("tables") or [])),
        "timings": ("Timings", bool(report.get("stages"))),
        "configuration": ("Configuration", bool(run.get("config_yaml") or run.get("versions") or run.get("hardware"))),
        "artifacts": ("Artifacts and hashes", bool(report.get("artifacts"))),
    }
    return {anchor: title for anchor, (title, is_there) in has.items() if is_there}


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
    return Markup(re.sub(r"([_:/@])(?=.)", r"\1<wbr>", str(escape(text))))


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
        "percent": percent,
        "duration": duration,
        "text": text_of,
        "when": _when,
        "preview": _preview,
        "capped": _capped,
        "one_line": _one_line,
        "json": _json,
        "breakable": _breakable,
    }
    made.tests |= {"long": _is_long}
    made.globals |= {"tables": tables, "trained": trained, "plots": plots, "MANY_ROWS": MANY_ROWS}
    return made
