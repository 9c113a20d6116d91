from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import takewhile

import pyarrow as pa
import pytest
import torch
from tiny_models import bpe_tokenizer, naive_logps, tiny_causal, tiny_reward

from prefsel.errors import PrefselError, UserError
from prefsel.ingest.identity import completion_id, prompt_id
from prefsel.models.architecture import model_shape
from prefsel.models.chat import Encoder
from prefsel.models.layout import attention_area
from prefsel.models.packing import flops_min, pack
from prefsel.schema import GROUPS
from prefsel.score import windows
from prefsel.score.probes import PROBE_TOKENS, budget_from_probes, probe_group
from prefsel.score.scorers import CausalLogpsScorer, RewardModelScorer

TEXTS = [
    ("who sat where?", ["the cat sat on the mat.", "a dog."]),
    ("write a story", ["the cat can bake bread, and then the dog saw the cat!", "why?", "bread rises"]),
    ("explain bread", ["bread rises", "the mat that can bake"]),
    ("the dog", ["sat", "saw the cat"]),
]


def table(texts=TEXTS, ratings=None):
    rows = []
    for number, (prompt, responses) in enumerate(texts):
        messages = [{"role": "user", "content": prompt}]
        identity = prompt_id(messages)
        completions = []
        for index, response in enumerate(responses):
            answer = [{"role": "assistant", "content": response}]
            given = ratings[number][index] if ratings else {}
            completions.append(
                {
                    "completion_id": completion_id(identity, answer),
                    "messages": answer,
                    "ratings": list(given.items()),
                }
            )
        rows.append({"prompt_id": identity, "prompt": messages, "completions": completions, "provenance": None})
    return pa.Table.from_pylist(rows, schema=GROUPS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    tiny_causal().save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    return path


def scorer(folder, **options):
    return CausalLogpsScorer(name="tiny", path=str(folder), dtype="fp32", device="cpu", **options)


def naive_columns(folder):
    model, encoder = tiny_causal(), Encoder(bpe_tokenizer())
    groups = [
        encoder.encode_group(
            [{"role": "user", "content": prompt}], [[{"role": "assistant", "content": text}] for text in responses]
        )
        for prompt, responses in TEXTS
    ]
    with torch.no_grad():
        logps = [[float(naive_logps(model, g.prompt_tokens, ids)) for ids in g.completion_tokens] for g in groups]
    return groups, logps


def assert_close(got, expected):
    assert [len(row) for row in got] == [len(row) for row in expected]
    for row, other in zip(got, expected):
        assert [value is None for value in row] == [value is None for value in other]
        numbers = [value for value in other if value is not None]
        assert [value for value in row if value is not None] == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("window_groups", [1, 3, 256])
@pytest.mark.parametrize("token_budget", [20, 70, None])
def test_columns_equal_one_sequence_at_a_time(folder, monkeypatch, window_groups, token_budget):
    monkeypatch.setattr(windows, "WINDOW_GROUPS", window_groups)
    groups, logps = naive_columns(folder)
    shard = scorer(folder, token_budget=token_budget).score(table())
    assert list(shard.columns) == ["logps_tiny", "num_tokens_tiny"]
    assert_close(shard.columns["logps_tiny"], logps)
    assert shard.columns["num_tokens_tiny"] == [[len(ids) for ids in g.completion_tokens] for g in groups]
    assert (shard.dropped, shard.poisoned) == ({}, [])


def test_counters_equal_hand_counts(folder):
    groups, _ = naive_columns(folder)
    counters = scorer(folder, token_budget=100).score(table()).counters
    prompts = sum(len(g.prompt_tokens) for g in groups)
    # What all responses of a group begin with stands there once, behind the prompt.
    alike = [list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*g.completion_tokens))) for g in groups]
    shared = sum((len(g.status) - 1) * len(tokens) for g, tokens in zip(groups, alike))
    responses = sum(len(ids) for g in groups for ids in g.completion_tokens) - shared
    shape, rows = model_shape(tiny_causal()), pack(groups, 100)
    assert counters["shared_tokens"] == shared
    assert counters["trunk_tokens"] == prompts + responses
    assert counters["head_rows"] == responses
    assert counters["padding_tokens"] == 0
    assert counters["completions"] == 9
    assert counters["rows"] == len(rows) > 1
    assert counters["flops_min"] == flops_min(groups, shape)
    area = sum(attention_area(row.segments) for row in rows)
    linear = 2 * shape.trunk_parameters * (prompts + responses) + 2 * shape.head_parameters * responses
    assert counters["flops_model"] == linear + 4 * 32 * 2 * area
    assert counters["seconds_model"] > 0


