"""Figures of evaluations: by how much models are better than their baseline, and what that cost in divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefsel.report.evaluated import judges, points
from prefsel.report.formatting import is_number
from prefsel.report.plots import GRID, KEPT, MUTED, RC, SERIES, as_svg, new_figure


def differences(found: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """For every judge the reward of each model minus that of its baseline, with its interval."""
    figures = []
    for judge in judges(found):
        rows = [(one["model"], one["difference"]) for one in points(found, judge) if one["difference"]]
        rows = [(name, gain) for name, gain in rows if is_number(gain.get("mean"))]
        if rows:
            figures.append(_difference_figure(judge, rows))
    return figures


def _difference_figure(judge: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    with matplotlib.rc_context(RC):
        figure, axes = new_figure(height=0.85 + 0.26 * len(rows))
        for place, (_, gain) in enumerate(rows):
            ends = [gain.get(end) for end in ("low", "high")]
            if all(map(is_number, ends)):
                axes.plot(ends, [place, place], color=KEPT, linewidth=1.4)
            axes.plot([gain["mean"]], [place], "o", color=KEPT, markersize=4.5)
        axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:+.4g}".replace("-", "−") if value else "0")
        )
        axes.grid(axis="x")
        axes.set_xlabel(f"reward by {judge}, minus the baseline's")
        return as_svg(figure, f"Reward by {judge} of every model minus that of its baseline, with intervals")


def rewards_by_divergence(found: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """For every judge the reward of each model against its divergence from the baseline; only where both are known."""
    figures = []
    for judge in judges(found):
        rows = [one for one in points(found, judge) if one["reward"] and is_number(one["kl"])]
        if len(rows) > 1:
            figures.append(_divergence_figure(judge, rows))
    return figures


def _divergence_figure(judge: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    with matplotlib.rc_context(RC):
        figure, axes = new_figure(height=2.2 + 0.2 * -(-len(rows) // 2))
        for place, one in enumerate(rows):
            colour, marker = SERIES[place % len(SERIES)], "os^Dvx"[place // len(SERIES) % 6]
            reward = one["reward"]
            ends = [reward.get(end) for end in ("low", "high")]
            if all(map(is_number, ends)):
                axes.plot([one["kl"]] * 2, ends, color=colour, linewidth=1.0, alpha=0.6)
            # A legend leaves out names that begin with an underscore; an invisible space before it does not.
            label = f"\u200b{one['model']}"
            axes.plot([one["kl"]], [reward["mean"]], marker, color=colour, markersize=5, linestyle="", label=label)
        axes.margins(x=0.08)
        axes.set_xlabel("KL from the baseline per answer, nats")
        axes.set_ylabel(f"reward by {judge}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", "−")))
        axes.grid(color=GRID)
        figure.legend(loc="outside lower center", ncols=2, handlelength=1.2)
        return as_svg(figure, f"Reward by {judge} against the divergence from the baseline, per model")


def rewards_by_round(found: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """For every judge the reward of each round's model minus that of its baseline, a line per self-play.

    Round 0 is the policy that the rounds began with: 0 where it is the baseline, else what its own evaluation says, if
    there is one. A judge that the rounds were selected by, and one that they never saw, part where only the first is
    pleased.
    """
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        if one.get("arm") is not None:
            by_arm.setdefault(str(one["arm"]), []).append(one)
    if not any(len(models) > 1 for models in by_arm.values()):
        return []
    figures = []
    for judge in judges(found):
        with matplotlib.rc_context(RC):
            figure, axes = new_figure(height=2.2 + 0.2 * -(-len(by_arm) // 2))
            for place, (arm, models) in enumerate(by_arm.items()):
                colour, marker = SERIES[place % len(SERIES)], "os^Dvx"[place // len(SERIES) % 6]
                course = gains_by_round(found, models, judge)
                for number, gain in course:
                    ends = [gain.get(end) for end in ("low", "high")]
                    if all(map(is_number, ends)):
                        axes.plot([number] * 2, ends, color=colour, linewidth=1.0, alpha=0.5)
                means = [gain["mean"] for _, gain in course]
                rounds = [number for number, _ in course]
                axes.plot(rounds, means, marker=marker, color=colour, markersize=4, label=f"\u200b{arm}")
            axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=":")
            axes.set_xlabel("round")
            axes.set_ylabel(f"reward by {judge}, minus the baseline's")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.grid(axis="y")
            figure.legend(loc="outside lower center", ncols=2, handlelength=1.4)
            figures.append(as_svg(figure, f"Reward by {judge} minus the baseline's, by round"))
    return figures


def gains_by_round(
    found: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]], judge: str
) -> list[tuple[int, Mapping[str, Any]]]:
    """Rounds and their differences to the baseline, round 0 first where it is known.

    Args:
        found: All evaluations.
        models: Those of one self-play.
        judge: Whose rewards.
    """
    first, baseline = (models[0].get(key) for key in ("first", "baseline"))
    course: list[tuple[int, Mapping[str, Any] | None]] = []
    if first is not None and first == baseline:
        course.append((0, {"mean": 0.0}))
    for one, shown in zip(found, points(found, judge)):
        if one.get("model") == first and one.get("baseline") == baseline:
            course.append((0, shown["difference"]))
    course += [(one["round"], shown["difference"]) for one, shown in zip(models, points(models, judge))]
    return [(number, gain) for number, gain in course if gain and is_number(gain.get("mean"))]
