from __future__ import annotations

import random

import numpy as np
import pytest

from prefsel.errors import UserError
from prefsel.evaluate.bootstrap import bootstrap_estimate, draws, percentile_interval
from prefsel.evaluate.intervals import Values, difference, estimate


def values(by_prompt: dict[str, list[float]]) -> Values:
    rows = [(f"{prompt}/{k}", prompt, value) for prompt, many in by_prompt.items() for k, value in enumerate(many)]
    return Values([item for item, _, _ in rows], [p for _, p, _ in rows], np.array([v for _, _, v in rows]))


def test_every_draw_has_as_many_prompts_as_there_are() -> None:
    count_BG = np.concatenate(list(draws(7, 500, seed=3)))
    assert count_BG.shape == (500, 7)
    assert set(count_BG.sum(axis=1)) == {7}
    assert count_BG.mean(axis=0) == pytest.approx(np.ones(7), abs=0.15)


def test_the_mean_of_a_draw_is_a_loop_over_its_prompts() -> None:
    """Unequal numbers of items per prompt: every draw's mean is over the items of the prompts drawn."""
    by_prompt = {"a": [1.0], "b": [2.0, 4.0], "c": [8.0, 8.0, 9.0]}
    naive = []
    for block in draws(3, 400, seed=5):
        for counts in block:
            drawn = [v for name, count in zip("abc", counts) for _ in range(count) for v in by_prompt[name]]
            naive.append(sum(drawn) / len(drawn))
    naive.sort()
    found = bootstrap_estimate([values(by_prompt)], seed=5, num_draws=400)
    assert found is not None
    assert found.mean == pytest.approx(32 / 6)
    assert (found.low, found.high) == (pytest.approx(naive[10]), pytest.approx(naive[-11]))
    assert (found.num_items, found.num_prompts) == (6, 3)


def test_neither_order_nor_shards_change_a_bit_of_it() -> None:
    rng = np.random.default_rng(0)
    by_prompt = {f"{number:03d}": list(rng.normal(size=rng.integers(1, 5))) for number in range(90)}
    one = values(by_prompt)
    order = list(range(len(one.items)))
    random.Random(1).shuffle(order)
    other = Values([one.items[i] for i in order], [one.prompts[i] for i in order], one.value_N[order])
    assert bootstrap_estimate([one]) == bootstrap_estimate([other])


def test_seeds_give_other_draws_and_the_same_seed_the_same() -> None:
    one = values({str(number): [float(number % 7)] for number in range(40)})
    assert bootstrap_estimate([one], seed=1) == bootstrap_estimate([one], seed=1)
    assert bootstrap_estimate([one], seed=1) != bootstrap_estimate([one], seed=2)


def test_it_agrees_with_the_normal_interval_where_both_hold() -> None:
    rng = np.random.default_rng(4)
    by_prompt = {str(number): list(rng.normal(rng.normal(), 1, 3)) for number in range(400)}
    one = values(by_prompt)
    drawn, normal = bootstrap_estimate([one], num_draws=10_000), estimate(one.value_N, one.prompts)
    assert drawn is not None
    assert normal is not None
    assert drawn.mean == pytest.approx(normal.mean)
    assert drawn.high - drawn.low == pytest.approx(normal.high - normal.low, rel=0.04)  # type: ignore[operator]


def test_a_difference_over_the_same_prompts_is_narrow_where_each_alone_is_wide() -> None:
    rng = np.random.default_rng(6)
    hard = rng.normal(0, 10, 100)
    ours, theirs = (
        values({str(number): [hard[number] + shift + rng.normal(0, 0.1)] for number in range(100)})
        for shift in (0.5, 0.0)
    )
    alone, both = bootstrap_estimate([ours]), bootstrap_estimate([difference(ours, theirs)])
    assert alone is not None
    assert both is not None
    assert both.low > 0.4  # type: ignore[operator]
    assert alone.high - alone.low > 20 * (both.high - both.low)  # type: ignore[operator]


def test_several_runs_cover_the_mean_of_runs_and_prompts() -> None:
    """Value = run + prompt + noise: the interval over both holds the true mean 0 about as often as it says."""
    rng = np.random.default_rng(7)
    held, trials = 0, 300
    for _ in range(trials):
        run_S, prompt_G = rng.normal(0, 0.2, 8), rng.normal(0, 1, 60)
        runs = [values({str(g): [run_S[s] + prompt_G[g] + rng.normal(0, 0.3)] for g in range(60)}) for s in range(8)]
        found = bootstrap_estimate(runs, num_draws=400)
        assert found is not None
        held += found.low <= 0 <= found.high  # type: ignore[operator]
    # 5 standard errors of a share of 95 % below; eight runs are few, so a little short of it.
    assert 0.87 < held / trials < 0.99


def test_prompts_drawn_within_each_run_would_be_too_sure() -> None:
    """What is common to all runs stays in the interval: five copies of a run say no more than one."""
    one = values({str(number): [float(number)] for number in range(50)})
    alone, copies = bootstrap_estimate([one], num_draws=4_000), bootstrap_estimate([one] * 5, num_draws=4_000)
    assert alone is not None
    assert copies is not None
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))


def test_runs_with_other_prompts_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"run 1 has other prompts than run 0, 2 of them, first: \['b', 'c'\]"):
        bootstrap_estimate([values({"a": [0], "b": [1]}), values({"a": [0], "c": [1]})])


def test_one_prompt_has_no_interval_and_nothing_has_no_mean() -> None:
    one = bootstrap_estimate([values({"a": [1.0, 3.0]})])
    assert one is not None
    assert (one.mean, one.low, one.high, one.num_items) == (2.0, None, None, 2)
    assert bootstrap_estimate([]) is None
    assert bootstrap_estimate([values({})]) is None


@pytest.mark.parametrize("options", [{"num_draws": 99}, {"level": 1.0}, {"level": 0.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}: got"):
        percentile_interval(lambda count_BG: count_BG[:, 0] * 1.0, 3, **options)  # type: ignore[arg-type]
