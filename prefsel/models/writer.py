"""Messages → texts, by a chat template or a built-in one, and notes of what was not written as it came."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    special_note,
    special_text,
)
from prefsel.models.template_limits import RENDER_S, TooSlow, excess, within
from prefsel.schema import REST

Messages = Sequence[Mapping[str, Any]]

BUILT_IN = ("plain", "hh")
"""Templates that tokenise prompt and response apart."""
VALID_TEMPLATES = "auto, tokenizer, plain, hh, a Jinja file, or an inline Jinja template"
WITH_TOOLS = "tool_use"
"""Of a tokenizer's named templates the one that transformers takes for conversations with tools."""
HH_TURNS = {"system": "{}", "user": "\n\nHuman: {}", "assistant": "\n\nAssistant: {}"}


@dataclass(frozen=True)
class Written:
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


class Writer:
    """A template at work."""

    def __init__(self, tokenizer: Any, template: str, *, ending: str) -> None:
        """Resolve the template once.

        Args:
            tokenizer: A Hugging Face tokenizer.
            template: As `Encoder` takes it.
            ending: What ends a response of a built-in template.

        Raises:
            UserError: An unknown template, or a tokenizer without one.
        """
        self.tokenizer, self.template = tokenizer, template
        self._jinja = None if template in BUILT_IN else _chat_template(tokenizer, template)
        self._require_limits(self._jinja)
        self._special = special_text(tokenizer)
        self.traits = probe_template(self._render) if self._jinja else TemplateTraits(ending=ending)
        self._is_dated = self._jinja is not None and self._writes_date()
        self._with_tools: Writer | None = None
        if (with_tools := _template_with_tools(tokenizer, template)) not in (None, self._jinja):
            self._with_tools = copy.copy(self)
            self._with_tools._jinja = with_tools
            self._require_limits(with_tools)
            self._with_tools.traits = probe_template(self._with_tools._render)

    def _require_limits(self, jinja: str | None) -> None:
        """Refuse a template that hangs, or takes all memory, over an ordinary conversation.

        Raises:
            UserError: Says what it takes too much of.
        """
        if jinja is not None and (what := excess(jinja)):
            raise UserError(
                f"template {named(self.template)}: it takes {what} for 32 short turns; choose another template"
            )

    def write(self, prompt: Messages, completions: Sequence[Messages]) -> Written:
        """The texts of a group; an error takes the place of every conversation that the template refuses."""
        if self._with_tools is not None and any("tools" in message for message in as_they_came(prompt)):
            return self._with_tools.write(prompt, completions)
        try:
            prompt = as_taken(as_they_came(prompt), self.traits)
            if self._jinja is None:
                _refuse_more_than_text(self.template, prompt)
            opened = self._opened(prompt)
        except TemplateError as error:
            if not completions:
                raise self.about(error) from error
            return Written("", [self.about(error)] * len(completions))
        conversations: list[list[dict[str, Any]]] = []
        texts: list[str | TemplateError] = []
        for messages in completions:
            try:
                conversations.append(as_taken(as_they_came(messages), self.traits))
                texts.append(self._conversation(prompt, conversations[-1]))
            except TemplateError as error:
                texts.append(self.about(error))
                conversations[len(texts) - 1 :] = [[]]
        notes = self._notes(prompt, conversations)
        if self._jinja is None:
            return Written(opened, texts, notes)
        opened, is_shorter = self._answered(opened, texts)
        if is_shorter:
            notes += (Note("opening", len(texts), repr(self.traits.unanswered)),)
        return Written(opened, *self._looked_at(opened, prompt, conversations, texts, notes))

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
                    text = self.about(TemplateError(f"it writes nothing of completion {number}: {what}"))
            found.append(text)
        return found, notes + tuple(Note(kind, *counted) for kind, counted in kinds.items())

    def _render_of_another(self, prompt: Messages, completion: Messages) -> str:
        """What the template writes for another answer in the place of this one; empty where it refuses that."""
        try:
            return self._render([*prompt, *as_taken(another(completion), self.traits)], False)
        except TemplateError:
            return ""

    def _writes_date(self) -> bool:
        """Whether the day on which a prompt is written stands in it: asked with a clock that says something else."""
        clock, asked = "{%- macro strftime_now(form) %}ov8q day{% endmacro %}", [{"role": "user", "content": "?"}]
        try:
            return "ov8q day" in self._render(as_taken(asked, self.traits), True, before=clock)
        except TemplateError:
            return False

    def _notes(self, prompt: Messages, conversations: Sequence[Messages]) -> tuple[Note, ...]:
        """What can be said of a group without its text."""
        notes, own = [], [special_note(self._special, messages) for messages in conversations]
        shared = special_note(self._special, prompt)
        if marked := [shared or one for one in own if shared or one]:
            notes.append(Note("special_text", len(marked), marked[0]))
        if conversations and not self.traits.takes_text:
            notes.append(Note("parts", len(conversations), ""))
        if conversations and self._is_dated:
            notes.append(Note("dated", len(conversations), ""))
        if conversations and self.traits.ending is not None and not self.traits.ending.strip():
            notes.append(Note("no_end", len(conversations), ""))
        return tuple(notes)

    def _render(self, messages: Messages, add_generation_prompt: bool, *, before: str = "") -> str:
        """What the template writes, with some Jinja `before` it."""
        tools = next((message["tools"] for message in messages if "tools" in message), None)
        try:
            text = within(
                RENDER_S,
                lambda: self.tokenizer.apply_chat_template(
                    [{key: value for key, value in message.items() if key != "tools"} for message in messages],
                    chat_template=f"{before}{self._jinja}",
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **({} if tools is None else {"tools": tools}),
                ),
            )
            return str(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"template {named(self.template)}: line {error.lineno}: {error}") from error
        except TooSlow as error:
            raise self.about(TemplateError(f"of a conversation of {len(messages)} messages, {error}")) from error
        except MemoryError:
            raise
        except Exception as error:  # A template is code of its author, and may raise anything.
            roles = [message.get("role") for message in messages]
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise self.about(TemplateError(f"{kind}{error}; message roles were {roles}")) from error

    def about(self, error: TemplateError) -> TemplateError:
        """An error that names the template."""
        begun = f"template {named(self.template)}"
        return error if str(error).startswith(begun) else TemplateError(f"{begun}: {error}")


def _chat_template(tokenizer: Any, template: str) -> str:
    """Jinja source of a template that is not built in."""
    if template in ("auto", "tokenizer"):
        own = getattr(tokenizer, "chat_template", None)
        what = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if isinstance(own, dict) and own and "default" not in own:
            raise UserError(
                f"template: got {template!r}, but tokenizer {what} has several chat templates and none of them is its "
                f"default: {', '.join(sorted(own))}; save the one you want as a Jinja file and name that"
            )
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
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


def _template_with_tools(tokenizer: Any, template: str) -> str | None:
    """Jinja source that conversations with tools get instead of the default, as in transformers; None: the same."""
    own = getattr(tokenizer, "chat_template", None)
    return own.get(WITH_TOOLS) if template in ("auto", "tokenizer") and isinstance(own, dict) else None


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
