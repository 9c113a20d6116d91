"""Messages → token ids: one prompt that all completions of a group share, and each completion's response tokens.

    messages ─ template ─► text ─ tokenizer ─► [ prompt ids | response ids ]      the response ends with its end-of-turn

With a chat template the response begins after the generation prompt, which must be a *token* prefix of every full
conversation; tokenizers merge across text boundaries, so this is checked on ids, never on text. The templates `plain`
and `hh` tokenise prompt and response apart and join the ids, so that their boundary is exact by construction.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2

from prefsel.errors import TemplateError, UserError, invalid
from prefsel.models.template import (
    Note,
    TemplateTraits,
    another,
    as_taken,
    became,
    lost_of_prompt,
    probe_template,
    shown,
    special_note,
    special_text,
)
from prefsel.schema import REST

Messages = Sequence[Mapping[str, Any]]
Truncation = Literal["drop", "right", "left"]

VALID_TEMPLATES = "auto, tokenizer, plain, hh, a Jinja file, or an inline Jinja template"
HH_TURNS = {"system": "{}", "user": "\n\nHuman: {}", "assistant": "\n\nAssistant: {}"}


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


@dataclass(frozen=True)
class _Written:
    """The texts of a group, before they are tokens."""

    prompt: str
    completions: list[str | TemplateError]
    """Whole conversations for Jinja, else responses alone."""
    notes: tuple[Note, ...] = ()

    @property
    def texts(self) -> list[str]:
        """What goes through the tokenizer: nothing where no completion has a text."""
        found = [one for one in self.completions if isinstance(one, str)]
        return [self.prompt, *found] if found or not self.completions else []


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
        self._jinja = None if template in ("plain", "hh") else _chat_template(tokenizer, template)
        self._first, self._last = ([], []) if self._jinja else _outer_tokens(tokenizer, template)
        self._special = special_text(tokenizer)
        self.traits = probe_template(self._render) if self._jinja else TemplateTraits(ending=self._last_text())

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
        written = [self._write(prompt, completions) for prompt, completions in groups]
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

    def _write(self, prompt: Messages, completions: Sequence[Messages]) -> _Written:
        """The texts of a group; an error takes the place of every conversation that the template refuses."""
        try:
            prompt = as_taken(as_they_came(prompt), self.traits)
            if self._jinja is None:
                _refuse_more_than_text(self.template, prompt)
            opened = self._opened(prompt)
        except TemplateError as error:
            if not completions:
                raise self._about(error) from error
            return _Written("", [self._about(error)] * len(completions))
        conversations: list[list[dict[str, Any]]] = []
        texts: list[str | TemplateError] = []
        for messages in completions:
            try:
                conversations.append(as_taken(as_they_came(messages), self.traits))
                texts.append(self._conversation(prompt, conversations[-1]))
            except TemplateError as error:
                texts.append(self._about(error))
                conversations[len(texts) - 1 :] = [[]]
        notes = self._notes(prompt, conversations)
        if self._jinja is None:
            return _Written(opened, texts, notes)
        opened, is_shorter = self._answered(opened, texts)
        if is_shorter:
            notes += (Note("opening", len(texts), repr(self.traits.unanswered)),)
        return _Written(opened, *self._looked_at(opened, prompt, conversations, texts, notes))

    def _opened(self, prompt: Messages) -> str:
        """A prompt with what opens the answer."""
        if self.template == "plain":
            return "".join(message["content"] for message in prompt)
        return _hh_text(prompt) + "\n\nAssistant:" if self.template == "hh" else self._render(prompt, True)

    def _conversation(self, prompt: Messages, completion: Messages) -> str:
        """A conversation with an answer, or the answer alone where it is tokenised apart."""
        if self._jinja is not None:
            return self._render([*prompt, *completion], False)
        _refuse_more_than_text(self.template, completion)
        return _hh_response(completion) if self.template == "hh" else "".join(one["content"] for one in completion)

    def _answered(self, opened: str, texts: Sequence[str | TemplateError]) -> tuple[str, bool]:
        """The prompt that answered turns begin with, and whether it is shorter than the generation prompt.

        Reasoning models open a thought that is not there when an answer came without one: then its turn begins where
        both texts part. A group of which one conversation begins with the whole generation prompt keeps that.
        """
        shorter, full = opened.removesuffix(self.traits.unanswered), [one for one in texts if isinstance(one, str)]
        is_shorter = shorter != opened and not any(one.startswith(opened) for one in full)
        is_shorter &= any(one.startswith(shorter) for one in full)
        return (shorter, True) if is_shorter else (opened, False)

    def _looked_at(
        self,
        opened: str,
        prompt: Messages,
        conversations: Sequence[Messages],
        texts: Sequence[str | TemplateError],
        notes: tuple[Note, ...],
    ) -> tuple[list[str | TemplateError], tuple[Note, ...]]:
        """The texts with an error for completions of which nothing is written, and notes of what else is lacking."""
        found, kinds = list[str | TemplateError](), dict[str, tuple[int, str]]()
        lost = lost_of_prompt(prompt, opened)
        for number, (messages, text) in enumerate(zip(conversations, texts)):
            if isinstance(text, str):
                behind = text[len(opened) :] if text.startswith(opened) else text
                made = became(messages, behind, self.traits.ending or "")
                for kind, example in (*made.notes, *([("prompt_changed", lost)] if lost else [])):
                    count, first = kinds.get(kind, (0, example))
                    kinds[kind] = (count + 1, first)
                if made.seems_silent and self._render_of_another(prompt, messages) == text:
                    what = dict(made.notes).get("changed", "")
                    text = self._about(TemplateError(f"it writes nothing of completion {number}: {what}"))
            found.append(text)
        return found, notes + tuple(Note(kind, *counted) for kind, counted in kinds.items())

    def _render_of_another(self, prompt: Messages, completion: Messages) -> str:
        """What the template writes for another answer in the place of this one; empty where it refuses that."""
        try:
            return self._render([*prompt, *as_taken(another(completion), self.traits)], False)
        except TemplateError:
            return ""

    def _notes(self, prompt: Messages, conversations: Sequence[Messages]) -> tuple[Note, ...]:
        """What can be said of a group without its text."""
        notes, own = [], [special_note(self._special, messages) for messages in conversations]
        shared = special_note(self._special, prompt)
        if marked := [shared or one for one in own if shared or one]:
            notes.append(Note("special_text", len(marked), marked[0]))
        if conversations and not self.traits.takes_text:
            notes.append(Note("parts", len(conversations), ""))
        if conversations and self.traits.ending is not None and not self.traits.ending.strip():
            notes.append(Note("no_end", len(conversations), ""))
        return tuple(notes)

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        tools = next((message["tools"] for message in messages if "tools" in message), None)
        try:
            return self.tokenizer.apply_chat_template(
                [{key: value for key, value in message.items() if key != "tools"} for message in messages],
                chat_template=self._jinja,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **({} if tools is None else {"tools": tools}),
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"template {named(self.template)}: line {error.lineno}: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # A template is code of its author, and may raise anything.
            roles = [message.get("role") for message in messages]
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise self._about(TemplateError(f"{kind}{error}; message roles were {roles}")) from error

    def _about(self, error: TemplateError) -> TemplateError:
        """An error that names the template."""
        begun = f"template {named(self.template)}"
        return error if str(error).startswith(begun) else TemplateError(f"{begun}: {error}")

    def _last_text(self) -> str:
        return str(self.tokenizer.decode(self._last))

    def _split(
        self, own: list[int], full: Sequence[list[int] | TemplateError]
    ) -> tuple[list[int], list[list[int] | TemplateError]]:
        """Prompt ids and response ids of the texts of one group, an error for a response that cannot be told apart."""
        responses: list[list[int] | TemplateError] = []
        prompt = self._first + own if self._jinja is None else own
        for number, ids in enumerate(full):
            if isinstance(ids, TemplateError):
                responses.append(ids)
            elif self._jinja is None:
                responses.append(ids + self._last)
            elif ids[: len(prompt)] != prompt:
                responses.append(self._divergence(prompt, ids, number))
            elif len(ids) == len(prompt):
                responses.append(self._about(TemplateError(f"it writes nothing of completion {number}")))
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


def _chat_template(tokenizer: Any, template: str) -> str:
    """Jinja source of a template that is not built in."""
    if template in ("auto", "tokenizer"):
        own = getattr(tokenizer, "chat_template", None)
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
            what = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise UserError(
                f"template: got {template!r}, but tokenizer {what} has no chat template; valid: plain, hh, "
                "a Jinja file, or an inline Jinja template"
            )
        return own
    if "{{" in template or "{%" in template:
        return template
    if os.path.isfile(template):
        return Path(template).read_text(encoding="utf-8")
    raise invalid("template", template, VALID_TEMPLATES)


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


def as_they_came(messages: Messages) -> list[dict[str, Any]]:
    """Stored messages with every key they came with: what `rest` holds as JSON is put back in its place."""
    found = []
    for message in messages:
        rest = message.get(REST)
        own = {key: value for key, value in message.items() if key != REST}
        found.append({**own, **json.loads(rest)} if isinstance(rest, str) else own)
    return found


def _refuse_more_than_text(template: str, messages: Messages) -> None:
    """Refuse messages of which a template that writes text alone would leave something out."""
    for message in messages:
        if len(message) > 2 or message["content"] is None:
            keys = ", ".join(key for key in message if key != "role")
            raise TemplateError(f"template {template!r} writes text alone; a message holds {keys}")


def _hh_text(messages: Messages) -> str:
    """Turns in the format of the HH-RLHF data."""
    for message in messages:
        if message["role"] not in HH_TURNS:
            raise TemplateError(f"template 'hh': got role {message['role']!r}; valid: {', '.join(HH_TURNS)}")
    return "".join(HH_TURNS[message["role"]].format(message["content"]) for message in messages)


def _hh_response(messages: Messages) -> str:
    """What follows `\\n\\nAssistant:` in the prompt; the blank belongs to the response, as tokenizers merge it."""
    return _hh_text(messages).removeprefix("\n\nAssistant:")


def named(template: str) -> str:
    """A template as errors and reports call it: what the configuration says, cut to 40 characters."""
    return repr(template if len(template) <= 40 else template[:37] + "…")
