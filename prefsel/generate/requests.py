"""Questions to a policy → requests to an engine that serves them one by one, and its tokens → responses again.

    questions ─ our own template and tokenizer ─▶ requests, each with its seed ─▶ engine ─▶ tokens ─▶ responses

An engine answers in any order, so everything goes by the number of the question and of the sample, never by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from transformers import AutoConfig

from prefsel.config import GenerationOptions
from prefsel.errors import IntegrityError
from prefsel.generate.answered import Refusal, Said, prompt_tokens
from prefsel.generate.engine import Response
from prefsel.generate.settings import declared_settings, ignored_settings, stop_tokens
from prefsel.models.chat import Encoder
from prefsel.models.directory import reading
from prefsel.models.loading import check_vocabulary, load_tokenizer
from prefsel.models.writer import Messages

MAX_NAMED = 3
"""Prompts that an error names."""


@dataclass(frozen=True)
class Question:
    """A conversation that a policy is to answer."""

    prompt_id: bytes
    """What the seeds follow from."""
    messages: Messages
    """The last one is answered."""
    samples: range
    """Numbers of the responses that are wanted."""


Answers = Mapping[tuple[int, int], Sequence[int]]
"""Number of the question, and of the sample, → the tokens that an engine drew, the stop token included."""


@dataclass(frozen=True)
class PolicyText:
    """What there is of a policy besides its weights: how it reads prompts, and what ends its responses."""

    encoder: Encoder
    stops: list[int]
    """The tokens that end a response, as `settings.stop_tokens`."""
    ignored: dict[str, Any]
    """The model's own generation settings that are not applied, as `settings.ignored_settings`."""
    max_length: int

    def read(self, questions: Sequence[Question], options: GenerationOptions) -> list[list[int] | Refusal]:
        """The tokens of every question, or why it cannot be asked."""
        limits = {"max_length": self.max_length, "max_new_tokens": options.max_new_tokens}
        return [prompt_tokens(self.encoder, one.messages, **limits) for one in questions]


@lru_cache(maxsize=2)
def policy_text(folder: str, template: str, max_length: int, trust_remote_code: bool) -> PolicyText:
    """Read a policy's directory, of which the weights may be missing.

    Args:
        folder: The directory.
        template: As for `Encoder`.
        max_length: Most tokens of prompt and response.
        trust_remote_code: Whether the directory's code may run.

    Raises:
        UserError: There is no tokenizer, configuration or template that can be used.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with reading(f"model {folder}: its configuration cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)  # nosec B615 # a folder
        settings = declared_settings(folder, config)
    # An engine without a tokenizer would look the embedding up beyond its end.
    check_vocabulary(tokenizer, rows=config.get_text_config().vocab_size, path=folder)
    encoder = Encoder(tokenizer, template)
    stops = stop_tokens(settings, tokenizer, encoder.traits.ending)
    return PolicyText(encoder, stops, ignored_settings(settings), max_length)


def seed_of(seed: int, prompt_id: bytes, sample: int) -> int:
    """The seed of one response, 0 to 2^63 − 1: another one for every (seed, prompt, sample), wherever it is drawn."""
    text = f"{seed}\n{prompt_id.hex()}\n{sample}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def requests_of(
    questions: Sequence[Question],
    prompts: Sequence[list[int] | Refusal],
    options: GenerationOptions,
    stops: Sequence[int],
) -> list[dict[str, Any]]:
    """One request per question and sample, in the columns that `ray.data.llm` reads; refused questions have none.

    Args:
        questions: What is asked.
        prompts: The tokens of each.
        options: How tokens are drawn.
        stops: Tokens that end a response.

    Returns:
        `question` and `sample` (numbers), `tokenized_prompt`, and `sampling_params` as vLLM calls them.
    """
    shared = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_tokens": options.max_new_tokens,
        "stop_token_ids": list(stops),
        "detokenize": False,
    }
    return [
        {
            "question": number,
            "sample": sample,
            "tokenized_prompt": tokens,
            "sampling_params": shared | {"seed": seed_of(options.seed, question.prompt_id, sample)},
        }
        for number, (question, tokens) in enumerate(zip(questions, prompts))
        if not isinstance(tokens, Refusal)
        for sample in question.samples
    ]


def responses_of(
    questions: Sequence[Question],
    prompts: Sequence[list[int] | Refusal],
    answers: Answers,
    options: GenerationOptions,
    policy: PolicyText,
) -> list[Said]:
    """What was said to every question, from answers that came in any order.

    Args:
        questions: What was asked.
        prompts: As for `requests_of`.
        answers: What the engine drew, all of it.
        options: As for `requests_of`.
        policy: Whose tokens they are.

    Raises:
        IntegrityError: An answer is missing, is to no question, or ended before it should; names the prompts.
    """
    asked = [number for number, tokens in enumerate(prompts) if not isinstance(tokens, Refusal)]
    wanted = [(number, sample) for number in asked for sample in questions[number].samples]
    _refuse("have no answer", questions, [one for one in wanted if one not in answers])
    if unknown := sorted(set(answers) - set(wanted)):
        raise IntegrityError(f"{len(unknown)} answers are to no question, the first to number {unknown[0]}")
    ended = {key: _ended(answers[key], policy.stops, options.max_new_tokens) for key in wanted}
    _refuse("ended for no reason", questions, [key for key, (_, stop) in ended.items() if not stop])
    texts = policy.encoder.tokenizer.batch_decode([tokens for tokens, _ in ended.values()], skip_special_tokens=True)
    found = {key: Response(tokens, text.strip(), stop) for (key, (tokens, stop)), text in zip(ended.items(), texts)}
    return [
        tokens if isinstance(tokens, Refusal) else [found[number, sample] for sample in questions[number].samples]
        for number, tokens in enumerate(prompts)
    ]


def _ended(drawn: Sequence[int], stops: Sequence[int], max_new_tokens: int) -> tuple[list[int], str]:
    """Tokens without the stop token, and why they ended: `ray.data.llm` leaves vLLM's word on that out."""
    tokens = [int(token) for token in drawn]
    if tokens and tokens[-1] in stops:
        return tokens[:-1], "end"
    return tokens, "length" if len(tokens) == max_new_tokens else ""


def _refuse(what: str, questions: Sequence[Question], keys: Sequence[tuple[int, int]]) -> None:
    if keys:
        named = ", ".join(f"sample {s} of prompt {questions[q].prompt_id.hex()}" for q, s in keys[:MAX_NAMED])
        more = ", …" if len(keys) > MAX_NAMED else ""
        raise IntegrityError(f"{len(keys)} requests {what}: {named}{more}; run again to ask them again")


def count_tokens(prompts: Sequence[list[int] | Refusal], said: Sequence[Said]) -> dict[str, float]:
    """Tokens of the prompts that were read, each once, and of the responses, stop tokens left out."""
    responses = [one for many in said if not isinstance(many, Refusal) for one in many]
    return {
        "prefill_tokens": float(sum(len(one) for one in prompts if not isinstance(one, Refusal))),
        "decoded_tokens": float(sum(len(one.tokens) for one in responses)),
    }
