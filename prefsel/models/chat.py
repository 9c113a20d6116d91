"""Messages → token ids: one prompt that all completions of a group share, and each completion's response tokens.

    messages ─ template ─► text ─ tokenizer ─► [ prompt ids | response ids ]      the response ends with its end-of-turn

With a chat template the response begins after the generation prompt, which must be a *token* prefix of every full
conversation; tokenizers merge across text boundaries, so this is checked on ids, never on text. The templates `plain`
and `hh` tokenise prompt and response apart and join the ids, so that their boundary is exact by construction.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefsel.errors import TemplateError, UserError, invalid
from prefsel.models.template import Note, TemplateTraits, shown
from prefsel.models.writer import BUILT_IN, VALID_TEMPLATES, Messages, Writer, named

Truncation = Literal["drop", "right", "left"]


@dataclass(frozen=True)
class EncodedGroup:
    """Token ids of one prompt and its completions."""

    prompt_tokens: list[int]
    completion_tokens: list[list[int]]
    """Response ids, end-of-turn included; empty for a completion whose status is not `ok`."""
    status: list[str]
    """Per completion: `ok`, `too_long`, or `template_error` (only where that was tolerated)."""
    num_truncated: int
    """Completions that lost tokens, of their own or of their prompt."""
    prompt_starts: tuple[int, ...] = ()
    """Per completion, how many prompt tokens `truncation="left"` took away; empty: none from any."""
    same_as: tuple[int | None, ...] = ()
    """Per completion, the first one of the group with the same tokens, None where it is itself; empty: all differ."""
    notes: tuple[Note, ...] = ()
    """What the template did with some of the completions that is not as they came."""


class Encoder:
    """A tokenizer with its template and its length limit."""

    def __init__(
        self, tokenizer: Any, template: str = "auto", max_length: int | None = None, truncation: Truncation = "drop"
    ) -> None:
        """Resolve the template once.

        Args:
            tokenizer: A Hugging Face tokenizer.
            template: `auto` and `tokenizer` (its chat template), `plain` (contents joined, then eos), `hh`
                (`\\n\\nHuman: …\\n\\nAssistant: …`, then eos), or a Jinja template, inline or as the path of a file.
            max_length: Most tokens of prompt + response; None: no limit.
            truncation: What happens to a longer completion: `drop` it as `too_long`, cut it on the `right`, or cut its
                prompt on the `left`. Each completion is cut for itself, whatever its siblings need.

        Raises:
            UserError: An unknown template or truncation, or a tokenizer without what the template needs.
        """
        if truncation not in ("drop", "right", "left"):
            raise invalid("truncation", truncation, ["drop", "right", "left"])
        if max_length is not None and max_length < 2:
            raise invalid("max_length", max_length, "at least 2 tokens")
        self.tokenizer, self.template = tokenizer, template
        self.max_length, self.truncation = max_length, truncation
        self.tolerated = ""
        """The first template error that `strict=False` let pass."""
        self._is_apart = template in BUILT_IN
        self._first, self._last = _outer_tokens(tokenizer, template) if self._is_apart else ([], [])
        self._writer = Writer(tokenizer, template, ending=str(tokenizer.decode(self._last)) if self._last else "")
        self.traits = self._writer.traits

    def encode_group(self, prompt: Messages, completions: Sequence[Messages]) -> EncodedGroup:
        """`encode_groups` of one group."""
        return self.encode_groups([(prompt, completions)])[0]

    def encode_groups(
        self, groups: Sequence[tuple[Messages, Sequence[Messages]]], *, strict: bool = True
    ) -> list[EncodedGroup]:
        """Tokenise prompts with their completions, all texts in one call of the tokenizer.

        Args:
            groups: Prompts, each with its completions.
            strict: False: a completion that the template cannot share its prompt with gets the status
                `template_error` instead of raising, and `tolerated` keeps the first message. Real text needs this:
                under ChatML, one of 1 156 rows of HH-RLHF has an answer of a single blank, which tokenizers merge
                with the line break before it.

        Raises:
            TemplateError: The template refuses the messages, or the generation prompt is not a token prefix of a full
                conversation; names the template and shows where the ids part.
            UserError: A prompt without any token: nothing would predict the first response token.
        """
        written = [self._writer.write(prompt, completions) for prompt, completions in groups]
        flat = [text for group in written for text in group.texts]
        # `verbose` off: the tokenizer would warn about every text above its own limit, which is handled here.
        ids = iter(self.tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else [])
        encoded = []
        errors: list[TemplateError] = []
        for group in written:
            prompt_ids: list[int] = []
            responses: list[list[int] | TemplateError] = [one for one in group.completions if not isinstance(one, str)]
            if group.texts:
                own = list(next(ids))
                full = [list(next(ids)) if isinstance(one, str) else one for one in group.completions]
                prompt_ids, responses = self._split(own, full)
            refused = [one for one in responses if isinstance(one, TemplateError)]
            errors += refused
            notes = (Note("template_error", len(refused), str(refused[0])),) if refused else ()
            fitted = self._fit(prompt_ids, responses, notes + group.notes)
            encoded.append(self._with_same_tokens(fitted))
        if errors and strict:
            raise errors[0]
        if errors and not self.tolerated:
            self.tolerated = str(errors[0])
        return encoded

    def _split(
        self, own: list[int], full: Sequence[list[int] | TemplateError]
    ) -> tuple[list[int], list[list[int] | TemplateError]]:
        """Prompt ids and response ids of the texts of one group, an error for a response that cannot be told apart."""
        responses: list[list[int] | TemplateError] = []
        prompt = self._first + own if self._is_apart else own
        for number, ids in enumerate(full):
            if isinstance(ids, TemplateError):
                responses.append(ids)
            elif self._is_apart:
                responses.append(ids + self._last)
            elif ids[: len(prompt)] != prompt:
                responses.append(self._divergence(prompt, ids, number))
            elif len(ids) == len(prompt):
                responses.append(self._writer.about(TemplateError(f"it writes nothing of completion {number}")))
            else:
                responses.append(ids[len(prompt) :])
        if not prompt:
            raise UserError(
                f"template {named(self.template)}: a prompt became no token at all, so nothing predicts the first "
                "response token; drop empty prompts, or use a tokenizer with a bos token"
            )
        return prompt, responses

    def _fit(
        self, prompt: list[int], responses: Sequence[list[int] | TemplateError], notes: tuple[Note, ...]
    ) -> EncodedGroup:
        """Apply the length limit to each completion by itself."""
        limit = sys.maxsize if self.max_length is None else self.max_length
        kept: list[list[int]] = []
        status, starts, num_cut = [], [], 0
        for response in responses:
            if isinstance(response, TemplateError):
                kept.append([])
                status.append("template_error")
                starts.append(0)
                continue
            excess, start, fits = len(prompt) + len(response) - limit, 0, True
            if excess > 0 and self.truncation == "right" and len(prompt) < limit:
                response, num_cut = response[:-excess], num_cut + 1
            elif excess > 0 and self.truncation == "left" and excess < len(prompt):
                start, num_cut = excess, num_cut + 1
            else:
                fits = excess <= 0
            kept.append(response if fits else [])
            status.append("ok" if fits else "too_long")
            starts.append(start)
        return EncodedGroup(prompt, kept, status, num_cut, tuple(starts) if any(starts) else (), notes=notes)

    def _with_same_tokens(self, group: EncodedGroup) -> EncodedGroup:
        """The group with the completions that nothing tells apart, and a note of them."""
        same = _same_as(group.completion_tokens, group.status)
        others = [place for place in same if place is not None]
        if not others:
            return group
        example = shown(self.tokenizer.decode(group.completion_tokens[others[0]]))
        return replace(group, same_as=same, notes=(*group.notes, Note("same_tokens", len(others), example)))

    def _divergence(self, prompt: list[int], full: list[int], number: int) -> TemplateError:
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, full)))
        shown = [self.tokenizer.decode(ids[max(0, common - 4) : common + 4]) for ids in (prompt, full)]
        return TemplateError(
            f"template {named(self.template)}: the generation prompt is not a token prefix of the conversation with "
            f"completion {number}: they part at token {common} of {len(prompt)}, …{shown[0]!r}… against "
            f"…{shown[1]!r}…; choose another template ({VALID_TEMPLATES})"
        )


class Unconditional:
    """An encoder that takes the prompts away: the same response tokens after a single start token.

    What instruction-following difficulty divides by: how likely a response is when nobody asked for it.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Wrap an encoder.

        Raises:
            UserError: The tokenizer has neither a bos nor an eos token to start from.
        """
        tokenizer = encoder.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise UserError("unconditional: the tokenizer has neither a bos nor an eos token to start a response from")
        self.encoder, self.start = encoder, int(start)

    @property
    def tolerated(self) -> str:
        """As the encoder's."""
        return self.encoder.tolerated

    @property
    def template(self) -> str:
        """As the encoder's."""
        return self.encoder.template

    @property
    def traits(self) -> TemplateTraits:
        """As the encoder's."""
        return self.encoder.traits

    def encode_groups(
        self, groups: Sequence[tuple[Messages, Sequence[Messages]]], *, strict: bool = True
    ) -> list[EncodedGroup]:
        """As the encoder's, with the start token for a prompt; what was too long with its prompt still is."""
        encoded = self.encoder.encode_groups(groups, strict=strict)
        # What is the same behind its prompt is the same without it.
        return [replace(group, prompt_tokens=[self.start], prompt_starts=()) for group in encoded]


def _same_as(completions: Sequence[list[int]], status: Sequence[str]) -> tuple[int | None, ...]:
    """For each completion the first `ok` one with its tokens, None where it is that one; empty where all differ.

    Equal responses are cut alike, so their prompts are equal too.
    """
    first: dict[tuple[int, ...], int] = {}
    found = []
    for number, (tokens, what) in enumerate(zip(completions, status)):
        place = first.setdefault(tuple(tokens), number) if what == "ok" else number
        found.append(place if place != number else None)
    return tuple(found) if any(place is not None for place in found) else ()


def _outer_tokens(tokenizer: Any, template: str) -> tuple[list[int], list[int]]:
    """Ids the tokenizer puts before a text (bos), and those that end a response (eos, else what it puts after)."""
    bare, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(i for i in range(len(dressed) + 1) if list(dressed[i : i + len(bare)]) == list(bare))
    eos = getattr(tokenizer, "eos_token_id", None)
    last = [eos] if eos is not None else list(dressed[start + len(bare) :])
    if not last:
        raise UserError(f"template: {template!r} ends a response with the eos token, but this tokenizer has none")
    return list(dressed[:start]), last
