from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefsel.errors import NonFiniteError, UserError
from prefsel.evaluate.bootstrap import bootstrap_estimate, draws
from prefsel.evaluate.comparison import Comparison, by_prompt, compare_pairwise, compare_rewards, merged
from prefsel.evaluate.judges import PairwiseJudge
from prefsel.evaluate.length_control import ALPACA_RIDGE, PRIOR, fit, length_control
from prefsel.evaluate.winrate import as_shares, share, win_rate

REWARD = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
ANSWERS = st.lists(st.tuples(REWARD, st.integers(0, 40)), min_size=1, max_size=4)
BOTH = st.dictionaries(st.text("abcde", min_size=1, max_size=2), st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=8)


def compared(both: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]]) -> Comparison:
    """Prompt → (reward, length) of the answers of ours and of theirs."""
    rewards, lengths = ([{p: [a[n] for a in one[side]] for p, one in both.items()} for side in (0, 1)] for n in (0, 1))
    return compare_rewards(*rewards, (lengths[0], lengths[1]))


def rows(advantages: list[float], differences: list[float]) -> Comparison:
    """One row per prompt."""
    return Comparison(tuple(f"{n:04d}" for n in range(len(advantages))), np.array(advantages), np.array(differences))


# ------------------------------------------------------------------------------------------------------------- raw


def test_a_table_that_can_be_checked_by_eye() -> None:
    # a: 2 of 2 won; b: one won, one tied; c: lost.   Prompts 1, 0.75, 0: mean 0.58333.
    both = {"a": ([(3, 5)], [(1, 5), (2, 5)]), "b": ([(1, 5), (2, 5)], [(1, 5)]), "c": ([(0, 5)], [(9, 5)])}
    found = win_rate(compared(both))
    assert found.raw.mean == pytest.approx((1 + 0.75 + 0) / 3)
    assert (found.num_wins, found.num_ties, found.num_losses) == (3, 1, 1)
    assert (found.raw.num_items, found.raw.num_prompts) == (5, 3)
    assert found.num_inconsistent is None


@given(BOTH)
def test_it_is_a_loop_over_prompts_and_answers(both) -> None:
    shares = []
    for ours, theirs in both.values():
        won = [1.0 if a > b else 0.5 if a == b else 0.0 for (a, _), (b, _) in itertools.product(ours, theirs)]
        shares.append(sum(won) / len(won))
    found = by_prompt(compared(both))
    assert list(found.prompts) == sorted(both)
    assert share(float(found.value_N.mean())) == pytest.approx(sum(shares) / len(shares))


@given(BOTH)
def test_it_is_antisymmetric_to_the_last_bit(both) -> None:
    one = win_rate(compared(both), num_draws=100)
    other = win_rate(compared({p: (theirs, ours) for p, (ours, theirs) in both.items()}), num_draws=100)
    assert other.raw.mean == 1 - one.raw.mean
    if one.raw.low is not None:
        assert (other.raw.low, other.raw.high) == (1 - one.raw.high, 1 - one.raw.low)
    assert (other.num_wins, other.num_ties, other.num_losses) == (one.num_losses, one.num_ties, one.num_wins)


@given(st.floats(-1, 1))
def test_a_share_and_the_opposite_one_are_one_without_rounding(advantage: float) -> None:
    assert share(-advantage) == 1 - share(advantage)
    assert share(advantage) == pytest.approx((1 + advantage) / 2, abs=1e-15)


def test_a_better_model_is_found_and_a_copy_is_not() -> None:
    """20 seeds each of 80 prompts: a copy's interval holds one half about 19 times of 20, a better one's never."""
    held, better = 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        hard = rng.normal(0, 2, 80)
        ours, copy, good = (
            {str(n): list(hard[n] + shift + rng.normal(0, 1, 4)) for n in range(80)} for shift in (0.0, 0.0, 0.6)
        )
        even = {prompt: [10.0] * 4 for prompt in ours}
        shown, found = (
            as_shares(bootstrap_estimate([by_prompt(compare_rewards(one, ours, (even, even)))], seed=seed))  # type: ignore[arg-type]
            for one in (copy, good)
        )
        held += shown.low <= 0.5 <= shown.high  # type: ignore[operator]
        better += found.low > 0.5  # type: ignore[operator]
        # Φ(0.6 / √2) = 0.664
        assert found.mean == pytest.approx(0.664, abs=0.08)
    assert held >= 17
    assert better == 20


