"""Records and rows of answers beside those of a baseline: small tables, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_policies
from transformers import AutoTokenizer

from prefsel.config import EarlyStop, FormatOptions, PairwiseFunction
from prefsel.config.file import parse_config
from prefsel.errors import NonFiniteError, UserError
from prefsel.evaluate.comparison import Comparison, compare_rewards
from prefsel.evaluate.intervals import Values
from prefsel.evaluate.judged import Answers, compared, joined, measured
from prefsel.ingest.formats import prompt_adapter
from prefsel.plan.check import check_names
from prefsel.plan.evaluated import reward_columns, warnings
from prefsel.plan.evaluations import baseline_of, evaluation_plan, finals, models_to_evaluate, used_columns
from prefsel.plan.nodes import make_plan
from prefsel.play import why_ended
from prefsel.schema import GROUPS
from prefsel.score.divergence import DivergenceScorer
from prefsel.score.function import FunctionScorer, reward_judge
from prefsel.workspace.storage import Storage
from prefsel.world.gold import gold

Rewards = dict[str, list[float | None]]


def answers(model: str, rewards: Rewards, **columns: Any) -> Answers:
    """An answer per reward, each as long as its place says."""
    texts = {prompt: [f"{model} {'x' * place}" for place in range(len(many))] for prompt, many in rewards.items()}
    tokens = {prompt: [float(place + 1) for place in range(len(many))] for prompt, many in rewards.items()}
    return Answers(model, texts, tokens, {"rm_j": rewards, **columns}, dict.fromkeys(texts, "s0"))


OURS = answers("m", {"a": [3.0, 1.0], "b": [2.0], "c": [0.5, None]})
THEIRS = answers("b", {"a": [2.0], "b": [2.0, 4.0], "c": [0.0], "d": [9.0]})


def record(ours: Answers, theirs: Answers | None, verdicts: Any = None) -> Any:
    own, other = compared(ours, theirs)
    return measured(own, other, judges=["j"], verdicts=verdicts or {}, held_out=None, warnings={}, num_draws=200)


def test_numbers_by_hand() -> None:
    found = record(OURS, THEIRS)
    judge = found.judges["j"]
    assert judge.num_prompts == 3
    assert judge.reward.mean == (3 + 1 + 2 + 0.5) / 4
    # Prompt by prompt: 2 − 2, 2 − 3, 0.5 − 0.
    assert judge.reward_difference.mean == pytest.approx((0 - 1 + 0.5) / 3)
    # a: one win of two; b: a tie and a loss; c: a win.
    assert judge.win_rate.raw.mean == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert judge.warnings == ("judge 'j' says nothing of 1 of its 5 answers",)
    rows = found.prompts.to_pydict()
    assert rows["prompt_id"] == ["a", "b", "c"]
    assert rows["reward_j"] == [2.0, 2.0, 0.5]
    assert rows["baseline_reward_j"] == [2.0, 3.0, 0.0]
    assert rows["win_j"] == [0.5, 0.25, 1.0]
    assert rows["num_tokens"] == [1.5, 1.0, 1.5]


def test_one_text_has_one_reward_whoever_said_it() -> None:
    """What a judge's arithmetic does in the last digits is no victory."""
    ours, theirs = answers("m", {"a": [1.0, 5.0]}), answers("b", {"a": [1.0 + 1e-12, 2.0]})
    same = {"a": ["the same", "another"]}, {"a": ["the same", "a third"]}
    ours, theirs = replace(ours, texts=same[0]), replace(theirs, texts=same[1])
    rows = record(ours, theirs).prompts.to_pydict()
    # The same: a tie with itself, a loss against 2; 5 wins twice.
    assert rows["win_j"] == [(0.5 + 0 + 1 + 1) / 4]
    assert rows["reward_j"] == [(1.0 + 0.5e-12 + 5) / 2]


def test_what_a_judge_did_not_read_is_told_of_both_models() -> None:
    ours = answers("m", {"a": [3.0, 1.0], "b": [2.0], "c": [0.5]})
    theirs = answers("b", {"a": [2.0, None], "b": [None, None], "c": [0.0]})
    judge = record(ours, theirs).judges["j"]
    assert (judge.num_prompts, judge.num_answers) == (2, 3)
    assert judge.warnings == (
        "judge 'j' says nothing of 3 of b's 5 answers",
        "judge 'j' leaves out 1 prompts, of which it read the answers of one model alone",
    )


