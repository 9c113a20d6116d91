"""A shard of prompts → a shard of groups: each prompt with the responses of use, the others with a reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from prefsel.config import GenerationOptions
from prefsel.errors import TemplateError
from prefsel.generate.draw import Sampling
from prefsel.generate.engine import Generator, Response
from prefsel.generate.quality import why_unused
from prefsel.ingest.identity import completion_id
from prefsel.models.chat import Encoder
from prefsel.models.loading import check_vocabulary, default_device, load_causal, load_tokenizer
from prefsel.models.writer import Messages
from prefsel.schema import GENERATED, QUARANTINE, RESPONSE, RESPONSES, groups_schema, has_rest


class Refusal(NamedTuple):
    """Why a policy cannot be asked a prompt."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Answered:
    """What became of the prompts of a shard; `asked = kept + Σ dropped`."""

    groups: pa.Table
    """Schema `GROUPS` and the columns `GENERATED`; a prompt without a response that can be used is not among them."""
    quarantine: pa.Table
    """The responses that cannot be used, schema `QUARANTINE`."""
    asked: int
    """Responses asked for."""
    dropped: dict[str, int]
    """Responses without use, by reason."""
    counters: dict[str, float]
    """What adds up over shards."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first response of every reason, in short."""

    @property
    def kept(self) -> int:
        """Responses in `groups`."""
        return self.asked - sum(self.dropped.values())


class PolicyAnswers:
    """A policy, loaded, that answers shards of prompts."""

    def __init__(self, *, policy: dict[str, Any], options: GenerationOptions, device: Any = None) -> None:
        """Load the policy.

        Args:
            policy: Arguments of `load_causal`, and `path`, `template`, `max_length`.
            options: How it answers.
            device: Where it runs; None: a GPU where there is one.

        Raises:
            UserError: it cannot be loaded, or has no template.
        """
        policy = dict(policy)
        path, template = policy.pop("path"), policy.pop("template", "auto")
        self.max_length: int = policy.pop("max_length")
        policy.pop("truncation", None)
        more = {key: policy[key] for key in ("revision", "trust_remote_code")}
        tokenizer = load_tokenizer(path, **more)
        self.encoder = Encoder(tokenizer, template)
        model = load_causal(path, **({"device": default_device(device)} | policy))
        check_vocabulary(tokenizer, model, path=path)
        self.generator = Generator(model, tokenizer, token_budget=options.token_budget)
        self.options = options

    def answer(self, prompts: pa.Table, *, label: str) -> Answered:
        """Ask every prompt for its responses, and look at each of them.

        Args:
            prompts: Schema `prompts_schema`.
            label: Of the policy, for who wrote what.
        """
        options, before = self.options, Counter(self.generator.counters)
        rows = prompts.to_pylist()
        keys = [int.from_bytes(row["prompt_id"][:8], "big") for row in rows]
        said = self.ask([row["prompt"] for row in rows], keys, samples=options.samples)
        refused = {place: one for place, one in enumerate(said) if isinstance(one, Refusal)}
        judged = {
            place: [*zip(one, self._reasons(one))] for place, one in enumerate(said) if not isinstance(one, Refusal)
        }
        dropped: Counter[str] = Counter()
        for refusal in refused.values():
            dropped[refusal.reason] += options.samples
        dropped.update(reason for many in judged.values() for _, reason in many if reason)
        kept = [response for many in judged.values() for response, reason in many if not reason]
        spent = Counter(self.generator.counters)
        spent.subtract(before)
        counters = {name: float(value) for name, value in spent.items()}
        counters |= {"tokens_kept": float(sum(len(one.tokens) for one in kept)), "prompts": float(len(rows))}
        counters |= {f"stop_{stop}": float(n) for stop, n in Counter(one.stop for one in kept).items()}
        quarantine, examples = _quarantined(rows, judged, refused, label)
        groups = _groups(prompts, judged, label)
        return Answered(groups, quarantine, len(rows) * options.samples, dict(dropped), counters, examples)

    def ask(
        self, prompts: Sequence[Messages], keys: Sequence[int], *, samples: int, first_sample: int = 0
    ) -> list[Refusal | list[Response]]:
        """Responses to conversations, or why the policy cannot be asked.

        Args:
            prompts: Messages, each of which ends where the policy is to answer.
            keys: What the random numbers of each follow from.
            samples: Responses to each.
            first_sample: The number of the first one.
        """
        options, found = self.options, [self._encode(prompt) for prompt in prompts]
        places = [place for place, one in enumerate(found) if not isinstance(one, Refusal)]
        responses = self.generator.generate(
            [one for one in found if not isinstance(one, Refusal)],
            [keys[place] for place in places],
            samples,
            Sampling(options.temperature, options.top_p, options.max_new_tokens, options.seed),
            first_sample=first_sample,
        )
        answered = dict(zip(places, responses))
        return [one if isinstance(one, Refusal) else answered[place] for place, one in enumerate(found)]

    def _encode(self, prompt: Messages) -> list[int] | Refusal:
        try:
            group = self.encoder.encode_group(prompt, [])
        except TemplateError as error:
            return Refusal("template_error", str(error))
        tokens, new = group.prompt_tokens, self.options.max_new_tokens
        if not tokens:
            return Refusal("template_error", "the template writes nothing of the prompt")
        if len(tokens) + new > self.max_length:
            return Refusal("too_long", f"{len(tokens)} tokens and {new} new ones, max_length {self.max_length}")
        return tokens

    def _reasons(self, responses: Sequence[Response]) -> list[str | None]:
        return why_unused(responses, drop_cut=self.options.drop_cut, max_repetition=self.options.max_repetition)


