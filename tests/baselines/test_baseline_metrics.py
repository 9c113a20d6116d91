"""Every metric, in every form its parameters give it, scores a table of pairs as it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import corpora
import pyarrow as pa
import pytest
from adapters import score_pairs
from golden import Golden

NUM_PAIRS = 32
ASPECTS = ("help", "truth", "brief")
MODELS = {"policy": "theta", "reference": "ref"}
DIVERGENCE = {"aspects": list(ASPECTS), "source": "rm"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "divergence": ("preference_divergence", DIVERGENCE),
    "divergence, fitted": (
        "preference_divergence",
        {**DIVERGENCE, "rho": "fit", "gamma": 0.7, "length": "num_tokens_ref"},
    ),
    "divergence, penalised": ("preference_divergence", {**DIVERGENCE, "rho": 0.125, "weights": [1.0, 2.0, 0.5]}),
    "divergence, all aspects": ("preference_divergence", {**DIVERGENCE, "own_aspect": None}),
    "potential": ("alignment_potential", {"rm": "help", "policy": "theta"}),
    "potential, group": (
        "alignment_potential",
        {"rm": "help", "policy": "theta", "spread": "group", "sign": "abs", "weight": 2.5},
    ),
    "potential, raw": ("alignment_potential", {"rm": "help", "policy": "theta", "form": "raw", "reference": "ref"}),
    "explicit": ("explicit_margin", {"rm": "truth"}),
    "explicit, absolute": ("explicit_margin", {"rm": "truth", "absolute": True}),
    "implicit": ("implicit_margin", MODELS),
    "implicit, per token": ("implicit_margin", {"policy": "theta", "reduction": "mean", "beta": 2.0}),
    "implicit, smallest": ("implicit_margin", {**MODELS, "absolute": True, "order": "smallest"}),
    "lossdiff": ("lossdiff", {**MODELS, "validation_policy": "val", "beta": 0.2}),
    "influence": ("influence", {**MODELS, "tangent": "v"}),
    "influence, largest": ("influence", {**MODELS, "tangent": ["v", "w"], "combine": "max", "beta": 0.3}),
    "less": ("less", {"tangent": "v"}),
    "less, checkpoints": (
        "less",
        {"checkpoints": [{"tangents": one, "learning_rate": rate} for one, rate in (("v", 1e-3), ("w", 4e-4))]},
    ),
    "selective": ("selective_dpo", {"policies": ["theta", "val"], "reference": "ref", "beta": 0.2}),
    "selective, losses": ("selective_dpo", {"losses": "loss"}),
    "dual": ("dual_margin", {"explicit": ["help"], "implicit": [MODELS]}),
    "dual, quantiles": (
        "dual_margin",
        {"explicit": ["help", "truth"], "implicit": [MODELS], "upper": "quantile", "lower_quantile": 0.1},
    ),
    "dual, bounds": ("dual_margin", {"explicit": ["help"], "implicit": [MODELS], "upper": [3.0, 1.5], "lower": -1.0}),
    "dual, added": ("dual_margin", {"explicit": ["help"], "implicit": [MODELS], "mode": "add"}),
    "filtered": ("filtered_dpo", {"rm": "help"}),
    "ifd": ("ifd_margin", {"policy": "theta"}),
    "gap": ("difficulty_gap", MODELS),
    "gap, absolute": ("difficulty_gap", {**MODELS, "beta": 0.5, "absolute": True}),
    "map, mean": ("data_map", {"rm": "help"}),
    "map, variance": ("data_map", {"rm": "help", "axis": "variance"}),
    "map, pair": ("data_map", {"rm": "truth", "axis": "variance", "candidates": "pair"}),
    "random": ("random", {"seed": 2**63 + 5}),
}


def table() -> pa.Table:
    """Flat pair columns of every kind; every eleventh pair lacks what one side says."""
    sided = [*(f"rm_{aspect}" for aspect in ASPECTS), *(f"logps_{model}" for model in ("theta", "ref", "val"))]
    sided += ["logps_theta_uncond", "dlogps_v", "dlogps_w", "num_tokens_theta", "num_tokens_ref", "num_tokens"]
    single = ["rm_help_max", "rm_help_min", "rm_help_mean", "rm_help_var", "rm_help_generated", "loss_0", "loss_1"]
    single += ["gamma_dot_v", "gamma_norm_v", "gamma_dot_w", "gamma_norm_w"]
    names = [*(f"{name}_{side}" for name in sided for side in ("chosen", "rejected")), *single]
    columns: dict[str, list[Any]] = {name: [number(name, n) for n in range(NUM_PAIRS)] for name in names}
    for name in ("rm_help_chosen", "logps_theta_rejected", "rm_help_mean", "gamma_dot_v"):
        for n in range(3, NUM_PAIRS, 11):
            columns[name][n] = None
    columns["pair_id"] = [corpora.draw("pair", n, below=2**64).to_bytes(16, "big") for n in range(NUM_PAIRS)]
    columns["aspect"] = [ASPECTS[n % 3] for n in range(NUM_PAIRS)]
    return pa.table(columns)


def number(column: str, n: int) -> float:
    """Log-probs below 0, tokens and norms above, everything else around 0."""
    drawn = corpora.draw(column, n, below=1024) / 64
    if column.startswith("logps"):
        return -drawn - 1
    if column.startswith(("num_tokens", "gamma_norm", "loss")) or column.endswith("_var"):
        return float(1 + int(4 * drawn)) if column.startswith("num_tokens") else drawn + 1
    return drawn - 8


@pytest.mark.parametrize("name", FORMS)
def test_a_metric_scores_the_same_pairs_the_same(name: str, golden: Callable[[str], Golden]) -> None:
    metric, params = FORMS[name]
    # The tolerance is for exp and log, which processors round differently in the last bit.
    golden("metrics").check(name, score_pairs(table(), metric, params), rel=1e-12)
