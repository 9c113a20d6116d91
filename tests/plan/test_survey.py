"""Estimates from samples: exact where all was seen, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from prefsel.plan.survey import Estimate, Survey, WindowRead, over_sources


def survey(
    characters: list[np.ndarray], *, is_read: bool, rng: np.random.Generator, m: int, size: float = 0.0
) -> tuple[Survey, np.ndarray]:
    """Windows of groups with these characters, m of all groups sampled; and which ones."""
    windows = [
        WindowRead(float(c.sum()), len(c), float(c.sum()), float((c**2).sum()), 2 * len(c), len(c), len(c), 100)
        for c in characters
    ]
    window_M = np.repeat(np.arange(len(characters)), [len(c) for c in characters])
    places = rng.permutation(len(window_M))[:m]
    all_M = np.concatenate(characters)
    return Survey(windows, size or float(all_M.sum()), is_read, window_M[places], all_M[places]), places


def test_all_seen_is_exact() -> None:
    characters = [np.array([3.0, 5.0]), np.array([2.0])]
    found, places = survey(characters, is_read=True, rng=np.random.default_rng(0), m=3)
    y = np.array([10.0, 1.0, 7.0])[places]
    assert over_sources([found.sampled(y)]) == Estimate.exact(18.0)
    assert over_sources([found.counted(lambda window: window.num_groups)]) == Estimate.exact(3.0)


def test_an_exact_ratio_needs_two_groups() -> None:
    found, _ = survey([np.arange(1.0, 101.0)], is_read=True, rng=np.random.default_rng(1), m=2)
    estimate = over_sources([found.sampled(4.0 * found.characters_m)])
    assert estimate.value == pytest.approx(4.0 * 5050)
    assert estimate.high - estimate.low == pytest.approx(0, abs=1e-6)


def test_sources_add_up() -> None:
    found, _ = survey([np.array([1.0, 2.0])], is_read=True, rng=np.random.default_rng(0), m=2)
    part = found.sampled(found.characters_m)
    assert over_sources([part, part]).value == 6.0


@pytest.mark.parametrize("is_read", [True, False])
def test_intervals_hold_the_truth(is_read: bool) -> None:
    """Skewed lengths, a quadratic number, windows that differ: 95 % of 200 draws, less two of its standard errors."""
    rng = np.random.default_rng(7)
    population = [rng.lognormal(5 + 0.3 * rng.normal(), 0.8, 60) for _ in range(100)]
    numbers = [(3 + 0.5 * rng.normal(size=60)) * c + 0.002 * c**2 for c in population]
    truth, size = (sum(float(one.sum()) for one in many) for many in (numbers, population))
    held = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        windows = range(100) if is_read else draw.choice(100, 24)
        chosen = [population[at] for at in windows]
        found, places = survey(chosen, is_read=is_read, rng=draw, m=300, size=size)
        estimate = over_sources([found.sampled(np.concatenate([numbers[at] for at in windows])[places])])
        held += estimate.low <= truth <= estimate.high
    assert held >= 184
