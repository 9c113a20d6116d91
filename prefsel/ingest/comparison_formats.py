"""Formats of rows that hold several responses and say which is better: a winner, a signed strength, ranks, scores."""

from __future__ import annotations

from prefsel.config import FieldMap, Verdict
from prefsel.ingest.mapping import mapped

_ARENA = Verdict(field="winner", first=["model_a"], second=["model_b"], tie=["tie", "tie (bothbad)", "both_bad"])
_BETTER = Verdict(field="better_response_id", first=[0], second=[1], aspect="better")
_SAFER = Verdict(field="safer_response_id", first=[0], second=[1], aspect="safer")

FORMATS = (
    # berkeley-nest/Nectar
    mapped("nectar", FieldMap(prompt="prompt", responses="answers[].answer", ranks="answers[].rank")),
    # nvidia/HelpSteer2, preference
    mapped(
        "helpsteer2_preference",
        FieldMap(
            prompt="prompt",
            responses=["response_1", "response_2"],
            preference=Verdict(field="preference_strength", sign="second"),
        ),
    ),
    # nvidia/HelpSteer3, preference
    mapped(
        "helpsteer3",
        FieldMap(
            prompt="context",
            responses=["response1", "response2"],
            preference=Verdict(field="overall_preference", sign="second"),
        ),
    ),
    # stanfordnlp/SHP
    mapped(
        "shp",
        FieldMap(
            prompt="history",
            responses=["human_ref_A", "human_ref_B"],
            preference=Verdict(field="labels", first=[1], second=[0]),
            ratings={"score": ["score_A", "score_B"]},
        ),
        needs=("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    # PKU-Alignment/PKU-SafeRLHF: two labels for two questions
    mapped(
        "pku_saferlhf",
        FieldMap(prompt="prompt", responses=["response_0", "response_1"], preference=[_BETTER, _SAFER]),
    ),
    # lmsys/chatbot_arena_conversations
    mapped("arena", FieldMap(responses=["conversation_a", "conversation_b"], preference=_ARENA)),
    # openai/webgpt_comparisons
    mapped(
        "webgpt",
        FieldMap(prompt="question.full_text", responses=["answer_0", "answer_1"], scores=["score_0", "score_1"]),
    ),
    # tatsu-lab/alpaca_eval: annotations of two outputs, 1 to 2
    mapped(
        "alpaca_eval",
        FieldMap(
            prompt="instruction",
            responses=["output_1", "output_2"],
            preference=Verdict(field="preference", sign="second", zero=1.5),
        ),
    ),
)
"""In the order in which they are tried."""
