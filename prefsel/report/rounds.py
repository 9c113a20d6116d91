"""Corpora that models answered, beside each other: what was asked, what the judges gave, what was kept and trained.

Shapes: G groups of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from prefsel.report import plots
from prefsel.report.formatting import ABSENT, is_number, number, text_of
from prefsel.report.tables import Table, table
from prefsel.schema import RESPONSES
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

Sums = dict[str, tuple[int, float, float]]
"""Number → prompts that have it, the sum of its mean over their answers, and the sum of the squares of these."""
TOKENS = "tokens"


def shard_sums(shard: ShardRef, shared: tuple[Storage, Sequence[str]]) -> Sums:
    """What the answers of a shard add up to: their lengths, and what each judge gave.

    Args:
        shard: Of a corpus that a model answered.
        shared: The workspace, and the folders of the judges' columns, without the source.
    """
    storage, folders = shared
    lengths = Artifact(storage, f"groups/{shard.source}").read(shard.shard, [RESPONSES])[RESPONSES].combine_chunks()
    tokens = pc.struct_field(pc.list_flatten(lengths), "num_tokens")
    found = {TOKENS: _sums(pc.list_parent_indices(lengths), tokens, len(lengths))}
    for folder in folders:
        columns = Artifact(storage, f"{folder}/{shard.source}").read(shard.shard)
        for name in (one for one in columns.column_names if one.startswith("rm_")):
            lists = columns[name].combine_chunks()
            found[name.removeprefix("rm_")] = _sums(pc.list_parent_indices(lists), pc.list_flatten(lists), len(lists))
    return found


def _sums(owner: pa.Array, values: pa.Array, num_groups: int) -> tuple[int, float, float]:
    owner_M = owner.to_numpy(zero_copy_only=False)
    value_M = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    is_known_M = np.isfinite(value_M)
    count_G = np.bincount(owner_M[is_known_M], minlength=num_groups)
    total_G = np.bincount(owner_M[is_known_M], value_M[is_known_M], num_groups)
    mean_K = total_G[count_G > 0] / count_G[count_G > 0]
    return len(mean_K), float(mean_K.sum()), float((mean_K**2).sum())


def means(many: Sequence[Sums]) -> dict[str, dict[str, float]]:
    """Of every number its mean over prompts and the standard error of that."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for one in many for name in one):
        count, total, squares = (sum(part) for part in zip(*(one[name] for one in many if name in one)))
        if count:
            variance = max(0.0, squares / count - (total / count) ** 2) * count / max(count - 1, 1)
            found[name] = {"mean": total / count, "error": math.sqrt(variance / count), "prompts": count}
    return found


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each corpus."""
    names = list(dict.fromkeys(name for one in rounds for name in one.get("numbers") or {} if name != TOKENS))
    columns = {"Corpus": "text", "Answered by": "text", "Prompts": "num", "Answers": "num", "Lost": "num"}
    columns |= {"Tokens": "num"} | {f"Reward {name}": "num" for name in names}
    columns |= {"Pairs": "num", "Kept": "num", "Trained": "num"}
    rows = []
    for one in rounds:
        numbers = one.get("numbers") or {}
        rows.append(
            [
                *(text_of(one.get(key)) for key in ("name", "policy")),
                *(number(one.get(key)) for key in ("prompts", "answers", "lost")),
                _with_error(numbers.get(TOKENS)),
                *(_with_error(numbers.get(name)) for name in names),
                *(number(one[key]) if is_number(one.get(key)) else ABSENT for key in ("pairs", "kept", "trained")),
            ]
        )
    return table(columns, rows)


def _with_error(found: Mapping[str, float] | None) -> str:
    if not found:
        return ABSENT
    digits = 1 if abs(found["mean"]) >= 10 else 3
    return f"{found['mean']:.{digits}f} ± {found['error']:.{digits}f}"


def rewards_by_round(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The mean reward of the answers by round, a line for every arm and judge; None where no arm has two rounds."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for one in rounds:
        if one.get("arm") and not one.get("is_seeds"):
            arms.setdefault(str(one["arm"]), []).append(one)
    courses = {}
    for arm, many in arms.items():
        reward = many[0].get("reward")
        points = [(one["round"], one["numbers"][reward]) for one in many if reward in (one.get("numbers") or {})]
        if len(points) > 1:
            courses[f"{arm}, {reward}"] = points
    if not courses:
        return None
    with matplotlib.rc_context(plots.RC):
        figure, axes = plots.new_figure(height=2.4 + 0.2 * -(-len(courses) // 2))
        for place, (name, points) in enumerate(courses.items()):
            rounds_N, found = zip(*points)
            mean_N, error_N = (np.array([one[key] for one in found]) for key in ("mean", "error"))
            style = plots.STYLES[place // len(plots.SERIES) % len(plots.STYLES)]
            colour = plots.SERIES[place % len(plots.SERIES)]
            shown = {"linestyle": style, "marker": "os^Dvx"[place % 6], "markersize": 4, "color": colour}
            axes.errorbar(rounds_N, mean_N, 1.96 * error_N, capsize=2, label=f"\u200b{name}", **shown)
        axes.set_xlabel("answers of round")
        axes.set_ylabel("mean reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.2)
        return plots.as_svg(figure, "Mean reward of the answers by round")
