"""A run's record → figures, as inline SVG that follows the page: its fonts, its colours, its width.

Figures are `Figure` objects of the SVG backend; nothing of pyplot's global state is touched. Colours are stand-ins for
CSS variables of the page (Okabe–Ito hues, told apart in every common colour blindness, and by line style too).
Functions return None where there is nothing to draw.

Shapes: B bins of a histogram.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefsel.report.formatting import is_number, number, signed

INK, MUTED, GRID = "#010203", "#020304", "#030405"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STYLES = ("-", "--", "-.", ":")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
VARIABLES |= {colour: f"--series-{place}" for place, colour in enumerate(SERIES)}
ALL, KEPT = MUTED, SERIES[0]
RC = {
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud, and takes the page's font
    "svg.hashsalt": "prefsel",  # the same record gives the same bytes
    "text.parse_math": False,  # a name with dollars in it is a name
    "font.size": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
WIDTH, HEIGHT = 4.8, 2.3
"""Inches of a figure; the page scales it down to its column. At 390 pixels its letters are 9 pixels high."""
REM_PER_INCH = 6.6
"""The same for every figure, so that all have the same size of letters."""
FLATTENED, MANY_BINS = 3, 8
"""A bin more than so many times as high as the next lower one is cut off and named, where at least so many are filled:
drawn in full it would flatten them."""


# ------------------------------------------------------------------------------------------------- distributions


def score_histogram(score: Mapping[str, Any]) -> Markup | None:
    """The distribution of one metric's scores over the pairs that have one."""
    return _histogram(score.get("histogram"), None, (), score.get("metric"), "Distribution")


def selection_histogram(selection: Mapping[str, Any]) -> Markup | None:
    """The scores of all pairs a rule could keep and, on the same bins, of those it kept, with its cuts."""
    title = f"Scores of the pairs that {selection.get('name')} kept, among all it could keep"
    all_pairs, kept = selection.get("all_histogram"), selection.get("kept_histogram")
    return _histogram(all_pairs, kept, cuts(selection), selection.get("metric"), title)


def _histogram(all_pairs: Any, kept: Any, marks: Sequence[float], metric: Any, title: str) -> Markup | None:
    found = bins(all_pairs)
    if found is None:
        return None
    edges, count_B = found
    limit, beyond = readable_height(count_B)
    with matplotlib.rc_context(RC):
        figure, axes = new_figure()
        part = bins(kept)
        colour = KEPT if part is None else ALL
        axes.stairs(count_B, edges, fill=True, color=colour, alpha=0.25, label="could be kept")
        axes.stairs(count_B, edges, color=colour, linewidth=0.8)
        if part is not None:
            axes.stairs(part[1], part[0], fill=True, color=KEPT, alpha=0.85, label="kept")
            _legend_above(axes)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.22 * limit)
        shown = [mark for mark in marks if edges[0] <= mark <= edges[-1]]
        names = [(mark, f"cut {number(mark, 4)}") for mark in shown]
        for mark in shown:
            axes.axvline(mark, color=INK, linewidth=1.0, linestyle="--")
        names += [(edges[at : at + 2].mean(), f"↑ {number(round(count_B[at]))} pairs") for at in beyond]
        for row, (place, text) in enumerate(names):
            # Of two cuts the first one is named on its left, away from the second.
            _annotate(axes, place, text, 0.98 - 0.11 * row, is_left=row == 0 and len(shown) == 2)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}".replace("-", "−")))
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.grid(axis="y")
        axes.set_xlabel(f"score_{metric}")
        axes.set_ylabel("pairs per bin")
        return as_svg(figure, f"{title}: score_{metric}")