def test_an_exact_copy_is_one_half_without_an_interval_to_speak_of() -> None:
    rewards = {str(n): [float(n), float(n % 3)] for n in range(30)}
    lengths = {prompt: [4.0, 9.0] for prompt in rewards}
    found = win_rate(compare_rewards(rewards, rewards, (lengths, lengths)))
    assert found.raw.mean == found.raw.low == found.raw.high == 0.5
    assert found.length_controlled is not None
    assert found.length_controlled.mean == pytest.approx(0.5, abs=1e-12)


def test_shards_add_up() -> None:
    rng = np.random.default_rng(3)
    both = {
        f"{n:02d}": tuple([(float(rng.integers(3)), float(rng.integers(30))) for _ in range(2)] for _ in "ab")
        for n in range(30)
    }
    parts = [compared({p: both[p] for p in list(both)[start::3]}) for start in range(3)]
    whole, added = win_rate(compared(both)), win_rate(merged(parts))
    assert added.raw == whole.raw
    assert added.length_controlled is not None
    assert whole.length_controlled is not None
    assert added.length_controlled.mean == pytest.approx(whole.length_controlled.mean, abs=1e-12)
    with pytest.raises(UserError, match="10 prompts stand in several shards, first: \\['00', '03', '06'\\]"):
        merged([*parts, parts[0]])


def test_prompts_that_one_side_lacks_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"the baseline has none to 1 prompts, first: \['b'\]"):
        compare_rewards({"a": [1], "b": [1]}, {"a": [1]}, ({"a": [1], "b": [1]}, {"a": [1]}))
    with pytest.raises(UserError, match=r"prompt 'a': 1 and 2 rewards, 1 and 1 lengths"):
        compare_rewards({"a": [1]}, {"a": [1, 2]}, ({"a": [1]}, {"a": [1]}))
    ones, bad = {"a": [1.0], "b": [1.0]}, {"a": [1.0], "b": [float("nan")]}
    with pytest.raises(NonFiniteError, match=r"rewards of 1 prompts are NaN or infinite, first: \['b'\]"):
        compare_rewards(ones, bad, (ones, ones))
    with pytest.raises(NonFiniteError, match=r"lengths of 1 prompts are NaN or infinite, first: \['b'\]"):
        compare_rewards(ones, ones, (bad, ones))
    with pytest.raises(UserError, match="no two answers to compare"):
        win_rate(merged([]))


# -------------------------------------------------------------------------------------------------------- pairwise


def test_both_orders_are_asked_and_a_liking_for_a_place_cancels() -> None:
    asked = []

    def first_is_better(prompts, answers_a, answers_b):
        asked.append((list(answers_a), list(answers_b)))
        return [1.0, 0.75, 0.5] if len(asked) == 1 else [1.0, 0.25, 0.5]

    judge = PairwiseJudge("first", "1", first_is_better)
    found = compare_pairwise(judge, ["p", "q", "r"], ["P", "Q", "R"], ["a", "b", "c"], ["x", "y", "z"], [0, 3, -1])
    assert asked == [(["a", "b", "c"], ["x", "y", "z"]), (["x", "y", "z"], ["a", "b", "c"])]
    # p: whoever stands first wins; q: ours 0.75 and 1 − 0.25; r: ties.
    assert found.advantage_M.tolist() == [0.0, 0.5, 0.0]
    shown = win_rate(found)
    assert shown.num_inconsistent == 1
    assert shown.first_place_share == pytest.approx((1 + 1 + 0.75 + 0.25 + 0.5 + 0.5) / 6)
    assert shown.raw.mean == pytest.approx((0.5 + 0.75 + 0.5) / 3)


