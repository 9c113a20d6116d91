from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefsel.errors import NonFiniteError, UserError
from prefsel.generate.sample import sample
from prefsel.scratch.models import RewardPair, _accuracy, save, train_policy, train_reward, train_tokenizer

QUESTIONS = ["ant", "bee", "cat", "dog", "eel", "fox"]
ANSWERS = ["six legs", "six legs", "four legs", "four legs", "no legs at all", "four legs"]
TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 32, "batch_tokens": 256}


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [talk(question, answer) for question, answer in zip(QUESTIONS, ANSWERS)]
# `long` prefers the answer of more words, `cat` the one that names a cat; they are independent.
LONG = [
    RewardPair(talk(question, "yes " * more), talk(question, "yes " * less), "long")
    for question in QUESTIONS
    for more, less in ((2, 1), (4, 1), (4, 2), (5, 3))
]
CAT = [
    RewardPair(talk(question, f"{before} cat"), talk(question, f"{before} dog"), "cat")
    for question in QUESTIONS
    for before in ("yes", "no", "yes no", "no no yes")
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*QUESTIONS, *ANSWERS, "yes no"], kind="word", vocab_size=64)


def tokens_of(tokenizer, conversation) -> torch.Tensor:
    return tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)["input_ids"]


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_policy_loss_is_the_mean_token_loss(tokenizer, loss_on):
    losses = []
    # A learning rate of 0 leaves the initial model, so that the first loss can be recomputed one sequence at a time.
    model = train_policy(
        tokenizer,
        CONVERSATIONS,
        steps=1,
        lr=0.0,
        seed=3,
        loss_on=loss_on,
        on_step=lambda step, total, loss: losses.append((step, total, loss)),
        **TINY,
    )
    expected = []
    for question, conversation in zip(QUESTIONS, CONVERSATIONS):
        tokens_1T = tokens_of(tokenizer, conversation)
        logps_1TV = model(input_ids=tokens_1T).logits.log_softmax(dim=-1)
        # bos user QUESTION end assistant | answer end
        start = len(question.split()) + 4 if loss_on == "response" else 1
        expected += [-logps_1TV[0, t - 1, tokens_1T[0, t]].item() for t in range(start, tokens_1T.shape[1])]
    assert losses == [(1, 1, pytest.approx(np.mean(expected), rel=1e-5))]


def test_the_reward_loss_is_bradley_terry_on_the_own_and_the_union_head(tokenizer):
    losses = []
    pairs = [LONG[0], CAT[0], CAT[1], RewardPair(*talk_pair())]
    model, _ = train_reward(
        tokenizer,
        pairs,
        heads=["long", "cat"],
        union_head="overall",
        steps=1,
        lr=0.0,
        seed=3,
        holdout=0.0,
        on_step=lambda step, total, loss: losses.append(loss),
        **TINY,
    )
    head = {"long": 0, "cat": 1}
    expected = []
    for pair in pairs:
        margin_H = (
            model(input_ids=tokens_of(tokenizer, pair.chosen)).logits
            - model(input_ids=tokens_of(tokenizer, pair.rejected)).logits
        )[0]
        heads = [2] if pair.head is None else [head[pair.head], 2]
        expected += [-math.log(1 / (1 + math.exp(-margin_H[h].item()))) for h in heads]
    assert len(expected) == 7
    assert losses == [pytest.approx(np.mean(expected), rel=1e-5)]


