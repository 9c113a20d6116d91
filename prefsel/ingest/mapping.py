"""A row → an `Example`, by a map that says which field is what: the ground on which the formats stand.

    prompt, system, history, input, tools ─▶ prompt            chosen, rejected ─▶ two completions, one preference
                                                               responses + scores | ranks | preference ─▶ K and theirs

Fields that every map reads where a row has them: `system`, `history`, `input` and `tools` beside the prompt, ratings
under the names the field uses. A field that changes what the model saw, and that nothing reads, refuses the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any

from prefsel.config import FieldMap, FormatOptions, Verdict
from prefsel.ingest.aspects import by_aspects
from prefsel.ingest.example import Completion, Example, Format, Margin, Preference, difference, distinct, mine, number
from prefsel.ingest.fields import is_empty, lookup, parsed_number, top_field
from prefsel.ingest.messages import (
    Messages,
    has_text,
    held_messages,
    messages_of,
    prompt_transcript,
    require_text,
    text_of,
    transcript_of,
)
from prefsel.ingest.row_error import RowError, missing, wrong_type

AROUND: dict[str, tuple[str, ...]] = {
    "input": ("input",),
    "history": ("history",),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
}
"""What stands beside a prompt, and what it is usually called, in the order in which it is put there."""
SEEN = frozenset({*(name for names in AROUND.values() for name in names), "initial_reason_steps"})
"""Fields that change what the model saw: a row is never read without one that says something."""
SEEN_WORDS = frozenset(
    {"system", "sys", "developer", "persona", "history", "context", "contexts", "dialogue", "dialog"}
    | {"tool", "tools", "document", "documents", "docs", "passage", "passages", "knowledge", "attachments"}
    | {"image", "images", "img", "audio", "audios", "video", "videos"}
    | {"reasoning", "thinking", "think", "thought", "thoughts", "cot", "prefix", "prefill"}
)
"""Words of their names; a field with one of them is such a field too."""
NOT_SEEN = frozenset({"tool_choice", "parallel_tool_calls"})
PROMPTS = ("prompt", "question", "instruction", "query")
"""What a row calls its prompt; a second one with another text is no less what the model may have seen."""
CONVERSATIONS = ("messages", "conversation", "conversations")
"""Fields that repeat the prompt in many sets, and hold what came before it in others."""
NO_RATING = frozenset({"id", "idx", "index", "model", "response", "answer", "text", "prompt", "date", "source"})
"""What is said of one side and is no rating, though it may be a number."""
LONG_TEXT = 40
"""Characters; a shorter text may stand in another one by chance."""


def read(value: Mapping[str, Any], options: FormatOptions, *, fields: FieldMap) -> Example:
    """The example of a row.

    Raises:
        RowError: A field is absent or of another kind than the map says, or a field is left over that changes what the
            model saw.
    """
    if fields.responses is None:
        assert fields.chosen is not None, "a map has sides or responses"
        assert fields.rejected is not None, "both or none"
        return pair(value, fields, sides(value, (fields.chosen, fields.rejected)), options)
    return _several(value, fields, options)


def pair(
    value: Mapping[str, Any], fields: FieldMap, both: tuple[Messages, Messages], options: FormatOptions
) -> Example:
    """The example of a row with one labelled pair, from its two sides, which may repeat the prompt or not."""
    if both[0] == both[1]:
        raise RowError("identical_completions", "chosen and rejected are the same text")
    own = _prompt(value, fields, both)
    prompt, (chosen, rejected) = split(own, both, ("chosen", "rejected"))
    prompt = _around(value, fields, prompt, options, own)
    first, second = pair_ratings(value)
    for name, path in fields.ratings.items():
        for ratings, found in zip((first, second), _each(value, path, 2)):
            _put(ratings, name, found)
    margin = difference(first["score"], second["score"]) if "score" in first and "score" in second else None
    preference = Preference(0, 1, _aspect(value, fields.aspect or "aspect"), margin)
    return Example(prompt, [Completion(chosen, first), Completion(rejected, second)], [preference])


def sides(value: Mapping[str, Any], paths: tuple[str, str]) -> tuple[Messages, Messages]:
    """The two sides of a labelled pair as messages, a text being the assistant's.

    A text that is the JSON of a message list is that list, where the other side is one too: an answer may be JSON.
    """
    found = [_required(value, path) for path in paths]
    if all(isinstance(one, str) for one in found):
        lists = [messages_of(one, path, role="assistant") for one, path in zip(found, paths)]
        is_held = [len(one) != 1 or one[0]["content"] != text for one, text in zip(lists, found)]
        if all(is_held):
            return lists[0], lists[1]
        return _texts(value, (found[0], found[1]), paths)
    first, second = (messages_of(one, path, role="assistant") for one, path in zip(found, paths))
    return first, second


def _texts(value: Mapping[str, Any], texts: tuple[str, str], names: tuple[str, str]) -> tuple[Messages, Messages]:
    """Two sides that are text: answers, or transcripts.

    Raises:
        RowError: They are no answers: the names of other fields, or messages that a table has cut or written anew.
    """
    others = {word for key in value.keys() - set(names) for word in (key, re.split(r"[_-]", key)[-1])}
    if all(text.strip() in others for text in texts):
        raise RowError(
            "wrong_type", f"{names[0]}: got {texts[0]!r}, which names another field; name the answers in map"
        )
    if all(_LIKE_MESSAGES.match(text) for text in texts):
        raise RowError("wrong_type", f"{names[0]}: looks like messages, but is neither JSON nor Python's text for them")
    if all(_BEGINS_A_TURN.match(text) for text in texts):
        first, second = (transcript_of("\n\n" + text.strip(), name) for text, name in zip(texts, names))
        return first, second
    return _said(texts[0]), _said(texts[1])


_LIKE_MESSAGES = re.compile(r"""\s*(array\()?\[\s*\{\s*['"](role|content|from|value)['"]""")
_BEGINS_A_TURN = re.compile(r"\s*(Human|Assistant):")


def _said(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


# -------------------------------------------------------------------------------------------------------------- prompt


def _prompt(value: Mapping[str, Any], fields: FieldMap, many: Iterable[Messages]) -> Messages:
    """What the row calls its prompt; nothing where it names none, and whole conversations say it.

    Raises:
        RowError: It is absent or empty, and the sides are answers alone.
    """
    found = None if fields.prompt is None else lookup(value, fields.prompt)
    if is_empty(found):
        if fields.prompt is not None and all(len(one) == 1 for one in many):
            empty = RowError("empty_prompt", f"{fields.prompt}: no text")
            raise missing(value, fields.prompt) if found is None else empty
        return []
    if isinstance(found, str) and _TEMPLATED.fullmatch(found):
        raise RowError("wrong_type", f"{fields.prompt}: a chat template was applied to it already; give the messages")
    turns = prompt_transcript(found) if isinstance(found, str) else None
    return turns or messages_of(found, fields.prompt or "", role="user")


_TEMPLATED = re.compile(
    r"""\s*(<s>|<bos>|<\|begin_of_text\|>)?\s*
    (<\|im_start\|>.*<\|im_start\|>assistant
    |<\|start_header_id\|>.*<\|start_header_id\|>assistant<\|end_header_id\|>
    |<start_of_turn>.*<start_of_turn>model)\s*""",
    re.DOTALL | re.VERBOSE,
)
"""A whole prompt as a template writes it, waiting for the answer; text that only mentions such a mark is none."""


def split(prompt: Messages, many: Iterable[Messages], names: Iterable[str]) -> tuple[Messages, list[Messages]]:
    """Prompt and completions: what all conversations share from the start belongs to the prompt, whoever opens them.

    Args:
        prompt: What the row calls its prompt; may be empty.
        many: Completions, or conversations that repeat the prompt and perhaps more before it.
        names: What errors call them.

    Raises:
        RowError: They share no prompt, or part at a message that is no answer.
    """
    many = list(many)
    repeats = [bool(prompt) and _same(one[: len(prompt)], prompt) for one in many]
    rest = [one[len(prompt) :] if is_repeated else one for one, is_repeated in zip(many, repeats)]
    limit = min(len(one) for one in rest) - 1
    shared = 0
    while shared < limit and all(one[shared] == rest[0][shared] for one in rest):
        shared += 1
    before = rest[0][:shared]
    if before and prompt and (all(repeats) or not _holds(before, prompt)):
        if before[0]["role"] != "assistant" and not all(repeats):
            raise RowError("prompt_mismatch", "prompt: it does not stand in the conversations, which have another one")
        before = [*prompt, *before]
    for name, one in zip(names, rest):
        require_text(one[shared:], name)
        if one[-1]["role"] != "assistant":
            raise RowError("wrong_type", f"{name}: ends with role {one[-1]['role']!r}; valid: the assistant's")
        # Parting at a user's message means that two different questions were answered: no preference between answers.
        if one[shared]["role"] != "assistant":
            raise RowError("prompt_mismatch", f"{name}: parts from the others at message {shared}, which is no answer")
    if not before and prompt and prompt[-1]["role"] == "assistant":
        if not any(_same(one[:1], prompt[-1:]) for one in rest):
            raise RowError("prompt_mismatch", "prompt: ends with the assistant's turn, and answers follow it")
        prompt = prompt[:-1]  # the whole conversation with one of the answers
    if not (before or prompt):
        raise RowError("prompt_mismatch", "the conversations share no message before the answer")
    if all(one["role"] == "system" for one in before or prompt):
        raise RowError("empty_prompt", "the conversations share no message but the system's before the answer")
    return before or prompt, [one[shared:] for one in rest]


def _same(some: Messages, others: Messages) -> bool:
    """Whether two message lists say the same; white space around a text does not matter."""
    return len(some) == len(others) and all(_text(one) == _text(other) for one, other in zip(some, others))


def _text(message: Mapping[str, Any]) -> tuple[str, str]:
    return message["role"], (message["content"] or "").strip()


def _holds(conversation: Messages, prompt: Messages) -> bool:
    """Whether all messages of a prompt stand in a conversation, in their order."""
    rest = iter(_text(one) for one in conversation)
    return all(_text(one) in rest for one in prompt)


def _around(
    value: Mapping[str, Any], fields: FieldMap, prompt: Messages, options: FormatOptions, own: Messages
) -> Messages:
    """As `with_surroundings`; `own` is what the row calls its prompt."""
    given = {role: path for role in AROUND if (path := getattr(fields, role)) is not None}
    _refuse_siblings(value, fields, options)
    used = {top_field(one) for one in paths(fields)}
    return with_surroundings(value, prompt, options, used=used, given=given, is_whole=not own or len(prompt) > len(own))


def _refuse_siblings(value: Mapping[str, Any], fields: FieldMap, options: FormatOptions) -> None:
    """Refuse a field that the model saw beside one that is read inside an object.

    Raises:
        RowError: Such a field says something, and neither the map nor `ignore` names it.
    """
    read_inside: dict[str, set[str]] = {}
    for path in paths(fields):
        before, dot, name = path.rpartition(".")
        if dot:
            read_inside.setdefault(before, set()).add(name.split("[")[0])
    for before, names in read_inside.items():
        holders = lookup(value, before)
        for holder in holders if isinstance(holders, list) else [holders]:
            for name in sorted(holder.keys() - names) if isinstance(holder, Mapping) else ():
                if _is_seen(name) and _says(holder[name]) and not {name, f"{before}.{name}"} & set(options.ignore):
                    raise _unread(f"{before}.{name}")


def with_surroundings(
    value: Mapping[str, Any],
    prompt: Messages,
    options: FormatOptions,
    *,
    used: Iterable[str],
    given: Mapping[str, str] | None = None,
    is_whole: bool = False,
) -> Messages:
    """The prompt with the system text, earlier turns, input and tools that stand beside it in the row.

    Args:
        value: The row.
        prompt: What it calls its prompt, or what its conversations share.
        options: Of the source; `ignore` names fields that may be left out.
        used: Fields that were read already.
        given: Paths of surroundings, by role (a key of `AROUND`), where they are not the usual names.
        is_whole: Whether the prompt is what conversations share, so that the input may stand in it already.

    Raises:
        RowError: The prompt has no text, or a field that changes what the model saw would be left out.
    """
    is_used, texts = {*used, *options.ignore}, [one["content"] or "" for one in prompt]
    for role, names in AROUND.items():
        there = (one for one in names if one not in is_used and not is_empty(value.get(one)))
        path = (given or {}).get(role) or next(there, None)
        found = None if path is None else lookup(value, path)
        said = [one["content"] or "" for one in prompt if one["role"] == "system"] if role == "system" else texts
        if path is None or is_empty(found) or (role != "input" and _is_told(found, said)):
            continue
        if role == "input" and is_whole and isinstance(found, str) and any(found.strip() in text for text in texts):
            is_used.add(top_field(path))
            continue
        is_used.add(top_field(path))
        prompt = _PUT[role](prompt, found, path)
    texts = [one["content"] or "" for one in prompt]
    for name in sorted(name for name in value.keys() - is_used if _is_seen(name) or name in CONVERSATIONS):
        is_told = _are_told if name in CONVERSATIONS else _is_told
        if _says(value[name]) and not is_told(value[name], texts):
            raise _unread(name)
    for name in PROMPTS:
        other = value.get(name)
        if name not in is_used and isinstance(other, str) and not is_empty(other) and not _overlaps(other, texts):
            raise _unread(name)
    if not any(has_text(message) for message in prompt):
        raise RowError("empty_prompt", "prompt: no text")
    return prompt


def _unread(name: str) -> RowError:
    return RowError(
        "unread_field",
        f"{name}: it changes what the model sees, and nothing reads it; name it in sources[].map, or in "
        "sources[].options.ignore to leave it out",
    )


@lru_cache(maxsize=4096)
def _is_seen(field: str) -> bool:
    """Whether a word of a field's name is something that the model saw or said: `images_chosen`, `systemPrompt`."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", field).lower())
    return field not in NOT_SEEN and (field in SEEN or not SEEN_WORDS.isdisjoint(words))


def _says(value: object) -> bool:
    """Whether a field holds text or objects; numbers and truth values count and mark, and say nothing."""
    return isinstance(value, str | list | Mapping | bytes) and not is_empty(value)


def _overlaps(text: str, texts: Iterable[str]) -> bool:
    """Whether a text stands in one of others, or one of them in it."""
    return any(text.strip() in one or (one.strip() and one.strip() in text) for one in texts)


def _is_told(found: object, texts: Iterable[str]) -> bool:
    """Whether a message says what a field says: it is the same text, or holds it and it is too long to be chance."""
    if not isinstance(found, str):
        return False
    told = found.strip()
    return any(told == text.strip() or (len(told) >= LONG_TEXT and told in text) for text in texts)


def _are_told(found: object, texts: Iterable[str]) -> bool:
    """Whether a conversation beside the prompt says nothing new: all of it but an answer at its end is told."""
    if isinstance(found, list) and all(isinstance(one, Mapping) and "input" in one for one in found):
        both = (("user", "input"), ("assistant", "output"))  # distilabel: question and answer in one object
        found = [{"role": role, "content": one.get(key) or ""} for one in found for role, key in both]
    try:
        turns = messages_of(found, "", role="user")
    except RowError:
        return False
    before = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    return all(_is_told(one["content"] or "", texts) for one in before)


def _put_input(prompt: Messages, found: object, path: str) -> Messages:
    if not isinstance(found, str) or len(prompt) != 1 or prompt[0]["role"] != "user":
        raise RowError("unread_field", f"{path}: text that follows an instruction can only be put behind a text")
    return [{**prompt[0], "content": f"{prompt[0]['content']}\n\n{found}"}]


def _put_history(prompt: Messages, found: object, path: str) -> Messages:
    if isinstance(found, list) and all(isinstance(one, list) and len(one) == 2 for one in found):
        roles = ("user", "assistant")
        found = [{"role": role, "content": text} for one in found for role, text in zip(roles, one) if text]
    if isinstance(found, str) and held_messages(found) is None:
        raise RowError("unread_field", f"{path}: got a text; valid: pairs of user and assistant, or messages")
    turns = messages_of(found, path, role="user")
    return prompt if _same(prompt[: len(turns)], turns) else [*turns, *prompt]


def _put_system(prompt: Messages, found: object, path: str) -> Messages:
    found = text_of(found, path)
    if any(one["role"] == "system" for one in prompt):
        raise RowError("unread_field", f"{path}: the conversation has another system message")
    return [{"role": "system", "content": found}, *prompt]


def _put_tools(prompt: Messages, found: object, path: str) -> Messages:
    """Tools travel with the first message; the template gets them as its `tools`."""
    try:
        tools = json.loads(found) if isinstance(found, str) else found
    except ValueError:
        tools = None
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(one, Mapping) for one in tools):
        raise wrong_type(path, found, "a list of tools, or its JSON text")
    if prompt and "tools" in prompt[0] and prompt[0]["tools"] != tools:
        raise RowError("unread_field", f"{path}: the first message has other tools")
    return [{**prompt[0], "tools": tools}, *prompt[1:]] if tools and prompt else prompt


_PUT = {"input": _put_input, "history": _put_history, "system": _put_system, "tools": _put_tools}


# ----------------------------------------------------------------------------------------------------- K responses


def _several(value: Mapping[str, Any], fields: FieldMap, options: FormatOptions) -> Example:
    """The example of a row with several responses and what labels them."""
    assert fields.responses is not None, "the caller has looked"
    found = _each(value, fields.responses)
    if len(found) < 2:
        raise RowError("too_few_completions", f"{_named(fields.responses)}: got {len(found)}; at least 2 are needed")
    names = [f"{_named(fields.responses)}[{k}]" for k in range(len(found))]
    many = [messages_of(_there(one, name), name, role="assistant") for one, name in zip(found, names)]
    own = _prompt(value, fields, many)
    prompt, answers = split(own, many, names)
    prompt = _around(value, fields, prompt, options, own)
    ratings: list[dict[str, float]] = [{} for _ in answers]
    for name, path in {**_label_ratings(fields), **fields.ratings}.items():
        for one, got in zip(ratings, _each(value, path, len(answers))):
            _put(one, name, got)
    kept, index = distinct([Completion(*one) for one in zip(answers, ratings)])
    if fields.preference is not None:
        verdicts = fields.preference if isinstance(fields.preference, list) else [fields.preference]
        if options.aspect is not None:
            verdicts = [one for one in verdicts if one.aspect in (None, options.aspect)]
        if len(verdicts) > 1:  # a row may answer one question and not the other
            verdicts = [one for one in verdicts if lookup(value, one.field) is not None] or verdicts[:1]
        told = [_verdict(value, one, index) for one in verdicts]
        preferences = [one for one in told if one is not None]
        return Example(prompt, kept, preferences, ties=len(told) - len(preferences))
    if fields.scores is None and fields.ranks is None:
        return Example(prompt, kept, *by_aspects(prompt, kept, tuple(fields.ratings), options))
    return Example(prompt, kept, *_by_rating(kept, fields, options))


def _label_ratings(fields: FieldMap) -> dict[str, Any]:
    found = {"score": fields.scores, "rank": fields.ranks}
    return {name: path for name, path in found.items() if path is not None}


def _by_rating(kept: list[Completion], fields: FieldMap, options: FormatOptions) -> tuple[list[Preference], int]:
    name, sign = ("score", 1.0) if fields.scores is not None else ("rank", -1.0)
    rated = {k: sign * one.ratings[name] for k, one in enumerate(kept) if name in one.ratings}
    if options.pairs == "all":
        margin: Margin = lambda a, b: difference(rated[a], rated[b]) if a in rated and b in rated else None  # noqa: E731
        return mine(len(kept), None, margin)
    if len(rated) < 2:
        return [], 0
    best, worst = max(rated, key=rated.__getitem__), min(rated, key=rated.__getitem__)
    if rated[best] == rated[worst]:
        return [], 1
    return [Preference(best, worst, None, difference(rated[best], rated[worst]))], 0


def _verdict(value: Mapping[str, Any], one: Verdict, index: list[int]) -> Preference | None:
    """The preference that a field tells; None of a tie."""
    if len(index) != 2:
        raise RowError("wrong_type", f"{one.field}: got {len(index)} responses; a preference is between two")
    found = _required(value, one.field)
    if one.sign is not None:
        parsed = parsed_number(found)
        if _is_among(found, one.tie):
            return None
        if parsed is None:
            raise wrong_type(one.field, found, "a number")
        if one.range is not None and not one.range[0] <= parsed <= one.range[1]:
            raise RowError("wrong_type", f"{one.field}: got {found}; valid: {one.range[0]:g} to {one.range[1]:g}")
        strength = parsed - one.zero
        winner = int((strength > 0) == (one.sign == "second"))
        return None if strength == 0 else Preference(index[winner], index[1 - winner], one.aspect, abs(strength))
    for winner, values in enumerate((one.first, one.second)):
        if _is_among(found, values):
            return Preference(index[winner], index[1 - winner], one.aspect, None)
    if _is_among(found, one.tie):
        return None
    valid = ", ".join(repr(each) for each in (*one.first, *one.second, *one.tie))
    raise RowError("wrong_type", f"{one.field}: got {found!r}; valid: {valid}")


def _is_among(found: object, values: Iterable[Any]) -> bool:
    """Whether a value, or the number that it is the text of, is one of some; true and false are not 1 and 0."""
    for one in values:
        if isinstance(one, bool) or isinstance(found, bool):
            if found is one or (isinstance(found, str) and found.strip().lower() == str(one).lower()):
                return True
        elif isinstance(one, str):
            if isinstance(found, str) and found.strip().lower() == one.lower():
                return True
        elif parsed_number(found) == float(one):
            return True
    return False


# -------------------------------------------------------------------------------------------------- fields and numbers


def paths(fields: FieldMap) -> list[str]:
    """Every path of a map."""
    found: list[str] = []
    for name in ("prompt", *AROUND, "chosen", "rejected", "responses", "scores", "ranks", "aspect"):
        one = getattr(fields, name)
        found += one if isinstance(one, list) else [] if one is None else [one]
    for one in fields.ratings.values():
        found += one if isinstance(one, list) else [one]
    verdicts = fields.preference if isinstance(fields.preference, list) else [fields.preference]
    return found + [one.field for one in verdicts if one is not None]


def _required(value: Mapping[str, Any], path: str) -> Any:
    """What lies at a path.

    Raises:
        RowError: Nothing does.
    """
    found = lookup(value, path)
    if found is None:
        raise missing(value, path)
    return found


def _there(found: Any, name: str) -> Any:
    if found is None:
        raise RowError("missing_field", f"{name}: absent or null")
    return found


def _each(value: Mapping[str, Any], path: str | list[str], count: int | None = None) -> list[Any]:
    """One value per response.

    Raises:
        RowError: Not a list, or of another length than there are responses.
    """
    if isinstance(path, list):
        found: Any = [lookup(value, one) for one in path]
    else:
        found = _required(value, path)
    if not isinstance(found, list):
        raise wrong_type(_named(path), found, "a list")
    if count is not None and len(found) != count:
        raise RowError("wrong_type", f"{_named(path)}: got {len(found)} for {count} responses")
    return found


def _named(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _put(ratings: dict[str, float], name: str, found: object) -> None:
    """Add a number; a text that is none, such as "N/A", is absent.

    Raises:
        RowError: NaN or infinite, or neither number nor text.
    """
    if isinstance(found, float | int) and not isinstance(found, bool):
        ratings.setdefault(name, number(found, name))
    elif (parsed := parsed_number(found)) is not None:
        ratings.setdefault(name, parsed)
    elif not isinstance(found, str | None):
        raise wrong_type(name, found, "a number")


def _aspect(value: Mapping[str, Any], path: str) -> str | None:
    found = lookup(value, path)
    if found is not None and not isinstance(found, str):
        raise wrong_type(path, found, "a string")
    return found or None


def pair_ratings(value: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers that a row holds for both sides: `<x>_chosen`, `chosen_<x>` and `chosen-<x>`, by `<x>`.

    Text that is a number is one; what is none, such as "N/A" or the name of a model, is no rating.

    Raises:
        RowError: A number is NaN or infinite.
    """
    both: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for key, found in value.items():
        named = _rating_name(key)
        if (
            named is not None
            and named[1] not in NO_RATING
            and isinstance(found, str | int | float | Decimal)
            and not isinstance(found, bool)
        ):
            _put(both[named[0]], named[1], found)
    return both


def _rating_name(key: str) -> tuple[int, str] | None:
    """Side (0 chosen, 1 rejected) and name of a rating's field; None of every other field."""
    for side, word in enumerate(("chosen", "rejected")):
        for mark in ("_", "-"):
            if key.endswith(f"{mark}{word}") and len(key) > len(word) + 1:
                return side, key[: -len(word) - 1]
            if key.startswith(f"{word}{mark}") and len(key) > len(word) + 1:
                return side, key[len(word) + 1 :]
    return None


def mapped(
    name: str,
    fields: FieldMap,
    matches: Callable[[Mapping[str, Any]], bool] | None = None,
    needs: tuple[str, ...] = (),
) -> Format:
    """A format that a map says all about.

    Args:
        name: What configurations call it.
        fields: Which field is what.
        matches: Which rows look like it; None: those in which all of `needs` are there.
        needs: Fields without which a row is none of it; default, every path of the map.
    """
    needed = needs or tuple(dict.fromkeys(paths(fields)))

    def has_all(value: Mapping[str, Any]) -> bool:
        return all(lookup(value, path) is not None for path in needed)

    return Format(name, partial(read, fields=fields), matches or has_all, needed)
