"""How good margins are on labelled pairs that were not trained on: pure functions of numbers.

Shapes: N pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from prefsel.numbers.agreement import agreement

Floats = npt.NDArray[np.float64]

NUM_BINS = 10
"""Of the reliability table; OPEN in the sources, ten is customary (Guo et al. 2017, arXiv 1706.04599, use 15)."""


def holdout_report(margin_N: Floats, length_difference_N: Floats) -> dict[str, Any] | None:
    r"""Accuracy, loss, calibration and length bias of margins whose labels all say "chosen is better".

    Args:
        margin_N: The logit of "chosen is better", \(\Delta r - \rho\,\Delta len\), [N], finite.
        length_difference_N: \(|y_w| - |y_l|\), [N].

    Returns:
        None for fewer than two pairs; else plain JSON:
        `num_pairs`; `loss`, mean Bradley–Terry loss; `accuracy`, the mean `agreement` with the labels;
        `accuracy_longer_chosen` and `accuracy_shorter_chosen`, None without a pair, with `num_longer_chosen` and
        `num_shorter_chosen` (longer: at least as long, as in the sampling); `margin`, the mean; `length_correlation`,
        Pearson, of margin and length difference, None when one is constant; `calibration`, see `calibration`.
    """
    if len(margin_N) < 2:
        return None
    agrees_N, is_longer_N = agreement(margin_N), length_difference_N >= 0
    return {
        "num_pairs": len(margin_N),
        "loss": float(np.logaddexp(0.0, -margin_N).mean()),
        "accuracy": _mean(agrees_N),
        "num_longer_chosen": int(is_longer_N.sum()),
        "accuracy_longer_chosen": _mean(agrees_N[is_longer_N]),
        "num_shorter_chosen": int((~is_longer_N).sum()),
        "accuracy_shorter_chosen": _mean(agrees_N[~is_longer_N]),
        "margin": _mean(margin_N),
        "length_correlation": _correlation(margin_N, length_difference_N),
        "calibration": calibration(margin_N),
    }


def calibration(margin_N: Floats, num_bins: int = NUM_BINS) -> dict[str, Any]:
    r"""Expected calibration error, and the table it comes from.

    Every pair is labelled "chosen is better", so the outcome of σ(margin) is 1 throughout and a table over it would
    say nothing. What is calibrated is the model's own verdict: its confidence \(\max(\sigma(m), 1-\sigma(m))\), from
    0.5 to 1, against how often the verdict agrees with the label. That is the same table as if every pair were shown
    in both orders: bins mirrored at 0.5 have the same gap. A tie is no verdict and agrees half the time.

    Args:
        margin_N: Logits of "chosen is better", [N], finite, N ≥ 1.
        num_bins: Equal-width bins of [0.5, 1], each without its upper edge but the last.

    Returns:
        `expected_error`: \(\sum_b n_b/N\,|accuracy_b - confidence_b|\); `bins`: per bin `low`, `high`, `num_pairs`,
        `confidence` (mean) and `accuracy`, the last two None in an empty bin.

    Source: Guo et al. 2017 (arXiv 1706.04599), equations 2, 3 and 5.
    """
    confidence_N = 1.0 / (1.0 + np.exp(-np.abs(margin_N)))
    agrees_N = agreement(margin_N)
    edges = 0.5 + np.arange(num_bins + 1) / (2 * num_bins)
    bin_N = np.searchsorted(edges[1:-1], confidence_N, side="right")
    bins = [
        {
            "low": float(edges[number]),
            "high": float(edges[number + 1]),
            "num_pairs": int((bin_N == number).sum()),
            "confidence": _mean(confidence_N[bin_N == number]),
            "accuracy": _mean(agrees_N[bin_N == number]),
        }
        for number in range(num_bins)
    ]
    # A bin's n |accuracy − confidence| is the absolute sum of its pairs' differences.
    gaps = np.abs(np.bincount(bin_N, weights=agrees_N - confidence_N))
    return {"expected_error": float(gaps.sum()) / len(margin_N), "bins": bins}


def _correlation(x_N: Floats, y_N: Floats) -> float | None:
    """Pearson correlation; None when either is constant, or varies too little for its variance to be a number."""
    x_N, y_N = (value_N - value_N.mean() if np.ptp(value_N) else np.zeros(len(value_N)) for value_N in (x_N, y_N))
    scale = float(np.sqrt((x_N**2).sum()) * np.sqrt((y_N**2).sum()))
    return float((x_N * y_N).sum()) / scale if scale > 0 else None


def _mean(value_N: npt.NDArray[Any]) -> float | None:
    return float(value_N.mean()) if len(value_N) else None
