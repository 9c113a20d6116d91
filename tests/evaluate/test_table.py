from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from prefsel.errors import UserError
from prefsel.evaluate.comparison import Comparison, compare_rewards
from prefsel.evaluate.divergence import divergence
from prefsel.evaluate.intervals import Values, paired_difference
from prefsel.evaluate.judges import gold_judge, rewards_of
from prefsel.evaluate.preference import held_out
from prefsel.evaluate.table import Answered, as_json, evaluation, summary
from prefsel.evaluate.winrate import win_rate, win_rate_of_runs
from prefsel.world.grammar import sample_response, sample_style
from prefsel.world.labels import sample_prompts

PROMPTS = sample_prompts(np.random.default_rng(0), 40, "heldout")


def answered(name: str, seed: int, *, is_best: bool = False) -> Answered:
    """Two answers of the world's grammar to each prompt: the first, or by gold the best, of four that are drawn."""
    rng, judge = np.random.default_rng(seed), gold_judge()
    texts, rewards = {}, {}
    for number, prompt in enumerate(PROMPTS):
        drawn = [[sample_response(rng, prompt, sample_style(rng)) for _ in range(4)] for _ in range(2)]
        gold = [list(rewards_of(judge, [prompt] * 4, four, ["p"] * 4)) for four in drawn]
        places = [int(np.argmax(four)) if is_best else 0 for four in gold]
        texts[f"{number:02d}"] = [four[place] for four, place in zip(drawn, places)]
        rewards[f"{number:02d}"] = [four[place] for four, place in zip(gold, places)]
    counts = {prompt: [float(len(text.split())) for text in many] for prompt, many in texts.items()}
    return Answered(name, texts, rewards, counts)


def test_a_planted_better_model_is_found_by_gold_and_another_draw_of_the_baseline_is_not() -> None:
    base, again, best = answered("base", 1), answered("again", 2), answered("best", 3, is_best=True)
    found = evaluation(best, baseline=base, judge="gold")
    assert found.win_rate is not None
    assert found.win_rate.raw.low > 0.5  # type: ignore[operator]
    assert found.win_rate.length_controlled.low > 0.5  # type: ignore[union-attr,operator]
    assert found.reward_difference.low > 0  # type: ignore[union-attr,operator]
    same = evaluation(again, baseline=base, judge="gold")
    assert same.win_rate.raw.low < 0.5 < same.win_rate.raw.high  # type: ignore[union-attr,operator]
    assert same.reward_difference.low < 0 < same.reward_difference.high  # type: ignore[union-attr,operator]


def test_its_numbers_are_those_of_the_parts() -> None:
    base, best = answered("base", 1), answered("best", 3, is_best=True)
    found = evaluation(best, baseline=base, judge="gold", seed=4)
    lengths = tuple({p: [float(len(text)) for text in many] for p, many in one.texts.items()} for one in (best, base))
    assert found.win_rate == win_rate(compare_rewards(best.rewards, base.rewards, lengths), seed=4)  # type: ignore[arg-type]
    flat = [reward for many in best.rewards.values() for reward in many]  # type: ignore[union-attr]
    assert found.reward.mean == pytest.approx(sum(flat) / len(flat))  # type: ignore[union-attr]
    assert (found.num_prompts, found.num_answers) == (40, 80)
    means = [
        Values(list(one.rewards), list(one.rewards), np.array([np.mean(many) for many in one.rewards.values()]))  # type: ignore[union-attr,arg-type]
        for one in (best, base)
    ]
    normal = paired_difference(*means)
    assert found.reward_difference.mean == pytest.approx(normal.mean)  # type: ignore[union-attr]
    assert found.reward_difference.low == pytest.approx(normal.low, abs=0.05)  # type: ignore[union-attr]
    assert found.tokens.mean == found.diversity.words.mean  # type: ignore[union-attr]


def test_it_is_json_and_one_line() -> None:
    base, best = answered("base", 1), answered("best", 3, is_best=True)
    kl = divergence(["00", "01"], [2.0, 4.0], [1.0, 5.0], [10, 20])
    margins = held_out(Values(["a", "b"], ["p", "q"], np.array([1.0, 2.0])))
    found = evaluation(
        best, baseline=base, judge="gold", reference="start", kl=kl, held_out=margins, warnings=["beware"]
    )
    told = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert told["win_rate"]["raw"]["mean"] == found.win_rate.raw.mean  # type: ignore[union-attr]
    assert told["kl"]["per_token"] == pytest.approx(0.2)
    assert told == as_json(found)
    line = summary(found)
    assert "\n" not in line
    assert line.startswith(f"best: wins {100 * found.win_rate.raw.mean:.1f} % (")  # type: ignore[union-attr]
    for part in (" against base by gold; at equal lengths ", "; held-out accuracy 100.0 %", "; beware"):
        assert part in line
    assert "KL to start 3 (2 to 4) nats an answer, 0.2 a token" in line


def test_a_model_alone_has_a_reward_and_texts() -> None:
    found = evaluation(replace(answered("base", 1), num_tokens=None), judge="gold")
    assert found.win_rate is None
    assert found.tokens is None
    assert summary(found).startswith("base: reward ")
    texts = evaluation(Answered("base", {"a": ["one two", ""]}))
    assert summary(texts) == "base: 1 words; 1 of 2 answers empty; distinct-2 1.00; self-similarity 0.00"


def test_verdicts_of_a_pairwise_judge_are_told_with_their_order() -> None:
    model, base = Answered("m", {"a": ["x"], "b": ["y"]}), Answered("b", {"a": ["x"], "b": ["y"]})
    verdicts = Comparison(("a", "b"), np.array([1.0, 0.0]), np.array([2.0, -3.0]), 1, 1.5)
    found = evaluation(model, baseline=base, judge="user", comparison=verdicts)
    assert found.win_rate.first_place_share == 0.75  # type: ignore[union-attr]
    assert "50 % of its verdicts turn with the order" in summary(found)


def test_several_seeds_have_one_interval() -> None:
    base = answered("base", 1)
    lengths = {p: [1.0] * len(many) for p, many in base.texts.items()}
    runs = [
        compare_rewards(answered("best", seed, is_best=True).rewards, base.rewards, (lengths, lengths))  # type: ignore[arg-type]
        for seed in range(10, 14)
    ]
    found = win_rate_of_runs(runs)
    assert found is not None
    assert found.mean == pytest.approx(np.mean([win_rate(one, num_draws=100).raw.mean for one in runs]))
    assert found.low > 0.5  # type: ignore[operator]
    assert (found.num_items, found.num_prompts) == (4 * 40 * 4, 40)
    assert win_rate_of_runs([]) is None


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (Answered("m", {}), {}, "no prompt was answered"),
        (
            Answered("m", {"a": ["x"]}, rewards={"a": [1, 2]}),
            {},
            r"its rewards do not align .* for 1 prompts",
        ),
        (Answered("m", {"a": ["x"]}, rewards={"a": [1], "b": [1]}), {}, r"its rewards do not align .* first: \['b'\]"),
        (Answered("m", {"a": ["x"]}, num_tokens={}), {}, "its numbers of tokens do not align"),
        (
            Answered("m", {"a": ["x"]}),
            {"comparison": Comparison(("a",), np.ones(1), np.ones(1))},
            "a comparison without its baseline",
        ),
        (
            Answered("m", {"a": ["x"]}, rewards={"a": [1]}),
            {"baseline": Answered("b", {"b": ["x"]}, rewards={"b": [1]})},
            r"the baseline has none to 1 prompts, first: \['a'\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model: Answered, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluation(model, **options)
