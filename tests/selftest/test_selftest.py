"""Healthy models pass in every way of making rows; every planted fault is called by its name."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_models import CHATML, naive_logps, randomize, tiny_causal, tiny_reward
from tiny_models import bpe_tokenizer as trained_tokenizer
from transformers import BartConfig, BartForSequenceClassification

from prefsel.cli import app, guarded
from prefsel.config.file import parse_config
from prefsel.errors import PrefselError, UserError
from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.models.logps import Route
from prefsel.progress import Progress
from prefsel.selftest import check, diagnosis, lines, require_agreement, selftest, subject, ways
from prefsel.selftest.check import check_model
from prefsel.selftest.diagnosis import WIDER, compare
from prefsel.selftest.subject import Finding, ModelCheck, Sample, Subject, read_sample
from prefsel.selftest.ways import precision, reference

TEXTS = [
    ("who sat where?", ["the cat sat on the mat.", "a dog."]),
    ("write a story", ["the cat can bake bread, and then the dog saw the cat!", "why?", "bread rises"]),
    ("explain bread", ["bread rises", "the mat that can bake"]),
    ("the dog", ["sat", "saw the cat and the mat and the bread and the dog, who sat"]),
    ("please explain why a cat can bake bread, and then write a short story about the dog", ["no.", "the end"]),
    *((f"cat {n}?", [f"a dog {n}", f"a short story about {n} cats and {n} dogs"]) for n in range(5)),
]
NUM_COMPLETIONS = 21
EOS = "</s>"


bpe_tokenizer = functools.cache(trained_tokenizer)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def sample_of(texts: list[tuple[str, list[str]]]) -> Sample:
    groups = [
        ([{"role": "user", "content": prompt}], [[{"role": "assistant", "content": text}] for text in answers])
        for prompt, answers in texts
    ]
    return Sample(groups, [f"{number:012x}" for number in range(len(groups))], "test")


def checked(
    model: Any,
    tokenizer: Any = None,
    texts: list[tuple[str, list[str]]] = TEXTS,
    *,
    reward: bool = False,
    **options: Any,
) -> ModelCheck:
    limits = {name: options.pop(name) for name in ("template", "max_length", "truncation") if name in options}
    encoder = Encoder(tokenizer or bpe_tokenizer(), **limits)
    return check_model("tiny", model, encoder, sample_of(texts), is_reward=reward, **options)


def causes(found: ModelCheck, level: str = "FAIL") -> list[str]:
    return [finding.cause for finding in found.findings if finding.level == level]


def message(found: ModelCheck, cause: str) -> str:
    return next(finding.message for finding in found.findings if finding.cause == cause)


def failed(found: ModelCheck) -> set[str]:
    return {comparison.check for comparison in found.comparisons if not comparison.is_ok}


WAYS = ["all groups together", "reversed", "1 group a row", "2 groups a row", "8 groups a row"]
PADDED = {"padded, 1 sequence", "padded, 2 sequences", "padded, 8 sequences"}


# ------------------------------------------------------------------------------------------------------------ healthy


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
@pytest.mark.parametrize("reward", [False, True])
def test_a_healthy_model_agrees_at_every_batch_size(model_type, reward):
    model = tiny_reward(model_type, num_labels=2) if reward else tiny_causal(model_type)
    found = checked(model, reward=reward, token_budget=150)
    assert found.findings == []
    assert [c.check for c in found.comparisons] == [f"packed, {way}" for way in WAYS] + sorted(PADDED)
    assert all(c.is_ok and c.num_compared == NUM_COMPLETIONS for c in found.comparisons)
    assert all(c.difference < c.tolerance == 1e-5 for c in found.comparisons)
    assert found.facts[1] == "engine: rows of at most 150 tokens, packed"
    assert lines([found])[-1] == "selftest: 1 model, all agree"
    require_agreement([found])


def test_half_precision_passes_within_its_noise():
    found = checked(tiny_causal("llama", scale=0.1).bfloat16())
    assert found.findings == []
    assert all(0 < c.difference < c.tolerance < 0.05 for c in found.comparisons if "packed" in c.check)


@pytest.mark.parametrize(
    ("model_type", "options", "why"),
    [("mistral", {"sliding_window": 8}, "sliding-window"), ("gemma2", {}, "'gemma2' is not among the tested")],
)
def test_a_model_that_cannot_be_packed_is_padded_and_says_why(model_type, options, why):
    found = checked(tiny_causal(model_type, **options))
    assert found.failures == []
    assert "padded, because" in found.facts[1]
    assert why in found.facts[1]
    assert [c.check for c in found.comparisons][:5] == [f"padded by length, {way}" for way in WAYS]


def test_a_policy_without_a_pad_token_is_padded_all_the_same():
    found = checked(tiny_causal(), bpe_tokenizer(pad_token=""))
    assert found.findings == []
    assert [c.num_compared for c in found.comparisons] == [NUM_COMPLETIONS] * 8


def test_responses_without_their_prompts():
    found = checked(tiny_causal(), bpe_tokenizer(bos=True), is_bare=True)
    assert found.findings == []
    assert len(found.comparisons) == 8


def subject_of(model: Any, groups: list[EncodedGroup], reward: bool = False) -> Subject:
    return Subject(model, Encoder(bpe_tokenizer()), groups, reward, 0, token_budget=1000)


def test_the_reference_is_one_sequence_at_a_time():
    model = tiny_causal()
    groups = [EncodedGroup([5, 6, 7], [[8, 9], [], [10]], ["ok", "too_long", "ok"], 1, (1, 0, 0))]
    expected = {(0, 0): ([6, 7], [8, 9]), (0, 2): ([5, 6, 7], [10])}
    found = reference(subject_of(model, groups))
    with torch.no_grad():
        naive = {key: [float(naive_logps(model, *tokens))] for key, tokens in expected.items()}
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in naive.items()}


def test_differences_by_hand():
    """Relative to the log-prob, but to a nat per token at least; to the largest reward of the head."""
    groups = [EncodedGroup([5], [[6] * 4, [6] * 2], ["ok", "ok"], 0)]
    policy, reward = subject_of(tiny_causal(), groups), subject_of(tiny_reward(num_labels=2), groups, True)
    expected = {(0, 0): [-0.5], (0, 1): [-10.0]}
    found = compare("x", policy, {(0, 0): [-0.5], (0, 1): [-10.001]}, expected)
    assert (found.worst, found.disagreeing, found.difference) == ((0, 1), {(0, 1)}, pytest.approx(1e-4))
    assert compare("x", policy, {(0, 0): [-0.50002], (0, 1): [-10.0]}, expected).difference == pytest.approx(5e-6)
    broken = compare("x", policy, {(0, 0): [math.nan], (0, 1): [-10.0]}, expected)
    assert (broken.difference, broken.disagreeing) == (math.inf, {(0, 0)})
    heads = {(0, 0): [1.0, 0.0], (0, 1): [-4.0, 0.1]}
    found = compare("x", reward, {(0, 0): [1.0, 0.05], (0, 1): [-4.0, 0.1]}, heads)
    assert (found.worst, found.difference) == ((0, 0), pytest.approx(0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_wider_dtype_leaves_no_trace(dtype):
    model = tiny_causal().to(dtype)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float() * 1.000001
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with precision(model, WIDER[dtype]):
        assert model.dtype == WIDER[dtype]
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


# ----------------------------------------------------------------------------------------------------- planted faults


def layer_output(change: Any) -> Any:
    """A hook that changes a layer's hidden states."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def test_output_that_depends_on_neighbours_in_packed_rows():
    """Every token sees a little of the whole row: other groups when packed, the padding when padded."""
    model = tiny_causal()
    model.model.layers[0].register_forward_hook(layer_output(lambda h: h + 0.1 * h.mean(dim=1, keepdim=True)))
    found = checked(model)
    assert causes(found) == ["neighbours", "mask"]
    assert {"packed, all groups together", "packed, 1 group a row", "padded, 8 sequences"} <= failed(found)
    assert "padded, 1 sequence" not in failed(found)
    assert "none when alone in its row" in message(found, "neighbours")