def test_a_pairwise_judge_is_antisymmetric_too() -> None:
    def fickle(prompts, answers_a, answers_b):
        return [(hash((p, a, b)) % 1000) / 999 for p, a, b in zip(prompts, answers_a, answers_b)]

    judge = PairwiseJudge("fickle", "1", fickle)
    ids = [f"{n // 2:02d}" for n in range(40)]
    ours, theirs = [f"ours {n}" for n in range(40)], [f"theirs {n}" for n in range(40)]
    difference = np.arange(40) % 7 - 3.0
    one = win_rate(compare_pairwise(judge, ids, ids, ours, theirs, difference))
    other = win_rate(compare_pairwise(judge, ids, ids, theirs, ours, -difference))
    assert other.raw.mean == 1 - one.raw.mean
    assert other.raw.low == 1 - one.raw.high  # type: ignore[operator]
    assert one.length_controlled is not None
    assert other.length_controlled is not None
    assert other.length_controlled.mean == 1 - one.length_controlled.mean
    assert other.length_controlled.low == 1 - one.length_controlled.high  # type: ignore[operator]
    assert (one.num_inconsistent, one.first_place_share) == (other.num_inconsistent, other.first_place_share)
    assert one.num_inconsistent


# ------------------------------------------------------------------------------------------------- length-controlled