def talk_pair():
    return talk("ant", "six legs"), talk("ant", "no legs")


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_seed_decides_and_the_callers_state_is_untouched(tokenizer):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first, again, other = (
        weights(train_policy(tokenizer, CONVERSATIONS, steps=5, lr=1e-2, seed=seed, **TINY)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_a_policy_learns_its_answers_and_loads_again(tokenizer, tmp_path):
    policy = train_policy(tokenizer, CONVERSATIONS, steps=150, lr=2e-2, seed=0, **TINY)
    assert sample(policy, tokenizer, QUESTIONS, temperature=0.0, max_new_tokens=8) == ANSWERS
    save(policy, tokenizer, tmp_path)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in tmp_path.iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_1T = tokens_of(AutoTokenizer.from_pretrained(tmp_path), CONVERSATIONS[4])
    assert torch.equal(loaded(input_ids=tokens_1T).logits, policy(input_ids=tokens_1T).logits)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id


def test_a_reward_model_learns_its_aspects_and_loads_again(tokenizer, tmp_path):
    model, accuracy = train_reward(
        tokenizer,
        LONG + CAT,
        heads=["long", "cat"],
        union_head="overall",
        steps=200,
        lr=1e-2,
        seed=0,
        holdout=0.3,
        **TINY,
    )
    assert list(accuracy) == ["long", "cat", "overall"]
    assert accuracy["long"] == accuracy["cat"] == 1.0
    # One number for both rules, from a dozen held-out pairs: at most one of them wrong.
    assert accuracy["overall"] > 0.9
    save(model, tokenizer, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "long", 1: "cat", 2: "overall"}
    assert loaded.config.num_labels == 3
    # A longer row beside it pads the short one; its reward stays.
    conversations = [talk("ant", "yes"), talk("ant", "yes yes yes yes")]
    rows = tokenizer.apply_chat_template(conversations, padding=True, return_tensors="pt", return_dict=True)
    batched_BH = loaded(**rows).logits
    alone_BH = torch.cat([model(input_ids=tokens_of(tokenizer, one)).logits for one in conversations])
    torch.testing.assert_close(batched_BH, alone_BH)
    assert batched_BH[1, 0] > batched_BH[0, 0]


def test_prompts_are_held_out_whole(tokenizer):
    # There is one prompt: either nothing is held out, or everything.
    pairs = [RewardPair(talk("ant", "yes"), talk("ant", "no"), "a") for _ in range(40)]
    with pytest.raises(UserError, match=r"with holdout 1\.0"):
        train_reward(tokenizer, pairs, heads=["a"], steps=1, lr=0.0, seed=0, holdout=1.0, **TINY)
    seen = set()
    for seed in range(8):
        try:
            _, accuracy = train_reward(tokenizer, pairs, heads=["a"], steps=1, lr=0.0, seed=seed, holdout=0.5, **TINY)
            seen.add(math.isnan(accuracy["a"]))
        except UserError:
            seen.add("all held out")
    assert seen == {True, "all held out"}


def test_a_tie_counts_half():
    margin_PH = torch.tensor([[1.0, 0.0], [0.0, -2.0], [-1.0, 0.0], [0.0, 3.0]])
    is_label_PH = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    found = _accuracy(lambda batch: margin_PH[batch], np.arange(4), is_label_PH, ["a", "b"])
    assert found == {"a": (1 + 0.5 + 0 + 0.5) / 4, "b": (0.5 + 0.5) / 2}  # what a head does not label is not counted


def test_a_head_without_held_out_pairs_has_no_accuracy(tokenizer):
    _, accuracy = train_reward(tokenizer, LONG, heads=["long"], steps=1, lr=0.0, seed=0, holdout=0.0, **TINY)
    assert math.isnan(accuracy["long"])


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        (LONG, {"heads": ["short"]}, "'long'; valid: short"),
        (LONG, {"heads": []}, "heads: got none"),
        ([RewardPair(*talk_pair())], {"heads": ["long"]}, "no head"),
        ([], {"heads": ["long"]}, "none of 0"),
        (LONG, {"heads": ["long"], "hidden_size": 18}, "multiples of 2 x num_heads = 4"),
    ],
)
def test_pairs_and_sizes_that_do_not_fit_are_named(tokenizer, pairs, options, message):
    with pytest.raises(UserError, match=message):
        train_reward(tokenizer, pairs, steps=1, lr=0.0, seed=0, **{**TINY, **options})


def test_no_conversation_is_refused(tokenizer):
    with pytest.raises(UserError, match="conversations"):
        train_policy(tokenizer, [], steps=1, lr=0.0, seed=0, **TINY)


def test_a_diverged_loss_is_a_fault(tokenizer):
    with pytest.raises(NonFiniteError, match="lower lr"):
        train_policy(tokenizer, CONVERSATIONS, steps=20, lr=1e30, seed=0, **TINY)