def test_output_that_depends_on_neighbours_in_padded_batches():
    """Batch statistics: harmless alone, also when padded alone."""
    model = tiny_reward()
    model.model.layers[0].register_forward_hook(layer_output(lambda h: h - 0.1 * h.mean(dim=0, keepdim=True)))
    found = checked(model, reward=True)
    assert causes(found) == ["neighbours"]
    assert failed(found) == {"padded, 2 sequences", "padded, 8 sequences"}
    with pytest.raises(PrefselError, match="tiny: neighbours") as raised:
        require_agreement([found])
    assert raised.value.exit_code == 1


def test_a_rotary_embedding_that_follows_the_longest_sequence():
    """transformers' dynamic scaling keeps the longest length it has met; a run gives every sequence its own."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_causal("llama", max_position_embeddings=24, rope_parameters=rope)
    assert causes(checked(model)) == []
    assert causes(checked(model, max_length=24)) == []


@pytest.mark.parametrize("is_deaf", [False, True])
def test_an_encoder_that_ignores_its_mask(is_deaf):
    model = tiny_reward("bert")
    if is_deaf:
        forward = model.forward

        @functools.wraps(forward)
        def without_mask(*args: Any, attention_mask: Any = None, **options: Any) -> Any:
            return forward(*args, **options)

        model.forward = without_mask
    found = checked(model, reward=True)
    assert causes(found) == (["mask"] if is_deaf else [])
    if is_deaf:
        assert "the model ignores it" in message(found, "mask")
        assert "padded, 1 sequence" not in failed(found)
        # A run finds that padding counts, and gives every sequence a row of its own.
        assert failed(found) == {"padded, 2 sequences", "padded, 8 sequences"}


@pytest.mark.parametrize("own", [None, 2])
def test_pad_equal_to_eos(own):
    """transformers reads the token before the eos when the eos pads, the eos when nothing does."""
    model, tokenizer = tiny_reward(pad_token_id=own), bpe_tokenizer(pad_token=EOS)
    found = checked(model, tokenizer, reward=True, template="hh")
    if own is None:
        assert causes(found) == ["pad = eos"]
        assert failed(found) == PADDED
        assert "write pad_token_id 2 there" in message(found, "pad = eos")
    else:
        assert causes(found) == []
        assert "token before the last eos" in message(found, "pad = eos")
    assert model.config.pad_token_id == own


def test_pad_equal_to_eos_loses_no_token_of_a_policy():
    found = checked(tiny_causal(), bpe_tokenizer(pad_token=EOS), template="hh")
    assert found.failures == []
    assert message(found, "pad = eos").endswith(f"a mask of `ids != pad` would lose {NUM_COMPLETIONS} of them")


def test_another_pad_token_and_none():
    found = checked(tiny_reward(pad_token_id=3), reward=True)
    assert found.failures == []
    assert message(found, "pad token").startswith("the model's pad token is 3, the tokenizer's 0")
    found = checked(tiny_reward(pad_token_id=None), bpe_tokenizer(pad_token=""), reward=True)
    assert found.failures == []
    assert "neither model nor tokenizer has one" in message(found, "pad token")
    assert failed(found) == set()
    assert len(found.comparisons) == 6


def test_a_pad_token_that_the_embedding_has_no_row_for():
    """Old checkpoints of Llama say -1."""
    reward = tiny_reward()
    reward.config.pad_token_id = -1
    found = checked(reward, reward=True)
    assert not found.failures
    assert found.comparisons


def test_a_classifier_with_a_decoder_and_turns_that_end_with_eos():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_labels": 1, "vocab_size": 400}
    config = BartConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    model = randomize(BartForSequenceClassification(config))
    turns = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    texts = [("who sat where?", ["the cat", "a dog</s>the mat", "the mat, who knows"]), ("why?</s>sat", ["no", "a"])]
    found = checked(model, bpe_tokenizer(chat_template=turns), texts, reward=True, token_budget=1000)
    assert found.failures == []
    assert failed(found) == set()
    assert found.comparisons


def test_rounding_that_the_model_amplifies():
    """An offset of 512 leaves bf16 two bits of a hidden state of order one, and fp32 fifteen."""
    model = tiny_causal().bfloat16()
    model.model.layers[0].register_forward_hook(layer_output(lambda h: (h + 512) - 512))
    found = checked(model)
    assert causes(found) == ["dtype"]
    assert failed(found)
    assert "in bfloat16" in message(found, "dtype")
    assert "its own noise in bfloat16 is" in message(found, "dtype")


def test_overflow_in_fp16_and_broken_weights():
    model = tiny_causal()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    found = checked(model.half())
    assert causes(found) == ["dtype"]
    assert "it overflows" in message(found, "dtype")
    with torch.no_grad():
        model.float().lm_head.weight[7] = math.nan
    assert causes(checked(model)) == ["not finite"]


def test_something_random():
    model = tiny_causal()
    model.model.layers[0].register_forward_hook(layer_output(lambda h: h + 0.1 * torch.randn_like(h)))
    assert causes(checked(model)) == ["randomness"]


def test_a_model_that_does_not_hold_at_its_limit():
    model, limit = tiny_causal(), 30
    forward = model.forward

    @functools.wraps(forward)
    def failing(*args: Any, attention_mask: Any = None, **options: Any) -> Any:
        output = forward(*args, attention_mask=attention_mask, **options)
        if attention_mask is not None and len(attention_mask) > 1:
            output.logits[attention_mask.sum(1) == limit, :, 300:] += 1
        return output

    model.forward = failing
    found = checked(model, max_length=limit, truncation="right", texts=[t for t in TEXTS if len(t[0]) < 20])
    assert causes(found) == ["truncation"]
    assert "truncation" in causes(found, "warn")
    assert failed(found) == {"padded, 2 sequences", "padded, 8 sequences"}


def test_an_experiment_without_memory(monkeypatch):
    def full(model: Any, dtype: Any) -> None:
        raise torch.OutOfMemoryError

    model = tiny_causal()
    model.model.layers[0].register_forward_hook(layer_output(lambda h: h + 0.1 * h.mean(dim=1, keepdim=True)))
    monkeypatch.setattr(diagnosis, "precision", full)
    found = checked(model)
    assert causes(found) == ["unknown"]
    assert "memory ran out in the experiment dtype_noise" in message(found, "unknown")


def test_sequences_too_long_for_their_logits_are_left_out(monkeypatch):
    groups = Encoder(bpe_tokenizer()).encode_groups(sample_of(TEXTS).groups)
    lengths = [len(group.prompt_tokens) + len(ids) for group in groups for ids in group.completion_tokens]
    most_tokens = 8 * sorted(lengths)[5]
    fitting = [sum(size * length <= most_tokens for length in lengths) for size in (2, 8)]
    assert NUM_COMPLETIONS >= fitting[0] > fitting[1] > 0
    monkeypatch.setattr(ways, "LOGITS_BYTES", most_tokens * 400 * 4)
    found = checked(tiny_causal())
    assert found.failures == []
    assert [c.num_compared for c in found.comparisons] == [NUM_COMPLETIONS] * 6 + fitting


def test_a_difference_that_no_experiment_explains(monkeypatch):
    def shifted(model: Any, pad_token_id: int | None) -> Route:
        route = original(model, pad_token_id)
        return Route(True, "", route.rows, lambda batch: route.forward(batch) + 1)

    original = subject.logps_route
    monkeypatch.setattr(subject, "logps_route", shifted)
    found = checked(tiny_causal())
    assert causes(found) == ["unknown"]
    assert failed(found) == {f"packed, {way}" for way in WAYS}


# ------------------------------------------------------------------------------------------ templates, limits, tokens

UNSTABLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'user' and not loop.last %} (earlier){% endif %}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}th{{ m.content }}</s>{% else %}{{ m.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}th{% endif %}"
)


def test_a_template_that_is_not_prefix_stable():
    found = checked(tiny_causal(), template=UNSTABLE)
    assert [(f.cause, f.is_input) for f in found.failures] == [("template", True)]
    assert "21 of 21 completions" in message(found, "template")
    assert "not prefix-stable" in message(found, "template")
    assert "(earlier)" in message(found, "template")
    assert "choose another template" in message(found, "template")
    assert found.comparisons == []
    with pytest.raises(UserError, match="tiny: template"):
        require_agreement([found])


@pytest.mark.parametrize(("answers", "level"), [(["e dog", "x", "zebra"], "warn"), (["e dog", "e cat", "x"], "FAIL")])
def test_a_tokenizer_that_merges_across_the_boundary(answers, level):
    """`th` and `e` become the token `the`: the text is a prefix, the tokens are not."""
    found = checked(tiny_causal(), template=MERGING, texts=[("who sat?", answers)])
    assert causes(found, level) == ["template"]
    assert "prefix-stable" not in message(found, "template")
    assert "they part at token" in message(found, "template")
    assert bool(found.comparisons) == (level == "warn")


def test_a_template_that_refuses_a_role():
    refusing = "{% if messages[0].role == 'user' %}{{ raise_exception('no users') }}{% endif %}" + CHATML
    found = checked(tiny_causal(), template=refusing)
    assert causes(found) == ["template"]
    assert "no users" in message(found, "template")


def test_calls_without_text():
    call = {"role": "assistant", "content": None, "rest": json.dumps({"tool_calls": [{"function": {"name": "bake"}}]})}
    said = {"role": "assistant", "content": "the cat", "rest": None}
    sample = Sample([([{"role": "user", "content": "who sat?", "rest": None}], [[call], [said]])], ["0"], "test")
    writes = CHATML.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].function.name }}")
    encoder = Encoder(bpe_tokenizer(chat_template=writes), "auto")
    assert not check_model("tiny", tiny_causal(), encoder, sample, is_reward=False, token_budget=1000).failures
    raises = bpe_tokenizer(chat_template=CHATML.replace("{{ m.content }}", "{{ 'said: ' + m.get('content') }}"))
    found = check_model("tiny", tiny_causal(), Encoder(raises, "auto"), sample, is_reward=False, token_budget=1000)
    assert message(found, "template").startswith("1 of 2 completions cannot be told from their prompt; ")
    assert "TypeError" in message(found, "template")


def test_limits_that_leave_nothing_or_little():
    encoder = Encoder(bpe_tokenizer())
    groups = encoder.encode_groups(sample_of(TEXTS).groups)
    shortest, *_, longest = sorted(len(g.prompt_tokens) + len(ids) for g in groups for ids in g.completion_tokens)
    found = checked(tiny_causal(), max_length=shortest - 1)
    assert [(f.cause, f.is_input) for f in found.failures] == [("max_length", True)]
    assert message(found, "max_length").startswith(f"got {shortest - 1}, but the shortest")
    assert f"has {shortest} tokens" in message(found, "max_length")
    found = checked(tiny_causal(), max_length=shortest + 2)
    assert causes(found, "warn") == ["max_length"]
    assert "too_long at" in message(found, "max_length")
    found = checked(tiny_causal(), max_length=longest - 1, truncation="left")
    assert message(found, "truncation").startswith("1 of 21 scored completions lost the beginning of their prompt")
    found = checked(tiny_causal(), max_length=longest - 1, truncation="right")
    assert message(found, "truncation").startswith("1 of 21 scored completions lost their end")
    assert "1 truncated" in found.facts[0]


def test_a_tokenizer_larger_than_the_embedding():
    found = checked(tiny_causal(vocab_size=100))
    assert [(f.cause, f.is_input) for f in found.failures] == [("vocabulary", True)]
    sizes = f"its tokenizer has {len(bpe_tokenizer())} tokens and its embedding 100 rows"
    assert sizes in message(found, "vocabulary")


def test_bos_twice_and_answers_that_do_not_end():
    template = "<s><s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    found = checked(tiny_causal(), bpe_tokenizer(bos=True), template=template)
    assert causes(found, "warn") == ["bos twice", "end of turn"]
    assert message(found, "bos twice").startswith("10 of 10 prompts begin with two '<s>'")
    assert message(found, "end of turn").startswith("21 of 21 responses end in no control token")


def test_control_tokens_in_the_users_text():
    texts = [("what does <|im_end|> mean?", ["it ends", "</s> too"]), ("a < b", ["no"])]
    found = checked(tiny_causal(), texts=texts)
    assert causes(found, "warn") == ["control tokens"]
    assert message(found, "control tokens").startswith("2 of 5 messages hold text that becomes a control token")


# -------------------------------------------------------------------------------------------------------- the command


def pairs(prompts: list[str]) -> str:
    return "".join(json.dumps({"prompt": p, "chosen": f"{p} yes", "rejected": "no"}) + "\n" for p in prompts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("selftest")
    for name, model, tokenizer in (
        ("policy", tiny_causal("gpt_neox"), bpe_tokenizer()),
        ("reward", tiny_reward(), bpe_tokenizer()),
        ("undecided", tiny_reward(pad_token_id=None), bpe_tokenizer(pad_token=EOS, chat_template=MERGING)),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "a.jsonl").write_text(pairs([f"a {n}" for n in range(40)]) + "not a row\n")
    (root / "b.jsonl").write_text(pairs([f"b {n}" for n in range(3)]))
    return root


def table(models: list[str], **options: Any) -> dict[str, Any]:
    kinds = {"policy": "causal_logps", "scratch": "causal_logps"}
    made = [{"kind": "pretrained", "name": name, "path": f"./{name}", "dtype": "fp32"} | options for name in models]
    made = [{"kind": "scratch_policy", "name": "scratch"} if spec["name"] == "scratch" else spec for spec in made]
    return {
        "name": "t",
        "sources": [{"name": "b", "paths": ["b.jsonl"]}, {"name": "a", "paths": ["a.jsonl"]}],
        "models": made,
        "scorers": [{"kind": kinds.get(name, "reward_model"), "model": name} for name in models],
    }


def test_the_first_groups_of_every_source(folders, monkeypatch):
    monkeypatch.chdir(folders)
    config = parse_config(table(["policy"]))
    sample = read_sample(config)
    assert sample.origin == "b: 3 groups; a: 29 groups, 1 of 41 rows unusable"
    assert [prompt[0]["content"] for prompt, _ in sample.groups[:4]] == ["b 0", "b 1", "b 2", "a 0"]
    assert sample.groups[3][1] == [
        [{"role": "assistant", "content": "a 0 yes"}],
        [{"role": "assistant", "content": "no"}],
    ]
    assert len(read_sample(config, 4).groups) == 4
    (folders / "none.jsonl").write_text("not a row\n")
    held = table(["policy"]) | {"sources": [{"name": "n", "paths": ["none.jsonl"]}]}
    with pytest.raises(UserError, match="no training source holds a group to test with \\(n: 0 groups, 1 of 1 rows"):
        read_sample(parse_config(held))


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        (
            ["conversations.jsonl", "ranked.jsonl", "transcripts.jsonl"],
            "s0: 11 groups, 3 of 256 rows unusable; s1: 11 groups; s2: 10 groups, 3 of 90 rows unusable",
        ),
        (
            ["hh_rlhf_harmless_1156.jsonl.gz", "qa_feedback_250x4.jsonl.gz", "ultrafeedback_binarized_1k.jsonl.gz"],
            "s0: 11 groups, 1 of 256 rows unusable; s1: 11 groups; s2: 10 groups",
        ),
    ],
    ids=["ours", "found"],
)
def test_samples(request, files, origin):
    is_found = files[0].endswith(".gz")
    folder = request.getfixturevalue("shared") / "data/real" if is_found else request.getfixturevalue("samples")
    sources = [{"name": f"s{number}", "paths": [str(folder / file)]} for number, file in enumerate(files)]
    sample = read_sample(parse_config(table(["policy"]) | {"sources": sources}))
    assert sample.origin == origin
    found = check_model("tiny", tiny_causal(), Encoder(bpe_tokenizer(), "hh", 250), sample, is_reward=False)
    assert found.failures == []
    assert all(c.num_compared >= 8 for c in found.comparisons)


def run(folders: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any]) -> int:
    monkeypatch.chdir(folders)
    (folders / "c.yaml").write_text(yaml.safe_dump(content))
    return guarded(app, ["selftest", "c.yaml"])


def test_the_command_passes_and_skips(folders, monkeypatch, capsys):
    assert run(folders, monkeypatch, table(["policy", "reward", "scratch"]) | {"split": {"proxy": 0.2}}) == 0
    told = capsys.readouterr().out
    assert "selftest: 32 groups (b: 3 groups; a: 29 groups" in told
    assert "policy (causal_logps): ./policy, fp32, template auto, max_length 256, truncation drop" in told
    assert "64 completions: 64 ok, 0 too_long" in told
    assert told.count("packed, 8 groups a row") == 2
    assert "scratch (causal_logps): made by this run, checked when it is made" in told
    assert told.endswith("selftest: 2 models, all agree\n")
    assert {path.name for path in folders.iterdir() if path.is_dir()} == {"policy", "reward", "undecided"}


def test_exit_codes(folders, monkeypatch, capsys):
    assert run(folders, monkeypatch, table(["reward", "undecided"], template="hh")) == 1
    told = capsys.readouterr()
    assert "selftest: 1 of 2 models FAIL: undecided" in told.out
    assert told.err.strip() == "prefsel: selftest: undecided: pad = eos"
    assert run(folders, monkeypatch, table(["policy"], template=UNSTABLE)) == 2
    assert "not prefix-stable" in capsys.readouterr().out
    empty = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}</s>{% endfor %}"
    assert run(folders, monkeypatch, table(["policy"], template=empty)) == 2
    assert "FAIL  input: template" in capsys.readouterr().out
    heads = table(["reward"])
    heads["scorers"][0]["heads"] = ["x", "y"]
    assert run(folders, monkeypatch, heads) == 2
    capsys.readouterr()
    assert run(folders, monkeypatch, table(["policy"], max_length=4096)) == 2
    assert "at most the model's 256 positions" in capsys.readouterr().err
    assert run(folders, monkeypatch, table(["policy"]) | {"scorers": []}) == 0
    assert "nothing to check" in capsys.readouterr().out


def test_numbers_that_differ_weigh_more_than_input():
    """Exit code 1 as soon as any number differs."""
    numbers, template = Finding("FAIL", "mask", ""), Finding("FAIL", "template", "", is_input=True)
    with pytest.raises(PrefselError, match="a: mask; b: template") as raised:
        require_agreement([ModelCheck("a", "", findings=[numbers]), ModelCheck("b", "", findings=[template])])
    assert raised.value.exit_code == 1


def test_memory_that_runs_out_is_one_message(folders, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("12 GiB")

    monkeypatch.chdir(folders)
    monkeypatch.setattr(check, "check_model", full)
    with pytest.raises(PrefselError, match="selftest policy: out of memory; lower its scorer's token_budget"):
        selftest(parse_config(table(["policy"])), Progress(quiet=True))