def test_too_long_completions_are_none_and_counted(folder):
    groups, logps = naive_columns(folder)
    lengths = [[len(g.prompt_tokens) + len(ids) for ids in g.completion_tokens] for g in groups]
    limit = sorted(n for ns in lengths for n in ns)[-3]
    shard = scorer(folder, max_length=limit).score(table())
    expected = [[v if n <= limit else None for v, n in zip(row, ns)] for row, ns in zip(logps, lengths)]
    assert sum(value is None for row in expected for value in row) == 2
    assert_close(shard.columns["logps_tiny"], expected)
    assert [[v is None for v in row] for row in shard.columns["num_tokens_tiny"]] == [
        [v is None for v in row] for row in expected
    ]
    assert shard.dropped == {"too_long": 2}
    cut = scorer(folder, max_length=limit, truncation="right").score(table())
    assert cut.dropped == {}
    assert cut.counters["num_truncated"] == 2


def test_max_length_defaults_to_what_the_model_declares(folder):
    assert scorer(folder).engine.encoder.max_length == 256
    shard = scorer(folder).score(table([("the cat", ["the dog " * 200, "sat"])]))
    assert shard.dropped == {"too_long": 1}


def failing_on(scorer, marked, action):
    """Make the model fail for rows that hold the token `marked`."""
    forward = scorer.engine.route.forward
    calls = []

    def broken(batch):
        calls.append(batch)
        output = forward(batch)
        return action(batch, output) if (batch.input_ids_T == marked).any() else output

    scorer.engine.route = replace(scorer.engine.route, forward=broken)
    return calls


def raises(batch, output):
    raise IndexError("index out of range in self")


def nans(batch, output):
    return output * math.nan


def infinite(batch, output):
    return output - math.inf


@pytest.mark.parametrize("action", [raises, nans, infinite])
def test_a_group_the_model_cannot_score_is_isolated(folder, action):
    _, logps = naive_columns(folder)
    tiny = scorer(folder)
    story = bpe_tokenizer()(" story")["input_ids"][-1]
    failing_on(tiny, story, action)
    groups = table()
    shard = tiny.score(groups)
    assert_close(shard.columns["logps_tiny"], [logps[0], [None] * 3, *logps[2:]])
    assert shard.columns["num_tokens_tiny"][1] == [None] * 3
    assert shard.dropped == {"poisoned": 3}
    assert shard.poisoned == [groups["prompt_id"][1].as_py().hex()]


def test_a_passing_fault_is_not_poison(folder):
    _, logps = naive_columns(folder)
    tiny = scorer(folder)
    seen = []

    def only_once(batch, output):
        seen.append(batch)
        return output * math.nan if len(seen) == 1 else output

    failing_on(tiny, bpe_tokenizer()(" story")["input_ids"][-1], only_once)
    shard = tiny.score(table())
    assert_close(shard.columns["logps_tiny"], logps)
    assert (shard.dropped, shard.poisoned) == ({}, [])


def test_a_fault_of_every_group_is_raised(folder):
    tiny = scorer(folder)
    failing_on(tiny, bpe_tokenizer()("<|im_start|>")["input_ids"][0], raises)
    with pytest.raises(IndexError):
        tiny.score(table())


def test_memory_that_runs_out_halves_the_budget(folder):
    _, logps = naive_columns(folder)
    tiny = scorer(folder, token_budget=1000)
    forward, tokens = tiny.engine.route.forward, []

    def small(batch):
        if batch.trunk_tokens > 80:
            raise torch.OutOfMemoryError("out of memory")
        tokens.append(batch.trunk_tokens)
        return forward(batch)

    tiny.engine.route = replace(tiny.engine.route, forward=small)
    shard = tiny.score(table())
    assert_close(shard.columns["logps_tiny"], logps)
    assert shard.counters["oom_halvings"] >= 1
    assert sum(tokens) == shard.counters["trunk_tokens"]
    assert tiny.engine.token_budget < 1000
    assert "oom_halvings" not in tiny.score(table()).counters


def test_a_single_sequence_that_does_not_fit_is_a_fault(folder):
    tiny = scorer(folder)

    def full(batch):
        raise torch.OutOfMemoryError("out of memory")

    tiny.engine.route = replace(tiny.engine.route, forward=full)
    with pytest.raises(PrefselError, match="out of memory for a single sequence"):
        tiny.score(table())


def test_a_template_error_is_counted_and_told_never_scored(folder):
    shard = scorer(folder, template="{{ raise_exception('never') }}").score(table())
    assert all(value is None for row in shard.columns["logps_tiny"] for value in row)
    assert shard.dropped == {"template_error": sum(map(len, shard.columns["logps_tiny"]))}
    assert "never" in shard.template_error
    assert shard.poisoned == []


def test_no_groups_no_numbers(folder):
    shard = scorer(folder).score(table([]))
    assert shard.columns == {"logps_tiny": [], "num_tokens_tiny": []}
    assert scorer(folder).score(table([("the dog", [])])).columns["logps_tiny"] == [[]]


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("token_budget", [1, 60, 8192])
def test_rewards_equal_the_models_own_forward(tmp_path, model_type, token_budget):
    model = tiny_reward(model_type, num_labels=2, id2label={0: "honesty", 1: "wit"})
    model.save_pretrained(tmp_path)
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    judge = RewardModelScorer(name="judge", path=str(tmp_path), dtype="fp32", token_budget=token_budget, device="cpu")
    shard = judge.score(table())
    assert list(shard.columns) == ["rm_honesty", "rm_wit"]
    for g, (prompt, responses) in enumerate(TEXTS):
        for c, response in enumerate(responses):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits[0].tolist()
            got = [shard.columns[name][g][c] for name in ("rm_honesty", "rm_wit")]
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert shard.counters["head_rows"] == 0
    is_packed = model_type == "llama"
    assert shard.counters["completions" if is_packed else "completions_padded"] == 9
    assert (shard.counters["padding_tokens"] == 0) == (is_packed or token_budget == 1)


