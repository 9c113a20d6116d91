"""Messages → token ids: one prompt that all completions of a group share, and each completion's response tokens.

    messages ─ template ─► text ─ tokenizer ─► [ prompt ids | response ids ]      the response ends with its end-of-turn

With a chat template the response begins after the generation prompt, which must be a *token* prefix of every full
conversation; tokenizers merge across text boundaries, so this is checked on ids, never on text. The templates `plain`
and `hh` tokenise prompt and response apart and join the ids, so that their boundary is exact by construction.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2

from prefsel.errors import TemplateError, UserError, invalid
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
        texts: list[list[str]] = []
        errors: dict[int, TemplateError] = {}
        for number, (prompt, completions) in enumerate(groups):
            try:
                texts.append(self._texts(prompt, completions))
            except TemplateError as error:
                texts.append([])
                errors[number] = error
        flat = list(itertools.chain.from_iterable(texts))
        # `verbose` off: the tokenizer would warn about every text above its own limit, which is handled here.
        ids = iter(self.tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"] if flat else [])
        encoded = []
        for number, (_, completions) in enumerate(groups):
            prompt_ids: list[int] = []
            responses: list[list[int] | TemplateError] = [errors[number]] * len(completions) if number in errors else []
            if number not in errors:
                prompt_ids, responses = self._split([list(next(ids)) for _ in texts[number]])
                errors.update((number, error) for error in responses if isinstance(error, TemplateError))
            encoded.append(self._fit(prompt_ids, responses))
        if errors and strict:
            raise errors[min(errors)]
        if errors and not self.tolerated:
            self.tolerated = str(errors[min(errors)])
        return encoded

    def _texts(self, prompt: Messages, completions: Sequence[Messages]) -> list[str]:
        """The prompt's text, then one per completion: whole conversations for Jinja, else responses alone."""
        prompt, completions = as_they_came(prompt), [as_they_came(messages) for messages in completions]
        if self.template in ("plain", "hh"):
            _refuse_more_than_text(self.template, [prompt, *completions])
        if self.template == "plain":
            return ["".join(message["content"] for message in messages) for messages in (prompt, *completions)]
        if self.template == "hh":
            return [_hh_text(prompt) + "\n\nAssistant:", *(_hh_response(messages) for messages in completions)]
        return [self._render(prompt, True), *(self._render([*prompt, *messages], False) for messages in completions)]

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
        except jinja2.TemplateError as error:
            roles = [message["role"] for message in messages]
            raise TemplateError(f"template {_named(self.template)}: {error}; message roles were {roles}") from error

    def _split(self, ids: list[list[int]]) -> tuple[list[int], list[list[int] | TemplateError]]:
        """Prompt ids and response ids of the texts of one group, an error for a response that cannot be told apart."""
        responses: list[list[int] | TemplateError] = []
        if self._jinja is None:
            prompt = self._first + ids[0]
            responses += [response + self._last for response in ids[1:]]
        else:
            prompt = ids[0]
            for number, full in enumerate(ids[1:]):
                is_shared = full[: len(prompt)] == prompt
                responses.append(full[len(prompt) :] if is_shared else self._divergence(prompt, full, number))
        if not prompt:
            raise UserError(
                f"template {_named(self.template)}: a prompt became no token at all, so nothing predicts the first "
                "response token; drop empty prompts, or use a tokenizer with a bos token"
            )
        return prompt, responses

    def _fit(self, prompt: list[int], responses: Sequence[list[int] | TemplateError]) -> EncodedGroup:
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
        return EncodedGroup(prompt, kept, status, num_cut, tuple(starts) if any(starts) else ())

    def _divergence(self, prompt: list[int], full: list[int], number: int) -> TemplateError:
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, full)))
        shown = [self.tokenizer.decode(ids[max(0, common - 4) : common + 4]) for ids in (prompt, full)]
        return TemplateError(
            f"template {_named(self.template)}: the generation prompt is not a token prefix of the conversation with "
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

    def encode_groups(
        self, groups: Sequence[tuple[Messages, Sequence[Messages]]], *, strict: bool = True
    ) -> list[EncodedGroup]:
        """As the encoder's, with the start token for a prompt; what was too long with its prompt still is."""
        encoded = self.encoder.encode_groups(groups, strict=strict)
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
    if Path(template).is_file():
        return Path(template).read_text(encoding="utf-8")
    raise invalid("template", template, VALID_TEMPLATES)


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


def _refuse_more_than_text(template: str, many: Sequence[Messages]) -> None:
    """Refuse messages of which a template that writes text alone would leave something out."""
    for message in itertools.chain.from_iterable(many):
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


def _named(template: str) -> str:
    return repr(template if len(template) <= 40 else template[:37] + "…")