def oracle(advantage: list[float], term: list[float], weight: list[float], ridge: float = 0.0) -> tuple[float, float]:
    """Binary cross entropy with soft labels, with the ties of the prior, by torch's L-BFGS."""
    y = torch.tensor([(a + 1) / 2 for a in advantage] + [0.5, 0.5], dtype=torch.float64)
    t = torch.tensor([*term, 1.0, -1.0], dtype=torch.float64)
    w = torch.tensor([*weight, PRIOR / 2, PRIOR / 2], dtype=torch.float64)
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [coefficients], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        z = coefficients[0] + coefficients[1] * t
        loss = (w * torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")).sum()
        loss = loss + ridge * sum(weight) * coefficients[1] ** 2 / 2
        loss.backward()
        return loss

    solver.step(closure)
    quality, length = coefficients.tolist()
    return quality, length


@pytest.mark.parametrize("seed", range(6))
def test_the_fit_is_that_of_an_optimiser(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = (1, 3, 10, 60, 200, 40)[seed]
    advantage = rng.choice([-1.0, 0.0, 1.0], size) if seed != 5 else np.ones(size)
    term, weight = np.tanh(rng.normal(0.5, 1, size)), rng.choice([0.0, 0.25, 1.0, 3.0], (4, size))
    ridge = (0.0, 0.3, 0.02, 0.0, 0.02, 0.0)[seed]
    quality_B, length_B = fit(advantage, term, weight, ridge=ridge)
    for row in range(4):
        expected = oracle(list(advantage), list(term), list(weight[row]), ridge)
        assert (quality_B[row], length_B[row]) == (
            pytest.approx(expected[0], abs=1e-6),
            pytest.approx(expected[1], abs=1e-6),
        )


@given(st.lists(st.tuples(st.sampled_from([-1.0, -0.3, 0.0, 1.0]), st.integers(-50, 50)), min_size=1, max_size=30))
def test_length_control_is_antisymmetric_to_the_last_bit(pairs) -> None:
    one = rows([a for a, _ in pairs], [float(d) for _, d in pairs])
    swapped = Comparison(one.prompts, -one.advantage_M, -one.length_difference_M)
    found, other = (length_control(each, ridge=0.02, num_draws=100) for each in (one, swapped))
    if found is None:
        assert other is None
        return
    assert other is not None
    assert other.advantage.mean == -found.advantage.mean
    assert other.length_effect == found.length_effect
    if len(pairs) > 1:
        assert other.advantage.low == -found.advantage.high  # type: ignore[operator]


@pytest.mark.parametrize("is_noisy", [True, False])
def test_a_judge_who_sees_length_alone_shows_no_quality(is_noisy: bool) -> None:
    """Ours are longer in 84 % of the rows, and win as many; at equal lengths neither is better."""
    rng = np.random.default_rng(11)
    difference = rng.normal(40, 40, 600)
    chance = 1 / (1 + np.exp(-difference / 15)) if is_noisy else difference > 0
    found = win_rate(rows(list(np.where(rng.random(600) < chance, 1.0, -1.0)), list(difference)))
    assert found.raw.low > 0.7  # type: ignore[operator]
    assert found.length_controlled is not None
    assert found.length_controlled.mean == pytest.approx(0.5, abs=0.1)
    assert found.length_controlled.low < 0.5 < found.length_controlled.high  # type: ignore[operator]
    assert found.length_effect > 1  # type: ignore[operator]


def test_quality_is_found_behind_a_length_that_hides_it() -> None:
    """Ours are better, σ(1) = 0.73 at equal lengths, but shorter, and the judge likes length."""
    rng = np.random.default_rng(12)
    difference = rng.normal(-30, 40, 2_000)
    spread = difference.std()
    chance = 1 / (1 + np.exp(-(1.0 + 1.5 * np.tanh(difference / spread))))
    found = win_rate(rows(list(np.where(rng.random(2_000) < chance, 1.0, -1.0)), list(difference)), num_draws=500)
    assert found.length_controlled is not None
    assert found.length_controlled.mean == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)
    assert found.length_controlled.low < 0.731 < found.length_controlled.high  # type: ignore[operator]
    assert found.raw.high < 0.65  # type: ignore[operator]
    assert found.length_effect == pytest.approx(1.5, abs=0.3)


def test_answers_of_equal_lengths_are_controlled_already() -> None:
    found = win_rate(rows([1.0] * 70 + [-1.0] * 30, [0.0] * 100))
    assert found.raw.mean == 0.7
    assert found.length_controlled is not None
    # The prior's tie is one prompt in a hundred and one.
    assert found.length_controlled.mean == pytest.approx(70.5 / 101)
    assert not found.is_extrapolated


def test_one_length_difference_throughout_tells_nothing() -> None:
    found = win_rate(rows([1.0, -1.0, 1.0], [7.0, 7.0, 7.0]))
    assert found.length_controlled is None
    assert found.is_extrapolated
    assert win_rate(rows([1.0, -1.0, 1.0], [7.0, 1.0, 2.0])).is_extrapolated
    assert not win_rate(rows([1.0, -1.0, 1.0], [7.0, -1.0, 2.0])).is_extrapolated


def test_every_prompt_weighs_the_same_however_many_answers_it_has() -> None:
    once = Comparison(("a", "b"), np.array([1.0, -1.0]), np.array([3.0, -2.0]))
    thrice = Comparison(("a", "a", "a", "b"), np.array([1.0, 1, 1, -1]), np.array([3.0, 3, 3, -2]))
    found, again = length_control(once), length_control(thrice)
    assert found is not None
    assert again is not None
    assert again.advantage.mean == pytest.approx(found.advantage.mean)
    assert again.length_effect == pytest.approx(found.length_effect)
    assert again.advantage.low == pytest.approx(found.advantage.low)


def test_the_interval_is_that_of_fits_to_drawn_prompts() -> None:
    rng = np.random.default_rng(13)
    one = rows(list(rng.choice([-1.0, 0.0, 1.0], 12)), list(rng.normal(5, 10, 12)))
    found = length_control(one, seed=4, num_draws=100)
    assert found is not None
    term = np.tanh(one.length_difference_M / one.length_difference_M.std())
    drawn = sorted(
        math.tanh(oracle(list(one.advantage_M), list(term), list(map(float, counts)))[0] / 2)
        for block in draws(12, 100, 4)
        for counts in block
    )
    assert (found.advantage.low, found.advantage.high) == (
        pytest.approx(drawn[2], abs=1e-6),
        pytest.approx(drawn[-3], abs=1e-6),
    )


def test_a_ridge_holds_the_length_effect_back() -> None:
    rng = np.random.default_rng(14)
    difference = rng.normal(40, 40, 400)
    one = rows(list(np.where(difference > 0, 1.0, -1.0)), list(difference))
    found = [win_rate(one, length_ridge=ridge, num_draws=100) for ridge in (0.0, ALPACA_RIDGE, 100.0)]
    effects = [each.length_effect for each in found]
    assert effects == sorted(effects, reverse=True)  # type: ignore[type-var]
    assert found[2].length_controlled.mean == pytest.approx(found[0].raw.mean, abs=0.01)  # type: ignore[union-attr]
    assert [each.length_ridge for each in found] == [0.0, ALPACA_RIDGE, 100.0]
    with pytest.raises(UserError, match=r"ridge: got -1; valid: 0 or more"):
        length_control(one, ridge=-1)