def test_one_head_is_named_after_the_model_and_wrong_heads_are_refused(tmp_path):
    tiny_reward().save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    options = {"name": "judge", "path": str(tmp_path), "dtype": "fp32", "device": "cpu"}
    assert list(RewardModelScorer(**options).score(table()).columns) == ["rm_judge"]
    with pytest.raises(UserError, match=r"heads: got \['a', 'b'\]; valid: 1 names"):
        RewardModelScorer(**options, heads=["a", "b"])


def test_budget_from_probes():
    # 1 MB + 1 kB a token: 0.75 of 40 MB holds 29 000 tokens, 28 multiples of 1 024.
    assert budget_from_probes((4096, 8192), [5_096_000, 9_192_000], 40_000_000) == 28 * 1024
    assert budget_from_probes((4096, 8192), [5_096_000, 9_192_000], 10**12) == 65536
    assert budget_from_probes((4096, 8192), [5_096_000, 9_192_000], 1000) == 1024


def test_unconditional_scores_the_same_tokens_after_one_start_token(folder):
    groups = table()
    got = scorer(folder, unconditional=True).score(groups)
    encoder, model = Encoder(bpe_tokenizer()), tiny_causal()
    assert set(got.columns) == {"logps_tiny_uncond", "num_tokens_tiny_uncond"}
    for (prompt, responses), logps, counts in zip(TEXTS, *got.columns.values()):
        messages = [{"role": "user", "content": prompt}]
        said = [[{"role": "assistant", "content": response}] for response in responses]
        (encoded,) = encoder.encode_groups([(messages, said)])
        for tokens, logp, count in zip(encoded.completion_tokens, logps, counts):
            start = encoder.tokenizer.eos_token_id  # this tokenizer has no bos
            assert logp == pytest.approx(naive_logps(model, [start], tokens).item(), rel=1e-5)
            assert count == len(tokens)


@pytest.mark.parametrize("num_tokens", PROBE_TOKENS)
def test_a_probe_is_a_row_of_as_many_tokens_as_it_says(num_tokens):
    (row,) = pack([probe_group(num_tokens)], num_tokens)
    assert (row.trunk_tokens, row.head_rows, row.shared_tokens) == (num_tokens, num_tokens - 256, 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, with which torch compiles for CPUs")
def test_a_compiled_scorer_gives_the_same_columns(folder):
    expected, compiled = (scorer(folder, compile=flag).score(table()).columns for flag in (False, True))
    assert_close(compiled["logps_tiny"], expected["logps_tiny"])
    assert compiled["num_tokens_tiny"] == expected["num_tokens_tiny"]


TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def test_what_a_template_did_is_counted_with_the_prompt_of_the_first_example(folder):
    texts = [("who sat?", ["the cat", "a dog"]), ("<s> where?", ["the mat", "the mat \n", "a mat", "the mat\n\n"])]
    groups = table(texts)
    scored = scorer(folder, template=TRIMS).score(groups)
    where = f"prompt {groups['prompt_id'][1].as_py().hex()}"
    assert scored.template.name == repr(TRIMS[:37] + "…")
    assert scored.template.ending == "<|im_end|>"
    assert scored.template.notes == {
        "special_text": (4, f"{where}: <s> in user content '<s> where?'"),
        "same_tokens": (2, f"{where}: 'the mat<|im_end|>'"),
    }
    assert scored.same_as == {1: (None, 0, None, 0)}
    # The others have the numbers that they have without it.
    logps = scored.columns["logps_tiny"]
    alone = scorer(folder, template=TRIMS).score(table([texts[0], ("<s> where?", ["the mat", "a mat"])]))
    assert_close([logps[0], [logps[1][0], logps[1][2]]], alone.columns["logps_tiny"])
    assert (alone.same_as, list(alone.template.notes)) == ({}, ["special_text"])


def test_same_tokens_are_found_across_windows_and_on_padded_rows(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_GROUPS", 2)
    texts = [(f"the cat {n}", ["a dog", "a dog " if n in (1, 4) else "a mat"]) for n in range(5)]
    assert scorer(folder, template=TRIMS).score(table(texts)).same_as == {1: (None, 0), 4: (None, 0)}
    tiny_causal("gemma2").save_pretrained(tmp_path)
    bpe_tokenizer().save_pretrained(tmp_path)
    padded = scorer(tmp_path, template=TRIMS).score(table(texts))
    assert padded.padded_because
    assert padded.same_as == {1: (None, 0), 4: (None, 0)}
