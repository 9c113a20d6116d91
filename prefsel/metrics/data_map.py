"""Alignment data map: where the candidates of a prompt lie by mean and variance of their rewards."""

from __future__ import annotations

from typing import Literal

import numpy as np

from prefsel.config import Options
from prefsel.metrics.implicit_margin import SIDES
from prefsel.metrics.statistics import Columns, Fitted, Metric


class DataMap(Options):
    """Parameters of `data_map`."""

    rm: str
    """Name of the reward model: reads `rm_<rm>_mean` or `rm_<rm>_var`, over all scored completions of the prompt."""
    axis: Literal["mean", "variance"] = "mean"
    """`mean` scores the mean reward of the candidates, `variance` the negative of its variance; a data map needs a
    metric of each."""
    candidates: Literal["group", "pair"] = "group"
    """`group` takes all scored completions of the prompt; `pair` only the two of the pair, from
    `rm_<rm>_chosen|rejected`, which is the same for plain pairs and is all that a table without the numbers of the
    groups can give."""


def columns(params: DataMap) -> tuple[str, ...]:
    """Flat columns that are read."""
    ends = {"mean": ("mean",), "variance": ("var",)}[params.axis]
    return tuple(f"rm_{params.rm}_{end}" for end in (ends if params.candidates == "group" else SIDES))


def score(columns: Columns, params: DataMap, fitted: Fitted) -> np.ndarray:
    r"""$\mu$ or $-\sigma^2$ (population) of the candidates' rewards; the same for all pairs of a prompt; float64 [N].

    Source: arXiv:2505.23114, which keeps prompts of high mean and low variance (a third of each axis).
    """
    rm = f"rm_{params.rm}"
    if params.candidates == "group":
        return columns[f"{rm}_mean"] if params.axis == "mean" else -columns[f"{rm}_var"]
    chosen_N, rejected_N = columns[f"{rm}_chosen"], columns[f"{rm}_rejected"]
    return (chosen_N + rejected_N) / 2 if params.axis == "mean" else -np.square((chosen_N - rejected_N) / 2)


METRIC = Metric("data_map", DataMap, columns, score, paper="arXiv:2505.23114")
