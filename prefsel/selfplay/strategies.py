"""Strategies: what a policy is asked when it shall rewrite a prompt. Each is a file, of this package or of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_validator

from prefsel.config.evolve import STRATEGIES
from prefsel.config.options import Name, Options
from prefsel.config.yaml_text import read_yaml
from prefsel.errors import UserError, invalid
from prefsel.rules import readable

Messages = Sequence[Mapping[str, Any]]

PLACE = "{prompt}"
"""Where the old prompt goes in a template. Nothing else in a template, and nothing in a prompt, has a meaning."""


class Strategy(Options):
    """One way to rewrite a prompt, as its file says it."""

    name: Name
    """What the prompts it makes are marked by."""
    kind: Literal["breadth", "depth"]
    """Whether it asks for another prompt of the same field, or for a harder form of the same one."""
    template: str
    """What the policy is asked, with `{prompt}` once, where the old prompt goes."""

    @field_validator("template")
    @classmethod
    def _one_place(cls, template: str) -> str:
        if (count := template.count(PLACE)) != 1:
            raise ValueError(f"got {PLACE} {count} times; valid: exactly once")
        if not template.replace(PLACE, "").strip():
            raise ValueError("asks for nothing; valid: what is to become of the prompt, in words")
        return template


def load_strategies(names: Sequence[str]) -> list[Strategy]:
    """The strategies of a configuration, in order.

    Args:
        names: Of strategies of this package, or paths of YAML files.

    Raises:
        UserError: There is no such file, it is not YAML, or not a strategy; or two of them have the same name.
    """
    found = [_read(name) for name in names]
    called = [one.name for one in found]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise invalid("strategies", ", ".join(twice), "a name of its own for each: new prompts are marked by it")
    return found


def _read(name: str) -> Strategy:
    try:
        if name in STRATEGIES:
            text = (files("prefsel.selfplay") / "strategies" / f"{name}.yaml").read_bytes()
        else:
            text = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"strategies: {name}: {error.strerror or error}") from error
    table = read_yaml(text, f"strategies: {name}")
    try:
        return Strategy.model_validate(table)
    except ValidationError as error:
        raise readable(f"strategies: {name}", error, Strategy.model_fields) from error


def user_turn(prompt: Messages) -> str | None:
    """The text that a strategy rewrites: that of the last message. None unless it is the user's and has some."""
    if not prompt or prompt[-1]["role"] != "user" or not isinstance(prompt[-1]["content"], str):
        return None
    return prompt[-1]["content"] if prompt[-1]["content"].strip() else None


def with_user_turn(prompt: Messages, text: str) -> list[dict[str, Any]]:
    """The prompt with another text in its last turn; what stands before it, and what else the turn holds, stays."""
    return [*map(dict, prompt[:-1]), {**prompt[-1], "content": text}]


def strategy_prompt(strategy: Strategy, prompt: Messages) -> list[dict[str, Any]]:
    """What the policy is asked: the conversation as it is, with the template around the text of its last turn.

    System text and earlier turns stay where they are, so that what is rewritten is read in its context. The prompt's
    text comes through character by character, whatever braces or template language it holds.

    Args:
        strategy: How to rewrite.
        prompt: Messages as they came; the last one is the user's.

    Raises:
        UserError: The prompt does not end with a text of the user: see `user_turn`.
    """
    text = user_turn(prompt)
    if text is None:
        raise invalid("prompt", prompt[-1]["role"] if prompt else None, "messages that end with a text of the user")
    before, after = strategy.template.split(PLACE)
    return with_user_turn(prompt, before + text + after)
