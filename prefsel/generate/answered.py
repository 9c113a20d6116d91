"""What a policy answered to a shard of prompts → a shard of groups: the responses of use, and the others with a reason.

Whichever engine drew the responses, this is what becomes of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from prefsel.config import GenerationOptions
from prefsel.errors import UserError
from prefsel.generate.engine import Response
from prefsel.generate.quality import why_unused
from prefsel.ingest.identity import completion_id
from prefsel.models.chat import Encoder
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


def prompt_tokens(encoder: Encoder, prompt: Messages, *, max_length: int, max_new_tokens: int) -> list[int] | Refusal:
    """The tokens of a prompt, the generation prompt included, or why it cannot be asked.

    Args:
        encoder: The policy's tokenizer with its template.
        prompt: Messages, the last of which is answered.
        max_length: Most tokens of prompt and response.
        max_new_tokens: Most tokens of a response.
    """
    try:
        group = encoder.encode_group(prompt, [])
    except UserError as error:  # of the template, or because nothing is left of the prompt
        return Refusal("template_error", str(error))
    tokens = group.prompt_tokens
    if len(tokens) + max_new_tokens > max_length:
        return Refusal("too_long", f"{len(tokens)} tokens and {max_new_tokens} new ones, max_length {max_length}")
    return tokens


Said = Refusal | list[Response]
"""What a policy said to a prompt: why it could not be asked, or its responses in the order of their samples."""


def answered(
    prompts: pa.Table, said: Sequence[Said], options: GenerationOptions, *, label: str, spent: Mapping[str, float]
) -> Answered:
    """Look at every response: what is of use becomes groups, the rest is told.

    Args:
        prompts: Schema `prompts_schema`.
        said: To each of them.
        options: How they were answered.
        label: Of the policy, for who wrote what.
        spent: What the engine counted.
    """
    rows = prompts.to_pylist()
    refused = {place: one for place, one in enumerate(said) if isinstance(one, Refusal)}
    judged = {
        place: [*zip(one, _reasons(one, options))] for place, one in enumerate(said) if not isinstance(one, Refusal)
    }
    dropped: Counter[str] = Counter()
    for refusal in refused.values():
        dropped[refusal.reason] += options.samples
    dropped.update(reason for many in judged.values() for _, reason in many if reason)
    kept = [response for many in judged.values() for response, reason in many if not reason]
    counters = {name: float(value) for name, value in spent.items()}
    counters |= {"tokens_kept": float(sum(len(one.tokens) for one in kept)), "prompts": float(len(rows))}
    counters |= {f"stop_{stop}": float(n) for stop, n in Counter(one.stop for one in kept).items()}
    quarantine, examples = _quarantined(rows, judged, refused, label)
    groups = _groups(prompts, judged, label)
    return Answered(groups, quarantine, len(rows) * options.samples, dict(dropped), counters, examples)


def _reasons(responses: Sequence[Response], options: GenerationOptions) -> list[str | None]:
    return why_unused(responses, drop_cut=options.drop_cut, max_repetition=options.max_repetition)


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
