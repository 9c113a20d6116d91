"""Ledger histograms → the even bins a reader's eye expects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prefsel.numbers.histogram import NUM_BINS, Histogram, key_score

BINS = 48


def bin_edges(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest score of each occupied bin of the top 16 bits."""
    shift = 48
    bins = histogram.bins.astype(object)
    low = np.array([key_score(int(b) << shift) for b in bins], float)
    high = np.array([key_score(min(int(b) + 1, NUM_BINS) * (1 << shift) - 1) for b in bins], float)
    return low, high


def even_edges(total: Mapping[str, Any], moments: Mapping[str, float]) -> np.ndarray:
    """Edges of `BINS` even bins between the 0.5th and 99.5th percentile, widened to extremes that are near."""
    histogram = Histogram.from_json(total)
    low, high = bin_edges(histogram)
    share = np.cumsum(histogram.counts) / histogram.total
    first, last = low[np.searchsorted(share, 0.005)], high[np.searchsorted(share, 0.995)]
    margin = (last - first) / 10
    first = moments["min"] if moments["min"] > first - margin else first
    last = moments["max"] if moments["max"] < last + margin else last
    return np.linspace(first, last if last > first else first + 1.0, BINS + 1)


def even_histogram(
    sparse: Mapping[str, Any], edges: np.ndarray, moments: Mapping[str, float]
) -> dict[str, list[float]]:
    """Counts over even bins; a sparse bin's rows are spread over its width, tails go to the outermost bins."""
    histogram = Histogram.from_json(sparse)
    low, high = bin_edges(histogram)
    # No score lies outside [min, max], so the outermost sparse bins are narrower than their bits say.
    low, high = np.clip(low, moments["min"], moments["max"]), np.clip(high, moments["min"], moments["max"])
    counts = np.zeros(len(edges) - 1)
    for start, stop, count in zip(low, high, histogram.counts):
        if stop <= start:
            counts[int(np.clip(np.searchsorted(edges, start, side="right") - 1, 0, len(counts) - 1))] += count
            continue
        ends = np.clip(edges, start, stop)
        ends[0], ends[-1] = start, stop
        counts += count * np.diff(ends) / (stop - start)
    return {"edges": edges.tolist(), "counts": counts.round(2).tolist()}
