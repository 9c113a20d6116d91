"""A row → an `Example`, by a map that says which field is what: the ground on which the formats stand.

    prompt, system, history, input, tools ─▶ prompt            chosen, rejected ─▶ two completions, one preference
                                                               responses + scores | ranks | preference ─▶ K and theirs

Fields that every map reads where a row has them: `system`, `history`, `input` and `tools` beside the prompt, ratings
under the names the field uses. A field that changes what the model saw, and that nothing reads, refuses the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prefsel.config import FieldMap, FormatOptions
from prefsel.ingest.aspects import by_aspects
from prefsel.ingest.example import Completion, Example, Format, Preference, difference, distinct
from prefsel.ingest.fields import lookup, required, top_field
from prefsel.ingest.messages import Messages, messages_of, transcript_of
from prefsel.ingest.prompt import own_prompt, split
from prefsel.ingest.ratings import pair_ratings, put
from prefsel.ingest.row_error import RowError, wrong_type
from prefsel.ingest.surroundings import AROUND, refuse_siblings, with_surroundings
from prefsel.ingest.verdicts import by_rating, verdict_of


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
    own = own_prompt(value, fields, both)
    prompt, (chosen, rejected) = split(own, both, ("chosen", "rejected"))
    prompt = _around(value, fields, prompt, options, own)
    first, second = pair_ratings(value)
    for name, path in fields.ratings.items():
        for ratings, found in zip((first, second), _each(value, path, 2)):
            put(ratings, name, found)
    margin = difference(first["score"], second["score"]) if "score" in first and "score" in second else None
    preference = Preference(0, 1, _aspect(value, fields.aspect or "aspect"), margin)
    return Example(prompt, [Completion(chosen, first), Completion(rejected, second)], [preference])


def sides(value: Mapping[str, Any], paths: tuple[str, str]) -> tuple[Messages, Messages]:
    """The two sides of a labelled pair as messages, a text being the assistant's.

    A text that is the JSON of a message list is that list, where the other side is one too: an answer may be JSON.
    """
    found = [required(value, path) for path in paths]
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


_LIKE_MESSAGES = re.compile(r"""\s*"?(array\()?\[\s*\{\s*\\?['"](role|content|from|value)\\?['"]""")
_BEGINS_A_TURN = re.compile(r"\s*(Human|Assistant):")


def _said(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def _around(
    value: Mapping[str, Any], fields: FieldMap, prompt: Messages, options: FormatOptions, own: Messages
) -> Messages:
    """As `with_surroundings`; `own` is what the row calls its prompt."""
    given = {role: path for role in AROUND if (path := getattr(fields, role)) is not None}
    refuse_siblings(value, paths(fields), options)
    used = {top_field(one) for one in paths(fields)}
    return with_surroundings(value, prompt, options, used=used, given=given, is_whole=not own or len(prompt) > len(own))


def _several(value: Mapping[str, Any], fields: FieldMap, options: FormatOptions) -> Example:
    """The example of a row with several responses and what labels them."""
    assert fields.responses is not None, "the caller has looked"
    found = _each(value, fields.responses)
    if len(found) < 2:
        raise RowError("too_few_completions", f"{_named(fields.responses)}: got {len(found)}; at least 2 are needed")
    names = [f"{_named(fields.responses)}[{k}]" for k in range(len(found))]
    many = [messages_of(_there(one, name), name, role="assistant") for one, name in zip(found, names)]
    own = own_prompt(value, fields, many)
    prompt, answers = split(own, many, names)
    prompt = _around(value, fields, prompt, options, own)
    ratings: list[dict[str, float]] = [{} for _ in answers]
    for name, path in {**_label_ratings(fields), **fields.ratings}.items():
        for one, got in zip(ratings, _each(value, path, len(answers))):
            put(one, name, got)
    kept, index = distinct([Completion(*one) for one in zip(answers, ratings)])
    if fields.preference is not None:
        verdicts = fields.preference if isinstance(fields.preference, list) else [fields.preference]
        if options.aspect is not None:
            verdicts = [one for one in verdicts if one.aspect in (None, options.aspect)]
        if len(verdicts) > 1:  # a row may answer one question and not the other
            verdicts = [one for one in verdicts if lookup(value, one.field) is not None] or verdicts[:1]
        told = [verdict_of(value, one, index) for one in verdicts]
        preferences = [one for one in told if one is not None]
        return Example(prompt, kept, preferences, ties=len(told) - len(preferences))
    if fields.scores is None and fields.ranks is None:
        return Example(prompt, kept, *by_aspects(prompt, kept, tuple(fields.ratings), options))
    return Example(prompt, kept, *by_rating(kept, fields, options))


def _label_ratings(fields: FieldMap) -> dict[str, Any]:
    found = {"score": fields.scores, "rank": fields.ranks}
    return {name: path for name, path in found.items() if path is not None}


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
        found = required(value, path)
    if not isinstance(found, list):
        raise wrong_type(_named(path), found, "a list")
    if count is not None and len(found) != count:
        raise RowError("wrong_type", f"{_named(path)}: got {len(found)} for {count} responses")
    return found


def _named(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _aspect(value: Mapping[str, Any], path: str) -> str | None:
    found = lookup(value, path)
    if found is not None and not isinstance(found, str):
        raise wrong_type(path, found, "a string")
    return found or None


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
