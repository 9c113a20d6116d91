"""Formats of rows that hold several responses and say which is better: a winner, a signed strength, ranks, scores."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefsel.config import FieldMap, FormatOptions, Verdict
from prefsel.ingest.example import Example, Format
from prefsel.ingest.fields import parsed_number
from prefsel.ingest.mapping import mapped, read
from prefsel.ingest.row_error import RowError, wrong_type

_TIES: list[Any] = ["tie", "tie (bothbad)", "bothbad", "both_bad", "both bad", "both_good", "both good"]
_ARENA = Verdict(field="winner", first=["model_a"], second=["model_b"], tie=_TIES)
_BETTER = Verdict(field="better_response_id", first=[0], second=[1], aspect="better")
_SAFER = Verdict(field="safer_response_id", first=[0], second=[1], aspect="safer")

_BATTLE = ("conversation_a", "conversation_b", "winner")
_BATTLES = FieldMap(responses=["conversation_a", "conversation_b"], preference=_ARENA)
_SAID = ("response_a", "response_b")
_WON = ("winner_model_a", "winner_model_b", "winner_tie")


def _adapt_arena(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """Two conversations and a winner; a judgment of an earlier `turn` (MT-bench) is of what was said until then."""
    turn = value.get("turn")
    if isinstance(turn, int) and not isinstance(turn, bool):
        cut = {name: _until(value[name], turn) for name in _BATTLE[:2] if isinstance(value.get(name), list)}
        value = _with(value, cut)
    return read(value, options, fields=_BATTLES)


def _with(value: Mapping[str, Any], fields: Mapping[str, Any], *, without: Sequence[str] = ()) -> Mapping[str, Any]:
    """A row with other fields; who watches what is asked of the row (`field_use`) watches the copy, too."""
    found = copy.copy(value)
    assert isinstance(found, dict), "rows are dictionaries"
    found.update(fields)
    for name in without:
        found.pop(name, None)
    return found


def _until(conversation: list[Any], turn: int) -> list[Any]:
    """A conversation up to the answer of its turn, counted from 1."""
    starts = [
        number for number, one in enumerate(conversation) if isinstance(one, Mapping) and one.get("role") == "user"
    ]
    return conversation[: starts[turn]] if 0 < turn < len(starts) else conversation


def _adapt_arena_turns(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """`prompt`, `response_a` and `response_b` as lists of texts, one per turn, or as their JSON; the winner as three
    fields of 1 and 0 (lmsys, arena of 55k)."""
    prompts = _turns(value.get("prompt"), "prompt")
    battle: dict[str, Any] = {}
    for said, name in zip(_SAID, _BATTLE):
        answers = _turns(value.get(said), said)
        if len(answers) != len(prompts):
            raise RowError("wrong_type", f"{said}: got {len(answers)} turns; the prompt has {len(prompts)}")
        turns = zip(("user", "assistant") * len(prompts), (text for both in zip(prompts, answers) for text in both))
        battle[name] = [{"role": role, "content": text} for role, text in turns]
    won = [field for field in _WON if parsed_number(value.get(field)) == 1]
    if len(won) != 1:
        raise RowError("wrong_type", f"{', '.join(_WON)}: {len(won)} of them are 1; valid: one")
    battle["winner"] = won[0].removeprefix("winner_")
    return read(_with(value, battle, without=("prompt", *_SAID, *_WON)), options, fields=_BATTLES)


def _turns(found: Any, name: str) -> list[Any]:
    """The turns of one speaker: a list, its JSON text, or one text.

    Raises:
        RowError: It is neither text nor list, or there is none.
    """
    try:
        held = json.loads(found) if isinstance(found, str) and found.lstrip().startswith("[") else found
    except ValueError:
        held = found
    turns = [held] if isinstance(held, str) else held
    if not isinstance(turns, list) or not turns:
        raise wrong_type(name, found, "texts, one per turn")
    return turns


def _is_arena_turns(value: Mapping[str, Any]) -> bool:
    return all(value.get(name) is not None for name in ("prompt", *_SAID, *_WON[:2]))


_ANSWERED = ("answer_0", "answer_1", "score_0", "score_1")
_WEBGPT = FieldMap(prompt="question", responses=[*_ANSWERED[:2]], scores=[*_ANSWERED[2:]])


def _adapt_webgpt(value: Mapping[str, Any], options: FormatOptions) -> Example:
    """Two answers with a score each; the question is a text, or an object with its `full_text`."""
    is_text = isinstance(value.get("question"), str)
    return read(
        value, options, fields=_WEBGPT if is_text else _WEBGPT.model_copy(update={"prompt": "question.full_text"})
    )


def _is_webgpt(value: Mapping[str, Any]) -> bool:
    return all(value.get(name) is not None for name in ("question", *_ANSWERED))


def _is_pku(value: Mapping[str, Any]) -> bool:
    has_texts = all(value.get(name) is not None for name in ("prompt", "response_0", "response_1"))
    return has_texts and any(value.get(one.field) is not None for one in (_BETTER, _SAFER))


def _is_arena(value: Mapping[str, Any]) -> bool:
    return all(value.get(name) is not None for name in _BATTLE)


FORMATS = (
    # berkeley-nest/Nectar
    mapped("nectar", FieldMap(prompt="prompt", responses="answers[].answer", ranks="answers[].rank")),
    # nvidia/HelpSteer2, preference
    mapped(
        "helpsteer2_preference",
        FieldMap(
            prompt="prompt",
            responses=["response_1", "response_2"],
            preference=Verdict(field="preference_strength", sign="second", range=(-3, 3)),
        ),
    ),
    # nvidia/HelpSteer3, preference
    mapped(
        "helpsteer3",
        FieldMap(
            prompt="context",
            responses=["response1", "response2"],
            preference=Verdict(field="overall_preference", sign="second", range=(-3, 3)),
        ),
    ),
    # stanfordnlp/SHP
    mapped(
        "shp",
        FieldMap(
            prompt="history",
            responses=["human_ref_A", "human_ref_B"],
            preference=Verdict(field="labels", first=[1, True], second=[0, False]),
            ratings={"score": ["score_A", "score_B"]},
        ),
        needs=("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    # PKU-Alignment/PKU-SafeRLHF: two labels for two questions, or one of them
    mapped(
        "pku_saferlhf",
        FieldMap(prompt="prompt", responses=["response_0", "response_1"], preference=[_BETTER, _SAFER]),
        _is_pku,
        ("prompt", "response_0", "response_1", "better_response_id"),
    ),
    # lmsys/chatbot_arena_conversations
    Format("arena", _adapt_arena, _is_arena, _BATTLE),
    # lmarena-ai/arena-human-preference-55k
    Format("arena_turns", _adapt_arena_turns, _is_arena_turns, ("prompt", *_SAID, *_WON)),
    # ScalerLab/JudgeBench
    mapped(
        "judgebench",
        FieldMap(
            prompt="question",
            responses=["response_A", "response_B"],
            preference=Verdict(field="label", first=["A>B"], second=["B>A"], tie=["A=B"]),
        ),
    ),
    # openai/webgpt_comparisons, also with the question as a text
    Format("webgpt", _adapt_webgpt, _is_webgpt, ("question", *_ANSWERED)),
    # NCSOFT/offsetbias
    mapped(
        "offsetbias",
        FieldMap(
            prompt="instruction",
            responses=["output_1", "output_2"],
            preference=Verdict(field="label", first=[1], second=[2]),
        ),
    ),
    # tatsu-lab/alpaca_eval: annotations of two outputs, 1 to 2
    mapped(
        "alpaca_eval",
        FieldMap(
            prompt="instruction",
            responses=["output_1", "output_2"],
            preference=Verdict(field="preference", sign="second", zero=1.5, tie=[0], range=(1, 2)),
        ),
    ),
)
"""In the order in which they are tried."""