def test_what_is_told_of_a_judge_stands_with_it() -> None:
    own, other = compared(OURS, THEIRS)
    found = measured(
        own, other, judges=["j"], verdicts={}, held_out=None, warnings={"j": "told", "k": "of another"}, num_draws=100
    )
    assert found.judges["j"].warnings == ("told", "judge 'j' says nothing of 1 of its 5 answers")
    assert found.overall.warnings == ()


def test_shards_change_nothing() -> None:
    parts = [OURS.of(["b"]), OURS.of(["a", "c"])]
    assert record(joined("m", parts), THEIRS).judges == record(OURS, THEIRS).judges


def test_win_rates_of_both_sides_make_one() -> None:
    lengths = tuple({p: [float(len(t)) for t in many] for p, many in one.texts.items()} for one in (OURS, THEIRS))
    shared = {"a", "b"}
    ours, theirs = (
        answers(one.model, {p: r for p, r in one.columns["rm_j"].items() if p in shared}) for one in (OURS, THEIRS)
    )
    verdict = compare_rewards(
        {p: [r for r in many if r is not None] for p, many in ours.columns["rm_j"].items()},
        {p: [r for r in many if r is not None] for p, many in theirs.columns["rm_j"].items()},
        (lengths[0], lengths[1]),
    )
    turned = Comparison(verdict.prompts, -verdict.advantage_M, -verdict.length_difference_M)
    there = record(ours, theirs, {"two": verdict}).judges
    back = record(theirs, ours, {"two": turned}).judges
    for judge in ("j", "two"):
        for part in ("raw", "length_controlled"):
            one, other = (getattr(found[judge].win_rate, part) for found in (there, back))
            assert one.mean == 1 - other.mean
            assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))
    assert there["j"].reward_difference.mean == -back["j"].reward_difference.mean


def test_a_model_without_a_baseline_is_measured_alone() -> None:
    found = record(OURS, None)
    assert found.judges["j"].win_rate is None
    assert found.judges["j"].reward.mean == 6.5 / 4
    assert "win_j" not in found.prompts.column_names


def test_divergence_is_over_the_answers_that_have_one() -> None:
    columns = {"kl_m": {"a": [1.0, 3.0], "b": [2.0], "c": [None, 4.0]}}
    columns["log_ratio_m"] = {"a": [0.0, 3.0], "b": [2.0], "c": [None, 5.0]}
    columns["kl_tokens_m"] = {"a": [2.0, 2.0], "b": [2.0], "c": [None, 4.0]}
    found = record(answers("m", {"a": [3.0, 1.0], "b": [2.0], "c": [0.5, 0.5]}, **columns), THEIRS)
    kl = found.overall.kl
    assert (kl.per_response.mean, kl.monte_carlo.mean) == (2.5, 2.5)
    assert kl.per_token == 10 / 10
    assert kl.num_tokens == 10
    assert found.prompts["kl"].to_pylist() == [2.0, 2.0, 4.0]


def test_a_judge_that_reads_nothing_and_models_that_share_no_prompt() -> None:
    silent = answers("m", {"a": [None, None], "b": [None]})
    with pytest.raises(UserError, match=r"'j' gave none of the 3 answers of 'm' a reward; .*too_long"):
        record(silent, THEIRS)
    with pytest.raises(UserError, match="'j' gave none of the 3 answers of 'b' a reward"):
        record(answers("m", {"a": [1.0], "b": [1.0]}), answers("b", {"a": [None, None], "b": [None]}))
    with pytest.raises(UserError, match="both 'm' and 'b' a reward for no prompt"):
        record(answers("m", {"a": [1.0], "b": [None]}), answers("b", {"a": [None], "b": [1.0]}))
    with pytest.raises(UserError, match=r"no prompt has an answer of it \(0 have\) and of its baseline b \(4 have\)"):
        compared(answers("m", {}), THEIRS)


# ------------------------------------------------------------------------------------------------- rewards of functions


def groups(*texts: list[str]) -> pa.Table:
    rows = [
        {
            "prompt_id": bytes([number]) * 16,
            "prompt": [{"role": "user", "content": "tell me about lamp"}],
            "completions": [
                {"completion_id": bytes(16), "messages": [{"role": "assistant", "content": text}], "ratings": []}
                for text in many
            ],
            "provenance": {"row": number},
        }
        for number, many in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=GROUPS)


