"""Formats whose rows are no flat record: trees of messages, and summaries of a post."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from prefsel.config import FormatOptions
from prefsel.ingest.example import (
    Completion,
    Example,
    Format,
    Preference,
    difference,
    distinct,
    field,
    list_field,
    mine,
)
from prefsel.ingest.fields import is_empty, parsed_number
from prefsel.ingest.messages import Message, Messages, require_text
from prefsel.ingest.row_error import RowError, wrong_type
from prefsel.ingest.surroundings import with_surroundings

_TREE_ROLES = {"prompter": "user", "assistant": "assistant"}


def _adapt_tree(value: Mapping[str, Any], options: FormatOptions) -> list[Example]:
    """A tree of OpenAssistant: `prompt` with `text`, `role` and `replies`; each reply the same, with a `rank`.

    Every message of a prompter that has two or more ranked replies is a prompt, with all turns before it. Rank 0 is the
    best; `pairs` says whether the best meets the worst, or all meet all. Deleted and empty messages are left out with
    what follows them.
    """
    found = list(_examples(field(value, "prompt"), [], options))
    if not found:
        raise RowError("too_few_completions", "prompt.replies: nowhere two ranked answers to one message")
    used = ("prompt",)
    return [replace(one, prompt=with_surroundings(value, one.prompt, options, used=used)) for one in found]


def _examples(node: Any, before: Messages, options: FormatOptions) -> Iterator[Example]:
    if not isinstance(node, Mapping):
        raise wrong_type("prompt", node, "a message with text, role and replies")
    if node.get("deleted") or is_empty(node.get("text")):
        return
    conversation = [*before, _tree_message(node)]
    replies = [one for one in node.get("replies") or [] if _is_there(one)]
    ranked = [one for one in replies if one.get("role") == "assistant" and parsed_number(one.get("rank")) is not None]
    if node.get("role") == "prompter" and len(ranked) > 1:
        completions = [Completion([_tree_message(one)], {"rank": parsed_number(one["rank"]) or 0.0}) for one in ranked]
        try:
            kept, _ = distinct(completions)
        except RowError:  # the same text twice
            kept = []
        if kept:
            yield Example(conversation, kept, *_by_rank(kept, options))
    for reply in replies:
        yield from _examples(reply, conversation, options)


def _is_there(node: Any) -> bool:
    return isinstance(node, Mapping) and not node.get("deleted") and not is_empty(node.get("text"))


def _tree_message(node: Mapping[str, Any]) -> Message:
    role = node.get("role")
    message = {"role": _TREE_ROLES.get(str(role), str(role)), "content": field(node, "text")}
    require_text([message], "text")
    return message


def _by_rank(kept: list[Completion], options: FormatOptions) -> tuple[list[Preference], int]:
    ranks = [one.ratings["rank"] for one in kept]
    if options.pairs == "all":
        return mine(len(kept), None, lambda first, second: difference(ranks[second], ranks[first]))
    best, worst = min(range(len(kept)), key=ranks.__getitem__), max(range(len(kept)), key=ranks.__getitem__)
    if ranks[best] == ranks[worst]:
        return [], 1
    return [Preference(best, worst, None, difference(ranks[worst], ranks[best]))], 0


def _adapt_summaries(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """openai/summarize_from_feedback, comparisons: `info` (a post, or an article), two `summaries`, and `choice`.

    The prompt is the text that the data set's own models saw: subreddit, title and post, or the article, then `TL;DR:`.
    """
    info = field(value, "info")
    if not isinstance(info, Mapping):
        raise wrong_type("info", info, "an object with a post or an article")
    names = {"subreddit": "SUBREDDIT: r/{}", "title": "TITLE: {}", "post": "POST: {}", "article": "{}"}
    parts = [form.format(str(info[name]).strip()) for name, form in names.items() if info.get(name)]
    if not (info.get("post") or info.get("article")):
        raise RowError("empty_prompt", "info: holds neither a post nor an article")
    completions = []
    for number, one in enumerate(list_field(value, "summaries")):
        if not isinstance(one, Mapping):
            raise wrong_type(f"summaries[{number}]", one, "an object with text")
        messages: Messages = [{"role": "assistant", "content": str(field(one, "text")).strip()}]
        require_text(messages, f"summaries[{number}]")
        completions.append(Completion(messages, {}))
    kept, index = distinct(completions)
    told = parsed_number(field(value, "choice"))
    if len(index) != 2 or told not in (0, 1):
        raise RowError(
            "wrong_type", f"choice: got {value['choice']!r} of {len(index)} summaries; valid: 0 or 1, of two"
        )
    prompt = [{"role": "user", "content": "\n\n".join([*parts, "TL;DR:"])}]
    prompt = with_surroundings(value, prompt, options, used=("info", "summaries", "choice"))
    choice = int(told)
    return Example(prompt, kept, [Preference(index[choice], index[1 - choice], None, None)])


def _is_tree(value: Mapping[str, Any]) -> bool:
    prompt = value.get("prompt")
    return isinstance(prompt, Mapping) and "replies" in prompt and "text" in prompt


def _is_summaries(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("info"), Mapping) and isinstance(value.get("summaries"), list) and "choice" in value


FORMATS = (
    Format("openassistant", _adapt_tree, _is_tree, ("message_tree_id", "prompt.replies", "prompt.text")),
    Format("summarize_feedback", _adapt_summaries, _is_summaries, ("info", "summaries", "choice")),
)
"""In the order in which they are tried."""
