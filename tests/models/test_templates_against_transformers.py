"""Every template on every architecture: what a scorer gives is what transformers alone gives for the messages.

The oracle knows nothing of this package: `apply_chat_template` on the messages as they came, tokens and all, and the
model called for one conversation at a time. `python -m pytest -s` on this file prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from chat_templates import CONVERSATIONS, TEMPLATES, tokenizer_with
from tiny_models import randomize, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.models.logps import logps_route
from prefsel.models.reward import reward_route

CAUSAL = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom"),
    *("falcon", "cohere"),
)
CLASSIFIERS = tuple(name for name in CAUSAL if name != "cohere")  # which transformers has no classifier of
Tokens = list[int]
TABLE: dict[tuple[str, str, str], float] = {}
"""(what, architecture, template) → largest difference over its conversations, relative above 1."""


def as_given(message: dict[str, Any], content: str) -> dict[str, Any]:
    """A message in the form in which a caller of transformers has to give it to the template."""
    said = message["content"]
    if content == "text" and isinstance(said, list):
        said = "".join(part["text"] for part in said)
    elif content == "parts" and isinstance(said, str):
        said = [{"type": "text", "text": said}]
    return {key: value for key, value in message.items() if key != "tools"} | {"content": said}


def plain_tokens(tokenizer: Any, name: str, prompt: Any, completion: Any) -> tuple[Tokens, Tokens] | None:
    """Prompt and response by transformers alone; None where the template raises.

    The response begins where the generation prompt ends, or where the conversation parts from it (as in TRL).
    """
    template = TEMPLATES[name]
    if template.text is None:
        texts = ["".join(as_given(one, "text")["content"] or "" for one in part) for part in (prompt, completion)]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return ids[0], [*ids[1], tokenizer.eos_token_id]
    tools = next((one["tools"] for one in prompt if "tools" in one), None)
    given = [as_given(message, template.content) for message in (*prompt, *completion)]
    try:
        opened, full = (
            tokenizer.apply_chat_template(part, tools=tools, tokenize=True, return_dict=False, add_generation_prompt=o)
            for part, o in ((given[: len(prompt)], True), (given, False))
        )
    except Exception:  # noqa: BLE001  a template may raise anything
        return None
    start = next((i for i, (a, b) in enumerate(zip(opened, full)) if a != b), min(len(opened), len(full)))
    return full[:start], full[start:]


@cache
def corpus(name: str) -> tuple[list[EncodedGroup], list[tuple[tuple[int, int], Tokens, Tokens]]]:
    """Our tokens of every conversation of a template, and the oracle's of those that both have."""
    template = TEMPLATES[name]
    tokenizer = tokenizer_with(template.text)
    encoder = Encoder(tokenizer, "plain" if template.text is None else "auto")
    groups = encoder.encode_groups(list(CONVERSATIONS.values()), strict=False)
    both = []
    for number, (prompt, completions) in enumerate(CONVERSATIONS.values()):
        for place, completion in enumerate(completions):
            found = plain_tokens(tokenizer, name, prompt, completion)
            if groups[number].status[place] == "ok":
                assert found is not None, (name, number, place)
                both.append(((number, place), *found))
    return groups, both


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    yield
    for what in ("log-probs", "rewards"):
        names = list(dict.fromkeys(name for kind, name, _ in TABLE if kind == what))
        print(f"\n{what}: largest difference from transformers alone\n{'':12}" + "".join(f"{n:>12}" for n in names))
        for template in TEMPLATES:
            cells = (TABLE.get((what, name, template)) for name in names)
            print(f"{template:12}" + "".join(f"{'-' if cell is None else f'{cell:.1e}':>12}" for cell in cells))


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_transformers_alone_and_what_it_refuses_is_refused(name: str) -> None:
    groups, both = corpus(name)
    for (number, place), prompt, response in both:
        assert groups[number].prompt_tokens == prompt, (name, number, place)
        assert groups[number].completion_tokens[place] == response, (name, number, place)
    refused = {
        conversation
        for conversation, group in zip(CONVERSATIONS, groups)
        if any(status == "template_error" for status in group.status)
    }
    assert refused == REFUSED.get(name, set()), [note for group in groups for note in group.notes]


CALLS = {"a call before", "a call as the answer"}
REFUSED = {
    # Of the call that is an answer they write nothing, or "None".
    "Llama 3": {"a call as the answer"},
    "ChatML": {"a call as the answer"},
    "DeepSeek R1": {"a call as the answer"},
    "reasoning": {"a call as the answer"},
    "Gemma 3": {"a call as the answer"},
    "parts": {"a call as the answer"},
    # These raise: for content that is null, a system turn, or a tool's turn.
    "Gemma 2": {"system and turns", *CALLS},
    "Mistral": {"system and turns", *CALLS},
    "Phi 3": CALLS,
    "Phi 4": CALLS,
    "Zephyr": CALLS,
    # Nothing but text can be joined.
    "none": {"thought beside the answer", *CALLS},
}


def largest(route: Any, name: str, expected: Any) -> float:
    """The largest difference of a route from an oracle over the conversations of a template."""
    groups, both = corpus(name)
    found = {}
    with route.context():
        for batch in route.rows(groups, 1000):
            values = route.forward(batch).reshape(len(batch.completion_index), -1)
            found |= dict(zip(batch.completion_index, values))
    assert found.keys() == {key for key, _, _ in both}
    differences = []
    for key, prompt, response in both:
        value = expected(prompt, response)
        differences.append(((found[key] - value).abs() / value.abs().clamp(min=1)).max().item())
    return max(differences)


def config_of(architecture: str, **options: Any) -> Any:
    return tiny_config(
        architecture, vocab_size=len(tokenizer_with(None)), max_position_embeddings=512, n_positions=512, **options
    )


@pytest.mark.parametrize("architecture", CAUSAL)
def test_log_probs_are_those_of_transformers_alone(architecture: str) -> None:
    model = randomize(AutoModelForCausalLM.from_config(config_of(architecture)), 0.2)
    alone = randomize(AutoModelForCausalLM.from_config(config_of(architecture), attn_implementation="eager"), 0.2)

    @torch.inference_mode()
    def logp(prompt: Tokens, response: Tokens) -> torch.Tensor:
        logits_TV = alone(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits_TV.log_softmax(-1, dtype=torch.float32).double().gather(1, torch.tensor(response)[:, None]).sum()

    route = logps_route(model, 0)
    for name in TEMPLATES:
        TABLE["log-probs", architecture, name] = difference = largest(route, name, logp)
        assert difference < 2e-5, (architecture, name)


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_rewards_are_those_of_transformers_alone(architecture: str) -> None:
    config = config_of(architecture, num_labels=2)
    model = randomize(AutoModelForSequenceClassification.from_config(config), 0.2)
    alone = randomize(AutoModelForSequenceClassification.from_config(config, attn_implementation="eager"), 0.2)

    @torch.inference_mode()
    def reward(prompt: Tokens, response: Tokens) -> torch.Tensor:
        return alone(input_ids=torch.tensor([prompt + response])).logits[0].double()

    route = reward_route(model)
    for name in TEMPLATES:
        TABLE["rewards", architecture, name] = difference = largest(route, name, reward)
        assert difference < 2e-5, (architecture, name)