def test_a_function_scores_every_completion() -> None:
    scored = FunctionScorer("g", "counting_judges:goods").score(groups(["good bad", "good good"], [], ["bad"]))
    assert scored.columns == {"rm_g": [[1.0, 2.0], [], [0.0]]}
    said = "the lamp is warm ."
    found = FunctionScorer("gold", "prefsel.world.gold:gold").score(groups([said]))
    assert found.columns == {"rm_gold": [[gold("tell me about lamp", said)]]}
    assert FunctionScorer("g", "counting_judges:goods").score(groups([])).columns == {"rm_g": [[]]}


def test_a_function_that_gives_no_number_is_named_with_the_prompts() -> None:
    with pytest.raises(NonFiniteError, match=rf"counting_judges:undecided.*2 rewards are NaN .*{'01' * 16}"):
        FunctionScorer("u", "counting_judges:undecided").score(groups([], ["good", "bad"]))


# ----------------------------------------------------------------------------------------------- divergence as a column


def test_a_divergence_needs_the_same_tokens(tmp_path: Path) -> None:
    base, better = (tiny_policies.save_policy(tmp_path / name, goodness=g) for name, g in (("a", 0.0), ("b", 2.0)))
    loading = {"revision": None, "trust_remote_code": False, "gpus_per_replica": 1, "dtype": "fp32"}

    def scorer(reference: Path) -> DivergenceScorer:
        given = {**loading, "path": str(reference)}
        return DivergenceScorer(
            name="m", path=str(better), dtype="fp32", reference=given, max_length=64, token_budget=64, device="cpu"
        )

    scored = scorer(base).score(groups(["good bad", "red"], ["new"]))
    assert list(scored.columns) == ["kl_m", "log_ratio_m", "kl_tokens_m"]
    assert scored.columns["kl_tokens_m"] == [[3, 2], [2]]  # with the end of the turn
    assert min(value for row in scored.columns["kl_m"] for value in row) > 0
    assert scorer(better).score(groups(["good"])).columns["kl_m"] == [[0.0]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "user")
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"divergence of 'm': its tokenizer is another one .*evaluate\.divergence"):
        scorer(base)


# --------------------------------------------------------------------------------------------------------- as planned


def table(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """A corpus whose best pairs by a function are trained on, by a model that lies in a folder."""
    corpus = tiny_policies.save_prompts(tmp_path / "pairs.jsonl", 8)
    goods = {"kind": "function", "name": "goods", "function": "counting_judges:goods"}
    gold_reward = {**goods, "name": "gold", "function": "prefsel.world.gold:gold"}
    made = {
        "name": "x",
        "sources": [{"name": "s", "paths": [str(corpus)]}],
        "split": {"holdout": 0.5},
        "models": [{"name": "base", "path": str(tmp_path)}, {"name": "other", "path": str(tmp_path)}],
        "scorers": [{"kind": "causal_logps", "model": "base"}, goods],
        "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "goods"}}],
        "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}}],
        "train": [
            {"name": name, "selection": of, "model": "base", "reference": "base", "learning_rate": 1e-3}
            for name, of in (("dpo", "top"), ("everything", "all"))
        ],
        "evaluate": {"judges": [goods, {**goods, "name": "again"}, gold_reward]},
    }
    return made | more


def test_every_trained_policy_is_evaluated_against_what_it_started_from(tmp_path: Path) -> None:
    config = parse_config(table(tmp_path))
    assert models_to_evaluate(config) == [spec.name for spec in finals(config)] == ["dpo", "everything"]
    assert baseline_of(config, "dpo") == "base"
    chosen = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"baseline": "other", "models": ["base", "other"]})}  # type: ignore[union-attr]
    )
    assert models_to_evaluate(chosen) == ["base", "other"]
    assert [baseline_of(chosen, name) for name in ("base", "other", "dpo")] == ["other", None, "other"]


