"""Pairs as the field's trainers take them, and the lines with which each of them reads what is written.

    prompt, chosen, rejected as messages ─▶ lists of messages (TRL, OpenRLHF) | single messages (axolotl, LLaMA-Factory)

A trainer that cannot hold something of a pair (a tool call, a second message of a response, a turn out of order) is
never given the pair without it: the pair is refused with a reason.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefsel.config.yaml_text import read_yaml
from prefsel.errors import UserError

Messages = Sequence[Mapping[str, Any]]
FILE = "train.parquet"
"""The data file of a written folder."""


class CannotHold(ValueError):
    """A format has no place for something of a pair or an answer; says for what."""


@dataclass(frozen=True)
class Trainer:
    """What a trainer reads."""

    title: str
    convert: Callable[[Messages, Messages, Messages], dict[str, Any]]
    """(prompt, chosen, rejected), messages as they came → the columns that it reads; raises `CannotHold`."""
    has_lists: bool
    """Whether messages stand in lists, with every key they came with; else the columns are single messages of text."""
    lines: Callable[[str, str], str]
    """(folder, name of the selection) → what a person writes to read it."""
    language: str
    """Of the lines."""


# ------------------------------------------------------------------------------------------------------------- lists


def with_tools(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """Lists of messages as they came; what they say of tools becomes the column `tools`, JSON text.

    Raises:
        CannotHold: The prompt is empty, or its messages offer different tools.
    """
    if not prompt:
        raise CannotHold("a prompt without a message")
    offered = [one["tools"] for one in (*prompt, *chosen, *rejected) if "tools" in one]
    if any(one != offered[0] for one in offered):
        raise CannotHold("messages of one conversation that offer different tools")
    sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    lists = {
        name: [{key: value for key, value in one.items() if key != "tools"} for one in side]
        for name, side in sides.items()
    }
    return {**lists, "tools": _json(offered[0]) if offered else None}


def without_tools(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """Lists of messages as they came, for a trainer that hands its template no tools.

    Raises:
        CannotHold: As `with_tools`, or tools are offered.
    """
    found = with_tools(prompt, chosen, rejected)
    if found.pop("tools") is not None:
        raise CannotHold("tools that are offered to the model")
    return found


# ----------------------------------------------------------------------------------------------------------- objects

_AXOLOTL_ROLES = ("system", "user", "assistant", "tool")
_AXOLOTL_DUMMY = "[[dummy_message]]"
"""What axolotl writes in the place of the prompt, to cut a rendered conversation where the response's text first stands
in it: of a response "a" it would train on all that follows the first "a" in here."""


def role_and_content(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """`messages`, and one message of text for either response.

    Raises:
        CannotHold: A message holds more than text, its role is unknown, or a response is of several messages or stands
            in what axolotl writes before it.
    """
    if not prompt:
        raise CannotHold("a prompt without a message")
    for one in (*prompt, *chosen, *rejected):
        _only_text(one)
        if one["role"] not in _AXOLOTL_ROLES:
            raise CannotHold(f"the role {one['role']!r}")
    sides = {"chosen": _single(chosen), "rejected": _single(rejected)}
    for one in sides.values():
        if one["content"] in _AXOLOTL_DUMMY:
            raise CannotHold(f"a response so short that it finds it in {_AXOLOTL_DUMMY!r}, which it writes before it")
    return {"messages": list(prompt), **sides}


def turns(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Any]:
    """`messages` of strictly alternating turns, an opening system message aside, and one message for either response.

    Tool calls become a turn of the role `function_call`, whose content is JSON of names and arguments.

    Raises:
        CannotHold: Turns do not alternate, a response is of several messages, or a message holds more.
    """
    offered = with_tools(prompt, chosen, rejected)["tools"]
    messages = [_turn(one, before) for one, before in zip(prompt, [{}, *prompt])]
    for number, one in enumerate(messages[1:] if messages[0]["role"] == "system" else messages):
        if one["role"] not in (("user", "tool"), ("assistant", "function_call"))[number % 2]:
            raise CannotHold(f"turn {number} of the role {one['role']!r}: user and assistant must alternate")
    if messages[-1]["role"] not in ("user", "tool"):
        raise CannotHold(f"a prompt that ends with the role {messages[-1]['role']!r}")
    sides = {name: _turn(_single(side), {}) for name, side in (("chosen", chosen), ("rejected", rejected))}
    for name, one in sides.items():
        if one["role"] not in ("assistant", "function_call"):
            raise CannotHold(f"{name} of the role {one['role']!r}")
    return {"messages": messages, **sides, "tools": offered or ""}


def _turn(message: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, str]:
    calls = message.get("tool_calls")
    more = set(message) - {"role", "content", "tools", "tool_calls"}
    if message["role"] == "tool" and len(before.get("tool_calls", [])) == 1:
        more -= {"tool_call_id", "name"}  # which call it answers: the only one of the turn before
    if more:
        raise CannotHold(f"a message with {', '.join(sorted(more))}")
    if not calls:
        return _only_text({"role": message["role"], "content": message["content"]})
    if message["content"]:
        raise CannotHold("a message with both text and tool_calls")
    return {"role": "function_call", "content": _json([_call(one) for one in calls])}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    more = (set(call) - {"id", "type", "function", "name", "arguments"}) | (
        set(function) - {*call, "name", "arguments"}
    )
    if more or not function.get("name"):
        raise CannotHold(f"a call with {', '.join(sorted(more))}" if more else "a call without a name")
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        raise CannotHold(f"a call of {function['name']!r} whose arguments are not JSON") from None
    return {"name": function["name"], "arguments": arguments}


def _single(messages: Messages) -> Mapping[str, Any]:
    if len(messages) != 1:
        raise CannotHold(f"a response of {len(messages)} messages")
    return messages[0]


def _only_text(message: Mapping[str, Any]) -> dict[str, str]:
    more = sorted(key for key in message if key not in ("role", "content"))
    if more:
        raise CannotHold(f"a message with {', '.join(more)}")
    if not isinstance(message["content"], str):
        raise CannotHold(f"a message whose content is {type(message['content']).__name__}")
    return dict(message)


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------- lines


def dataset_info(name: str, columns: Sequence[str]) -> dict[str, Any]:
    """The entry of `dataset_info.json` with which LLaMA-Factory reads `turns` from a file with such columns."""
    read = {one: one for one in ("messages", "chosen", "rejected", "tools") if one in columns}
    roles = {"user": "user", "assistant": "assistant", "observation": "tool", "function": "function_call"}
    tags = {"role_tag": "role", "content_tag": "content", "system_tag": "system"}
    tags |= {f"{role}_tag": found for role, found in roles.items()}
    return {name: {"file_name": FILE, "formatting": "sharegpt", "ranking": True, "columns": read, "tags": tags}}


def _trl(folder: str, name: str) -> str:
    return (
        "import datasets\nimport trl\n\n"
        f'data = datasets.load_dataset({_quoted(folder)}, split="train")\n'
        'trl.DPOTrainer(model=MODEL, args=trl.DPOConfig("out", max_length=None), train_dataset=data).train()'
    )


def _openrlhf(folder: str, name: str) -> str:
    return (
        "python -m openrlhf.cli.train_dpo --data.apply_chat_template \\\n"
        f"  --data.dataset {shlex.quote(f'{folder}/{FILE}')} \\\n"
        "  --data.prompt_key prompt --data.chosen_key chosen --data.rejected_key rejected …"
    )


def _axolotl(folder: str, name: str) -> str:
    return (
        f"rl: dpo\ndatasets:\n- path: {_scalar(folder)}\n  split: train\n  type: chat_template.default\n"
        "  field_messages: messages\n  field_chosen: chosen\n  field_rejected: rejected"
    )


def _llamafactory(folder: str, name: str) -> str:
    named = "its dataset_info.json says what the columns are"
    return f"stage: dpo\ndataset_dir: {_scalar(folder)}   # {named}\ndataset: {_scalar(name)}"


def _quoted(text: str) -> str:
    """As a literal of Python or YAML."""
    return json.dumps(text, ensure_ascii=False)


def _scalar(text: str) -> str:
    """As YAML, plain where that reads as the same text."""
    try:
        is_plain = read_yaml(f"- {text} # ", "it") == [text]
    except UserError:
        is_plain = False
    return text if is_plain else _quoted(text)


TRAINERS = {
    "trl": Trainer("TRL", with_tools, True, _trl, "python"),
    "openrlhf": Trainer("OpenRLHF", without_tools, True, _openrlhf, "bash"),
    "axolotl": Trainer("axolotl", role_and_content, False, _axolotl, "yaml"),
    "llamafactory": Trainer("LLaMA-Factory", turns, False, _llamafactory, "yaml"),
}
"""What `prefsel export --for` writes."""
