"""New prompts from a policy's answers: read, then checked against what must stay unseen, what was seen, and the judge.

answer ─ read_prompt ─► text ─ in its conversation ─► excluded? · seen before? · too long for the judge? ─► Evolved
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from prefsel.errors import invalid
from prefsel.ingest.identity import ID_BYTES, prompt_id
from prefsel.selfplay.rewritten import read_prompt
from prefsel.selfplay.strategies import Messages, Strategy, user_turn, with_user_turn

REASONS = (
    *("no_user_turn", "empty", "meta_answer", "unchanged", "length_ratio"),
    *("excluded_prompt", "seen_prompt", "too_long_for_judge"),
)
"""Why a prompt or an answer gives no new prompt, in the order they are looked for. The first is of prompts that are not
asked to be rewritten at all: `user_turn` finds nothing in them."""
STUB_ANSWER: Mapping[str, str] = {"role": "assistant", "content": "Yes."}
"""The shortest thing that a judge may have to read behind a prompt."""


@dataclass(frozen=True)
class Evolved:
    """A new prompt and where it comes from."""

    messages: list[dict[str, Any]]
    """The old conversation, with the new text in its last turn."""
    prompt_id: bytes
    parent: bytes
    """prompt_id of the prompt it was made from."""
    strategy: str
    """Name of the strategy that asked for it."""


@dataclass(frozen=True)
class Excluded:
    """Prompts that must stay unseen: those held out, those of `exclude_prompts`."""

    ids: Container[bytes]
    """Their prompt_ids."""
    texts: Container[bytes]
    """Their `text_key`s."""

    @classmethod
    def of(cls, prompts: Iterable[Messages]) -> Excluded:
        """The prompts given, by both."""
        known = [(prompt_id(one), text_key(one)) for one in prompts]
        return cls({one for one, _ in known}, {key for _, key in known})

    def holds(self, prompt: Messages) -> bool:
        """Whether a prompt is one of them, or asks the same in the same words."""
        return prompt_id(prompt) in self.ids or text_key(prompt) in self.texts


def text_key(prompt: Messages) -> bytes:
    """16 bytes that are equal for prompts whose user says the same, but for case, white space and how it is encoded.

    In Unicode `é` is one character or two, and letters of full width are others; NFKC makes the same ones of both.

    All texts of the user count, one after another. System text and earlier answers do not: an evaluation's question
    is known under another system prompt, too.
    """
    said = [one["content"] for one in prompt if one["role"] == "user" and isinstance(one["content"], str)]
    folded = "\0".join(" ".join(_folded(text).split()) for text in said)
    return blake2b(folded.encode("utf-8"), digest_size=ID_BYTES).digest()


def _folded(text: str) -> str:
    """Without differences of case and encoding; normalized again, as folding may take compositions apart."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def evolved_prompt(
    parent: Messages,
    strategy: Strategy,
    answer: str,
    *,
    length_factor: float | None,
    excluded: Excluded,
    is_seen: Callable[[bytes], bool],
    fits: Callable[[list[dict[str, Any]]], bool],
) -> Evolved | str:
    """The prompt that a policy made of another one, or the reason that there is none.

    Args:
        parent: The old prompt, messages as they came; its last turn was rewritten.
        strategy: What asked for it.
        answer: What the policy answered to `strategy_prompt`.
        length_factor: As for `read_prompt`.
        excluded: Prompts that must stay unseen.
        is_seen: Whether a prompt_id belongs to any prompt there was before, of the data or of a round.
        fits: Whether the judge can read a conversation: the new prompt and a stub of an answer.

    Returns:
        The new prompt; or a reason of `REASONS`, the first that applies.

    Raises:
        UserError: The parent does not end with a text of the user.
    """
    old = user_turn(parent)
    if old is None:
        raise invalid("parent", parent[-1]["role"] if parent else None, "messages that end with a text of the user")
    text, reason = read_prompt(answer, old, length_factor=length_factor)
    if text is None:
        return str(reason)
    messages = with_user_turn(parent, text)
    made = prompt_id(messages)
    if excluded.holds(messages):
        return "excluded_prompt"
    if is_seen(made):
        return "seen_prompt"
    if not fits([*messages, dict(STUB_ANSWER)]):
        return "too_long_for_judge"
    return Evolved(messages, made, prompt_id(parent), strategy.name)


def first_of_each(evolved: Iterable[Evolved]) -> list[Evolved]:
    """Of new prompts that are equal the one of the smallest (parent, strategy), for any order and sharding of them.

    Returns:
        In order of prompt_id; those missing are `seen_prompt`.
    """
    found: dict[bytes, Evolved] = {}
    for one in evolved:
        other = found.setdefault(one.prompt_id, one)
        if (one.parent, one.strategy) < (other.parent, other.strategy):
            found[one.prompt_id] = one
    return [found[key] for key in sorted(found)]