def test_a_pairwise_judge_is_not_called_like_a_reward(tmp_path: Path) -> None:
    plan = make_plan(parse_config(table(tmp_path)), Storage(str(tmp_path)))
    duel = PairwiseFunction(name="harmless", function="counting_judges:more_goods")
    options = plan.config.evaluate.model_copy(update={"pairwise": [duel]})  # type: ignore[union-attr]
    (column, *_) = reward_columns(plan)
    same = duel.model_copy(update={"name": column.removeprefix("rm_")})
    for one, is_refused in ((duel, False), (same, True)):
        changed = plan.config.model_copy(update={"evaluate": options.model_copy(update={"pairwise": [one]})})
        other = make_plan(changed, Storage(str(tmp_path)))
        if is_refused:
            with pytest.raises(UserError, match=r"evaluate\.pairwise: the name .* is that of a reward already"):
                reward_columns(other)
        else:
            assert column in reward_columns(other)


def test_a_judge_that_chose_the_pairs_is_told(tmp_path: Path) -> None:
    plan = make_plan(parse_config(table(tmp_path)), Storage(str(tmp_path)))

    def told(selection: str) -> dict[str, str]:
        return warnings(evaluation_plan(plan, "dpo", None, lambda: used_columns(plan, [selection])))

    # `again` is the same code under another name.
    assert list(told("top")) == ["goods", "again"]
    for name, warning in told("top").items():
        assert warning.startswith(f"judge {name!r} also chose what the model was trained on (goods)")
    assert told("all") == {}


def test_the_code_of_a_function_is_in_the_recipe(tmp_path: Path) -> None:
    plan = make_plan(parse_config(table(tmp_path)), Storage(str(tmp_path)))
    recipe = plan.node("columns", "goods").recipe
    assert recipe["settings"]["code"] == reward_judge("counting_judges:goods").identity
    outer = evaluation_plan(plan, "dpo", None)
    assert outer.node("columns", "goods").fingerprint == plan.node("columns", "goods").fingerprint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"split": {}}, r"evaluate\.prompts\.part: nothing is held out; set split\.holdout, or give"),
        ({"evaluate": {"prompts": {"part": "exclude"}}}, r"no prompt is excluded; give exclude_prompts"),
        ({"evaluate": {"models": ["nobody"]}}, r"evaluate\.models: got 'nobody'"),
        ({"evaluate": {"baseline": "nobody"}}, r"evaluate\.baseline: got 'nobody'"),
        ({"evaluate": {"judges": [{"kind": "imported", "name": "i"}]}}, r"evaluate\.judges\.kind: got 'imported'"),
        (
            {"evaluate": {"judges": [{"kind": "function", "name": "f", "function": "counting_judges:nothing"}]}},
            r"evaluate\.judges\.function: judge 'counting_judges:nothing': it cannot be imported",
        ),
        (
            {"evaluate": {"pairwise": [{"name": "f", "function": "counting_judges:goods"}]}},
            r"evaluate\.pairwise\.function: .*3 lists",
        ),
        ({"evaluate": {"generation": {"temperature": 0.5}}}, r"temperature 1 and top_p 1, or divergence: false"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_names(make_plan(parse_config(table(tmp_path, **change)), Storage(str(tmp_path))))


@pytest.mark.parametrize(
    "question",
    [
        {"instruction": "Write it", "output": "x", "generator": "m", "dataset": "d"},
        {"uid": "u", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write it"},
        {"question_id": "q", "category": "c", "cluster": "c", "turns": [{"content": "Write it"}]},
    ],
)
def test_questions_of_benchmarks_are_prompts(question: dict[str, Any]) -> None:
    (found,) = prompt_adapter(None)(question, FormatOptions())  # type: ignore[misc]
    assert found.prompt == [{"role": "user", "content": "Write it"}]


def test_rounds_end_when_the_reward_no_longer_rises() -> None:
    def rewards(**of_prompts: float) -> Values:
        names = [*of_prompts]
        return Values(names, names, np.array([*of_prompts.values()]))

    stop, before = EarlyStop(judge="gold", min_gain=0.1), rewards(a=2.0, b=0.0)
    assert why_ended(stop, before, rewards(a=2.2, b=0.2)) == ""
    assert why_ended(stop, before, rewards(b=0.05, a=2.05)) == (
        "the mean reward by gold changed by +0.05 over 2 prompts; another round needs a rise of more than 0.1"
    )
    # The hard prompt has no answer of use any more: the mean over what is left is 1 more, and nothing was gained.
    assert "changed by +0 over 1 prompts" in why_ended(stop, before, rewards(a=2.0))
    assert why_ended(stop, rewards(a=1.0), rewards(b=9.0)).startswith("no prompt has a reward by gold")