def bins(histogram: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Edges and counts of a histogram; None when it is empty or not finite."""
    if not histogram or len(histogram.get("edges") or []) != len(histogram.get("counts") or []) + 1:
        return None
    edges, count_B = np.asarray(histogram["edges"], float), np.asarray(histogram["counts"], float)
    if not (count_B.size and np.isfinite(edges).all() and np.isfinite(count_B).all()):
        return None
    return None if count_B.sum() <= 0 or edges[-1] <= edges[0] else (edges, count_B)


def readable_height(count_B: np.ndarray) -> tuple[float, list[int]]:
    """How high the axis goes, and the bins that are higher: up to three that would flatten many others."""
    order = np.argsort(-count_B, kind="stable")
    sorted_B = count_B[order]
    if np.count_nonzero(count_B) >= MANY_BINS:
        for beyond in (1, 2, 3):
            if sorted_B[beyond - 1] > FLATTENED * sorted_B[beyond]:
                return float(sorted_B[beyond]), order[:beyond].tolist()
    return float(sorted_B[0]), []


def cuts(selection: Mapping[str, Any]) -> list[float]:
    """Scores where a cut lies: one of a top, two of a band; none for the many of a quota.

    `marks`, where given, are those of the score that is plotted: an intersection has thresholds of others too.
    """
    if selection.get("marks") is not None:
        return [mark for mark in selection["marks"] if is_number(mark)]
    found = list((selection.get("thresholds") or {}).values())
    edges = [value for value in found if is_number(value)]
    scores = [cut["score"] for cut in found if isinstance(cut, Mapping) and is_number(cut.get("score"))]
    return edges or (scores if len(found) == 1 else [])


def _annotate(axes: Any, place: float, text: str, height: float, *, is_left: bool = False) -> None:
    """A name beside a score: on its right, unless there is room on its left only."""
    low, high = axes.get_xlim()
    share = (place - low) / (high - low)
    is_left = share > 0.7 or (is_left and share > 0.3)
    axes.annotate(
        text,
        (place, height),
        (-4 if is_left else 4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if is_left else "left",
        va="top",
    )


# --------------------------------------------------------------------------------------------------- length bias


def length_bias(selections: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Mean length difference chosen − rejected, over all eligible pairs and over the kept ones, per selection."""
    rows: list[tuple[str, float, float]] = []
    unit = "tokens"
    for selection in selections:
        length = selection.get("length") or {}
        before, after = ((length.get(part) or {}).get("difference") for part in ("all", "kept"))
        if is_number(before) and is_number(after) and math.isfinite(before - after):
            rows.append((str(selection.get("name")), before, after))
            unit = length.get("unit") or unit
    if not rows:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = new_figure(height=0.75 + 0.26 * len(rows))
        for place, (_, before, after) in enumerate(rows):
            axes.plot([before, after], [place, place], color=MUTED, linewidth=1.2)
            axes.plot(
                [before], [place], "o", color=MUTED, markerfacecolor="none", label="eligible" if not place else None
            )
            axes.plot([after], [place], "o", color=KEPT, label="kept" if not place else None)
            axes.annotate(
                signed(after - before, 1), (max(before, after), place), (7, 0), textcoords="offset points", va="center"
            )
        axes.axvline(0, color=GRID, linewidth=1.0)
        axes.margins(x=0.12)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_xlabel(f"mean length of chosen − rejected, {unit}")
        axes.grid(axis="x")
        _legend_above(axes)
        return as_svg(figure, "Mean length difference of chosen and rejected, eligible and kept, per selection")


# ------------------------------------------------------------------------------------------------------ training

PANELS = {
    "loss": "loss, nats",
    "accuracy": "accuracy",
    "margin": "reward margin, nats",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}


def training_curves(training: Mapping[str, Any]) -> list[Markup]:
    """Every number of a training that has a course, a figure each: the steps as a line, held-out evaluations on it."""
    figures = []
    for key, title in PANELS.items():
        steps, evaluations = (_course(training.get(part), key) for part in ("history", "evaluations"))
        if not len(steps[0]) and not len(evaluations[0]):
            continue
        with matplotlib.rc_context(RC):
            figure, axes = new_figure(width=2.7, height=1.95)
            _course_panel(axes, key, steps, evaluations)
            figures.append(as_svg(figure, f"{title} of {training.get('name')} by step"))
    return figures


def _course_panel(axes: Any, key: str, steps: Any, evaluations: Any) -> None:
    has_both = len(steps[0]) > 0 and len(evaluations[0]) > 0
    axes.plot(*steps, color=KEPT, linewidth=1.1, alpha=0.8, label="training batch" if has_both else None)
    axes.plot(*evaluations, "o--", color=SERIES[1], markersize=4, linewidth=1.0, label="held out" if has_both else None)
    if key == "accuracy":
        axes.set_ylim(0, 1.02)
        axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes.set_title(PANELS[key])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y")
    axes.set_xlabel("step")
    if has_both:
        axes.legend(loc="best", fontsize=8, handlelength=1.4)


def held_out_accuracy(trainings: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Held-out accuracy by step of every training in one picture; None for fewer than two."""
    courses = {str(one.get("name")): _course(one.get("evaluations"), "accuracy") for one in trainings}
    courses = {name: course for name, course in courses.items() if len(course[0]) > 1}
    if len(courses) < 2:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = new_figure(height=2.4 + 0.2 * -(-len(courses) // 2))
        for place, (name, (step, accuracy)) in enumerate(courses.items()):
            colour, style = SERIES[place % len(SERIES)], STYLES[place // len(SERIES) % len(STYLES)]
            marker = "os^Dvx"[place % 6]
            # A legend leaves out names that begin with an underscore; an invisible space before it does not.
            axes.plot(step, 100 * accuracy, style, marker=marker, markersize=4, color=colour, label=f"\u200b{name}")
        axes.axhline(50, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_xlabel("step")
        axes.set_ylabel("held-out accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.2)
        return as_svg(figure, "Held-out accuracy by step of every training")


def _course(records: Any, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite one."""
    found = [(one["step"], one[key]) for one in records or [] if is_number(one.get("step")) and is_number(one.get(key))]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


# ---------------------------------------------------------------------------------------------------------- SVG


def new_figure(*, width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Any]:
    """An empty figure of some inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend_above(axes: Any) -> None:
    """The legend in a line over the right end, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, handlelength=1.0)


def as_svg(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element: no prologue, no addresses, page colours, ids that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    # With the label: two trainings may have the same course of a learning rate.
    mark = hashlib.blake2b((label + text).encode("utf-8", "replace"), digest_size=4).hexdigest()
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{mark}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{mark}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None, "the SVG backend writes a viewBox"
    size = f"max-width:{REM_PER_INCH * figure.get_figwidth():.1f}rem"
    opening = Markup('<svg viewBox="{}" style="{}" role="img" aria-label="{}">').format(box[1], size, label)
    return opening + Markup(text[text.index(">") + 1 :].strip())  # nosec B704 # matplotlib escapes its texts
