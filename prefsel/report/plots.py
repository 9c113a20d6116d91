"""A run's record → figures, as inline SVG that follows the page: its fonts, its light or dark colours, its width.

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

from prefsel.report.formatting import is_number, number, percent, signed

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
WIDTH, HEIGHT = 6.4, 2.3
"""Inches of a figure; the page scales it down to its column."""
REM_PER_INCH = 6.6
"""The same for every figure, so that all have the same size of letters."""
NARROW = 1 / 200
"""A bin of less than this share of the range is a point mass: its density says nothing and would flatten the rest."""


# ------------------------------------------------------------------------------------------------- distributions


def score_histogram(score: Mapping[str, Any]) -> Markup | None:
    """The distribution of one metric's scores over the eligible pairs, with its mean."""
    found = density(score.get("histogram"))
    if found is None:
        return None
    edges, density_B, peaks = found
    with matplotlib.rc_context(RC):
        figure, axes = _figure()
        axes.stairs(density_B, edges, fill=True, color=KEPT, alpha=0.35)
        axes.stairs(density_B, edges, color=KEPT, linewidth=1.0)
        mean = (score.get("moments") or {}).get("mean")
        if is_number(mean) and edges[0] <= mean <= edges[-1]:
            _mark(axes, mean, f"mean {number(mean, 3)}")
        _finish_density(axes, edges, density_B, peaks, f"score_{score.get('metric')}")
        return _svg(figure, f"Distribution of score_{score.get('metric')}")


def selection_histogram(selection: Mapping[str, Any]) -> Markup | None:
    """The scores of all eligible pairs and, on the same scale, of the kept ones, with the threshold."""
    found = density(selection.get("all_histogram"))
    if found is None:
        return None
    edges, density_B, peaks = found
    total = float(np.sum(selection["all_histogram"]["counts"]))
    kept = density(selection.get("kept_histogram"), total=total)
    with matplotlib.rc_context(RC):
        figure, axes = _figure()
        axes.stairs(density_B, edges, fill=True, color=ALL, alpha=0.25, label="eligible")
        axes.stairs(density_B, edges, color=ALL, linewidth=0.8)
        if kept is not None:
            axes.stairs(kept[1], kept[0], fill=True, color=KEPT, alpha=0.75, label="kept")
        for edge in cuts(selection):
            if edges[0] <= edge <= edges[-1]:
                _mark(axes, edge, number(edge, 3))
        _finish_density(axes, edges, density_B, peaks, f"score_{selection.get('metric')}")
        _legend_above(axes)
        return _svg(figure, f"Scores of the pairs that {selection.get('name')} kept, among all eligible ones")


def density(
    histogram: Any, total: float | None = None
) -> tuple[np.ndarray, np.ndarray, list[tuple[float, float]]] | None:
    """Edges, density and point masses (centre, share) of a histogram; None when it is empty or not finite."""
    if not histogram or len(histogram.get("edges") or []) != len(histogram.get("counts") or []) + 1:
        return None
    edges, count_B = np.asarray(histogram["edges"], float), np.asarray(histogram["counts"], float)
    if not count_B.size:
        return None
    whole = count_B.sum() if total is None else total
    if not (np.isfinite(edges).all() and np.isfinite(count_B).all()) or whole <= 0 or edges[-1] <= edges[0]:
        return None
    width_B = np.diff(edges)
    is_point_B = width_B <= NARROW * (edges[-1] - edges[0])
    if is_point_B.all():
        is_point_B[:] = False
    density_B = np.divide(count_B / whole, width_B, out=np.zeros_like(count_B), where=width_B > 0)
    top = density_B[~is_point_B].max()
    places = [place for place in np.flatnonzero(is_point_B) if density_B[place] > 1.3 * top]
    peaks = [(float(edges[p] + edges[p + 1]) / 2, float(count_B[p] / whole)) for p in places]
    return edges, density_B, sorted(peaks, key=lambda peak: -peak[1])


def cuts(selection: Mapping[str, Any]) -> list[float]:
    """Scores where a cut lies: one of a top, two of a band; none for the many of a quota.

    `marks`, where given, are those of the score that is plotted: an intersection has thresholds of others too.
    """
    if selection.get("marks") is not None:
        return list(selection["marks"])
    found = list((selection.get("thresholds") or {}).values())
    edges = [value for value in found if is_number(value)]
    scores = [cut["score"] for cut in found if isinstance(cut, Mapping) and is_number(cut.get("score"))]
    return edges or (scores if len(found) == 1 else [])


