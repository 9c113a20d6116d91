from __future__ import annotations

import peft
import pytest
import torch
from tiny_models import naive_logps, random_groups, randomize, tiny_causal

from prefsel.models.chat import EncodedGroup
from prefsel.models.logps import logps_route
from prefsel.models.padded import pad

PADDED = [("gemma2", {}), ("mistral", {"sliding_window": 16}), ("cohere", {}), ("bloom", {})]


def test_a_batch_by_eye():
    groups = [EncodedGroup([1, 2], [[3], [], [4, 5, 6]], ["ok", "too_long", "ok"], 0)]
    (batch,) = pad(groups, 100, pad_token_id=9)
    assert batch.input_ids_BT.tolist() == [[1, 2, 4, 5, 6], [1, 2, 3, 9, 9]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.completion_index == [(0, 2), (0, 0)]
    assert (batch.trunk_tokens, batch.padding_tokens, batch.repeated_prompt_tokens) == (10, 2, 2)
    assert (batch.head_rows, batch.attention_area) == (2 * 4, 2 * 25)


def test_prompts_cut_on_the_left():
    (batch,) = pad([EncodedGroup([1, 2, 3], [[4], [5]], ["ok", "ok"], 1, (2, 0))], 100, pad_token_id=0)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 5], [3, 4, 0, 0]]
    assert batch.prompt_lengths == (3, 1)


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "options"), PADDED)
@pytest.mark.parametrize("token_budget", [1, 300])
def test_equals_one_sequence_at_a_time(model_type, options, token_budget):
    model = tiny_causal(model_type, **options)
    route = logps_route(model, pad_token_id=2)
    assert not route.is_packed
    groups = random_groups([2, 3])
    for batch in route.rows(groups, token_budget):
        for (g, c), value in zip(batch.completion_index, route.forward(batch)):
            expected = naive_logps(model, groups[g].prompt_tokens, groups[g].completion_tokens[c])
            assert float(value) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("model_type", "options"), PADDED)
def test_logits_of_16_bits_are_normalised_in_more(model_type, options, dtype):
    """From the very logits of the pass: log-softmax in 16 bits is off by up to 2^-8 of every token's log-prob."""
    model = tiny_causal(model_type, **options).to(dtype)
    route = logps_route(model, pad_token_id=2)
    assert not route.is_packed
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    off_by = []
    for batch in route.rows(random_groups([2, 3]), 300):
        values = route.forward(batch)
        logits_BTV = seen.pop()
        assert logits_BTV.dtype == dtype
        first = batch.input_ids_BT.shape[1] - logits_BTV.shape[1]
        for row, value in enumerate(values):
            start, end = batch.prompt_lengths[row], batch.lengths[row]
            targets_R1 = batch.input_ids_BT[row, start:end, None]
            logits_RV = logits_BTV[row, start - 1 - first : end - 1 - first]
            exact = logits_RV.double().log_softmax(-1).gather(1, targets_R1).sum().item()
            assert value.item() == pytest.approx(exact, rel=1e-6)
            off_by.append(abs(logits_RV.log_softmax(-1).gather(1, targets_R1).double().sum().item() / exact - 1))
    assert max(off_by) > 1e-5  # what 16 bits would be off by, so that the comparison above is about something


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("model_type", ["llama", "stablelm"])
def test_virtual_tokens_of_an_adapter_shift_nothing(model_type, kind):
    """peft puts them before every row, so that its logits are as many longer."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = randomize(peft.get_peft_model(tiny_causal(model_type), config))
    route = logps_route(model)
    groups = random_groups([2, 3])
    for batch in route.rows(groups, 300):
        for (g, c), value in zip(batch.completion_index, route.forward(batch)):
            prompt, response = groups[g].prompt_tokens, groups[g].completion_tokens[c]
            ids = torch.tensor([prompt + response])
            logits_RV = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(response) - 1 : -1]
            expected = logits_RV.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            assert float(value) == pytest.approx(float(expected), rel=1e-5)