Judged = dict[int, list[tuple[Response, str | None]]]


def _groups(prompts: pa.Table, judged: Judged, label: str) -> pa.Table:
    """The groups of the prompts that have a response, in their order."""
    rows = [place for place, many in sorted(judged.items()) if any(not reason for _, reason in many)]
    ids = prompts["prompt_id"].to_pylist()
    completions, responses = [], []
    for place in rows:
        kept = [(sample, one) for sample, (one, reason) in enumerate(judged[place]) if not reason]
        messages = [[{"role": "assistant", "content": one.text}] for _, one in kept]
        completions.append(
            [{"completion_id": completion_id(ids[place], said), "messages": said, "ratings": []} for said in messages]
        )
        written = {"policy": label}
        responses.append([written | {"sample": s, "stop": one.stop, "num_tokens": len(one.tokens)} for s, one in kept])
    taken = prompts.take(pa.array(rows, pa.int64()))
    schema = groups_schema(has_rest=has_rest(prompts))
    arrays = {
        "prompt_id": taken["prompt_id"],
        "prompt": taken["prompt"],
        "completions": pa.array(completions, schema.field("completions").type),
        "provenance": pa.array([{"row": row} for row in rows], schema.field("provenance").type),
        "parent_id": taken["parent_id"],
        "strategy": taken["strategy"],
        RESPONSES: pa.array(responses, pa.list_(RESPONSE)),
    }
    return pa.table(arrays, schema=pa.schema([*schema, *GENERATED]))


def _quarantined(
    rows: Sequence[dict[str, Any]], judged: Judged, refused: dict[int, Refusal], label: str
) -> tuple[pa.Table, dict[str, str]]:
    """The responses that cannot be used, with the prompt and the sample they are of; and the first of each reason."""
    found = []
    for place, row in enumerate(rows):
        prompt = row["prompt_id"].hex()
        if place in refused:
            found.append((*refused[place], place, {"prompt_id": prompt}))
        for sample, (response, why) in enumerate(judged.get(place, ())):
            if why:
                detail = f"sample {sample} of prompt {prompt}"
                found.append((why, detail, place, {"prompt_id": prompt, "sample": sample, "text": response.text}))
    columns = {
        "reason": [reason for reason, *_ in found],
        "detail": [detail for _, detail, *_ in found],
        "file": [label] * len(found),
        "row": [place for _, _, place, _ in found],
        "byte_position": [None] * len(found),
        "raw": [json.dumps(raw, ensure_ascii=False).encode("utf-8", "backslashreplace") for *_, raw in found],
    }
    examples: dict[str, str] = {}
    for reason, detail, _, raw in found:
        text = str(raw.get("text", ""))
        examples.setdefault(reason, f"{detail}: {text[:80]!r}" if text else detail)
    return pa.table(columns, schema=QUARANTINE), examples