def _finish_density(axes: Any, edges: np.ndarray, density_B: np.ndarray, peaks: list[Any], label: str) -> None:
    is_wide_B = np.diff(edges) > NARROW * (edges[-1] - edges[0])
    shown = density_B[is_wide_B] if peaks and is_wide_B.any() else density_B
    axes.set_ylim(0, 1.25 * float(shown.max()) or 1.0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(label)
    axes.set_ylabel("density of pairs")
    for row, (place, share) in enumerate(peaks[:3]):
        text = f"{percent(share)} at {number(place, 3)}"
        axes.annotate(
            text,
            (place, 0.86 - 0.12 * row),
            (4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
        )


def _mark(axes: Any, place: float, text: str) -> None:
    """A dashed line over a score, with its name beside it on the side where there is room."""
    axes.axvline(place, color=INK, linewidth=1.0, linestyle="--")
    low, high = axes.get_xlim()
    is_right = place > low + 0.75 * (high - low)
    axes.annotate(
        text,
        (place, 0.98),
        (-4 if is_right else 4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if is_right else "left",
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
        figure, axes = _figure(height=0.75 + 0.26 * len(rows))
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
        return _svg(figure, "Mean length difference of chosen and rejected, eligible and kept, per selection")


# ------------------------------------------------------------------------------------------------------ training

PANELS = {
    "loss": "loss, nats",
    "accuracy": "accuracy",
    "margin": "reward margin, nats",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}


def training_curves(training: Mapping[str, Any]) -> Markup | None:
    """Every number of a training that has a course: the steps as a line, held-out evaluations as points on it."""
    courses = {
        key: (_course(training.get("history"), key), _course(training.get("evaluations"), key)) for key in PANELS
    }
    drawn = {key: found for key, found in courses.items() if len(found[0][0]) or len(found[1][0])}
    if not drawn:
        return None
    columns = min(3, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(max(3.2, 2.75 * columns), 2.0 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, (key, (steps, evaluations)) in zip(grid, drawn.items()):
            _course_panel(axes, key, steps, evaluations)
        for axes in grid[len(drawn) :]:
            axes.set_axis_off()
        return _svg(figure, f"Training curves of {training.get('name')}: {', '.join(drawn)} by step")


def _course_panel(axes: Any, key: str, steps: Any, evaluations: Any) -> None:
    has_both = len(steps[0]) > 0 and len(evaluations[0]) > 0
    axes.plot(*steps, color=KEPT, linewidth=1.1, alpha=0.8, label="training batch" if has_both else None)
    axes.plot(*evaluations, "o--", color=SERIES[1], markersize=4, linewidth=1.0, label="held out" if has_both else None)
    if key == "accuracy":
        axes.set_ylim(0, 1.02)
        axes.axhline(0.5, color=GRID, linewidth=1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes.set_title(PANELS[key])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y")
    axes.set_xlabel("step")
    if key == "loss" and has_both:
        axes.legend(loc="best", fontsize=8, handlelength=1.4)


def held_out_accuracy(trainings: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Held-out accuracy by step of every training in one picture; None for fewer than two."""
    courses = {str(one.get("name")): _course(one.get("evaluations"), "accuracy") for one in trainings}
    courses = {name: course for name, course in courses.items() if len(course[0]) > 1}
    if len(courses) < 2:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = _figure(height=2.6)
        for place, (name, (step, accuracy)) in enumerate(courses.items()):
            colour, style = SERIES[place % len(SERIES)], STYLES[place // len(SERIES) % len(STYLES)]
            marker = "os^Dvx"[place % 6]
            # A legend leaves out names that begin with an underscore; an invisible space before it does not.
            axes.plot(step, 100 * accuracy, style, marker=marker, markersize=4, color=colour, label=f"\u200b{name}")
        axes.axhline(50, color=GRID, linewidth=1.0)
        axes.set_xlabel("step")
        axes.set_ylabel("held-out accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.2)
        return _svg(figure, "Held-out accuracy by step of every training")


def _course(records: Any, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite one."""
    found = [(one["step"], one[key]) for one in records or [] if is_number(one.get("step")) and is_number(one.get(key))]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


# ---------------------------------------------------------------------------------------------------------- SVG


def _figure(*, height: float = HEIGHT) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend_above(axes: Any) -> None:
    """The legend in a line over the right end, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, handlelength=1.0)


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element: no prologue, no addresses, page colours, ids that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    mark = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).hexdigest()
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{mark}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{mark}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None, "the SVG backend writes a viewBox"
    size = f"max-width:{REM_PER_INCH * figure.get_figwidth():.1f}rem"
    opening = Markup('<svg viewBox="{}" style="{}" role="img" aria-label="{}">').format(box[1], size, label)
    return opening + Markup(text[text.index(">") + 1 :].strip())
