"""One row as each published set has it, self-written: its format, the row, the prompt, and the size of the label."""

from __future__ import annotations

import json
from typing import Any

GOOD, BAD = "Ice floats because it is less dense.", "No idea."
ASK = "Why does ice float?"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def turns(*texts: str) -> list[dict[str, str]]:
    return [(user, assistant)[place % 2](text) for place, text in enumerate(texts)]


PLAIN = [user(ASK)]
ROWS: dict[str, tuple[str, dict[str, Any], list[dict[str, str]], float | None]] = {
    "HelpSteer2, preference": (
        "helpsteer2_preference",
        {"prompt": ASK, "response_1": GOOD, "response_2": BAD, "preference_strength": -2, "split": "train"},
        PLAIN,
        2.0,
    ),
    "HelpSteer3": (
        "helpsteer3",
        {
            "domain": "general",
            "language": "english",
            "context": turns("Hi", "Hello.", ASK),
            "response1": BAD,
            "response2": GOOD,
            "overall_preference": 3,
            "individual_preference": [{"score": 3, "reasoning": "r", "feedback1": "f", "feedback2": "f"}],
        },
        turns("Hi", "Hello.", ASK),
        3.0,
    ),
    "Nectar": (
        "nectar",
        {
            "prompt": f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {ASK}\n\nAssistant: ",
            "answers": [{"answer": BAD, "model": "m", "rank": 2.0}, {"answer": GOOD, "model": "n", "rank": 1.0}],
            "turns": 2,
            "num_responses": 2,
        },
        turns("Hi", "Hello.", ASK),
        1.0,
    ),
    "SHP": (
        "shp",
        {
            "post_id": "x",
            "history": ASK,
            "human_ref_A": BAD,
            "human_ref_B": GOOD,
            "labels": 0,
            "score_A": 3,
            "score_B": 12,
            "score_ratio": 4.0,
        },
        PLAIN,
        None,
    ),
    "Orca": (
        "orca",
        {"system": "Be short.", "question": ASK, "chosen": GOOD, "rejected": BAD},
        [{"role": "system", "content": "Be short."}, user(ASK)],
        None,
    ),
    "Orca, distilabel": (
        "distilabel",
        {"system": "", "input": ASK, "chosen": GOOD, "rejected": BAD, "generations": [GOOD, BAD], "rating": [9.0, 2.0]},
        PLAIN,
        None,
    ),
    "Capybara": (
        "messages_implicit",
        {
            "source": "s",
            "conversation": [{"input": ASK, "output": GOOD}],
            "chosen": turns("Hi", "Hello.", ASK, GOOD),
            "rejected": turns("Hi", "Hello.", ASK, BAD),
            "rating_chosen": 5,
            "rating_rejected": 2,
            "chosen_model": "a",
        },
        turns("Hi", "Hello.", ASK),
        None,
    ),
    "UltraFeedback, binarized": (
        "messages_implicit",
        {
            "prompt": ASK,
            "prompt_id": "0",
            "chosen": turns(ASK, GOOD),
            "rejected": turns(ASK, BAD),
            "messages": turns(ASK, GOOD),
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        PLAIN,
        5.5,
    ),
    "UltraFeedback, cleaned": (
        "messages_implicit",
        {
            "source": "s",
            "prompt": ASK,
            "chosen": turns(ASK, GOOD),
            "chosen-rating": 4.75,
            "chosen-model": "a",
            "rejected": turns(ASK, BAD),
            "rejected-rating": 2.5,
            "rejected-model": "b",
        },
        PLAIN,
        None,
    ),
    "UltraFeedback, argilla": (
        "argilla",
        {
            "instruction": ASK,
            "chosen_response": GOOD,
            "rejected_response": BAD,
            "chosen_avg_rating": 4.5,
            "rejected_avg_rating": 2.0,
            "chosen_model": "m",
        },
        PLAIN,
        None,
    ),
    "Arena": (
        "arena",
        {
            "question_id": "q",
            "model_a": "x",
            "model_b": "y",
            "winner": "model_b",
            "conversation_a": turns("Hi", "Hello.", ASK, BAD),
            "conversation_b": turns("Hi", "Hello.", ASK, GOOD),
            "turn": 2,
        },
        turns("Hi", "Hello.", ASK),
        None,
    ),
    "WebGPT": (
        "webgpt",
        {
            "question": {"dataset": "eli5", "id": "1", "full_text": ASK},
            "quotes_0": {"title": [], "extract": []},
            "answer_0": BAD,
            "score_0": -0.5,
            "answer_1": GOOD,
            "score_1": 0.5,
        },
        PLAIN,
        1.0,
    ),
    "summarize from feedback": (
        "summarize_feedback",
        {
            "info": {"id": "1", "post": "It rained.", "title": "Rain", "subreddit": "weather", "site": None},
            "summaries": [{"text": f" {BAD}", "policy": "p", "note": None}, {"text": f" {GOOD}", "policy": "q"}],
            "choice": 1,
            "worker": "w",
        },
        [user("SUBREDDIT: r/weather\n\nTITLE: Rain\n\nPOST: It rained.\n\nTL;DR:")],
        None,
    ),
    "OpenAssistant": (
        "openassistant",
        {
            "message_tree_id": "t",
            "prompt": {
                "text": ASK,
                "role": "prompter",
                "replies": [
                    {"text": BAD, "role": "assistant", "rank": 1, "replies": []},
                    {"text": GOOD, "role": "assistant", "rank": 0, "replies": []},
                ],
            },
        },
        PLAIN,
        1.0,
    ),
    "RLHFlow": (
        "scored",
        {"idx": 1, "prompt": ASK, "responses": [BAD, GOOD], "rewards": [-1.5, 2.0]},
        PLAIN,
        3.5,
    ),
    "distilabel, several generations": (
        "scored",
        {"instruction": ASK, "generations": [BAD, GOOD], "ratings": [2, 5], "rationales": ["r", "s"]},
        PLAIN,
        3.0,
    ),
    "PKU-SafeRLHF, one dimension": (
        "pku_saferlhf",
        {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "prompt_source": "s"},
        PLAIN,
        None,
    ),
    "WebGPT, question as text": (
        "webgpt",
        {"question": ASK, "answer_0": BAD, "answer_1": GOOD, "score_0": -0.25, "score_1": 0.25, "dataset": "d"},
        PLAIN,
        0.5,
    ),
    "UltraInteract": (
        "ultrainteract",
        {
            "task": "Math",
            "trajectory": [
                {"from": "user", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
                {"from": "user", "value": ASK},
            ],
            "chosen": GOOD,
            "rejected": BAD,
            "parent_id": "0",
        },
        turns("Hi", "Hello.", ASK),
        None,
    ),
    "OffsetBias": (
        "offsetbias",
        {"instruction": ASK, "output_1": BAD, "output_2": GOOD, "label": 2, "model_1": "a", "model_2": "b"},
        PLAIN,
        None,
    ),
    "RewardBench 2": (
        "sorted",
        {"id": "0", "prompt": ASK, "chosen": [GOOD], "rejected": [BAD, "None."], "num_correct": 1, "subset": "Math"},
        PLAIN,
        None,
    ),
    "Arena, 55k": (
        "arena_turns",
        {
            "id": 1,
            "model_a": "a",
            "model_b": "b",
            "prompt": json.dumps(["Hi", ASK]),
            "response_a": json.dumps(["Hello.", BAD]),
            "response_b": json.dumps(["Hello.", GOOD]),
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        turns("Hi", "Hello.", ASK),
        None,
    ),
    "JudgeBench": (
        "judgebench",
        {"pair_id": "x", "question": ASK, "response_A": BAD, "response_B": GOOD, "label": "B>A", "source": "s"},
        PLAIN,
        None,
    ),
    "Tulu": (
        "messages_implicit",
        {
            "id": "1",
            "prompt": ASK,
            "chosen": turns(ASK, GOOD),
            "rejected": turns(ASK, BAD),
            "chosen_model": "a",
            "chosen_rating": 4.5,
            "rejected_rating": 1.5,
            "rejected_model": "b",
            "source": "s",
        },
        PLAIN,
        None,
    ),
    "Skywork": (
        "messages_implicit",
        {"chosen": turns(ASK, GOOD), "rejected": turns(ASK, BAD), "source": "magpie"},
        PLAIN,
        None,
    ),
    "ShareGPT pairs": (
        "sharegpt",
        {
            "conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        [{"role": "system", "content": "Be short."}, user(ASK)],
        None,
    ),
    "OpenAI": (
        "openai",
        {
            "input": {"messages": PLAIN, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant(GOOD)],
            "non_preferred_output": [assistant(BAD)],
        },
        PLAIN,
        None,
    ),
    "axolotl, conversation": (
        "conversation",
        {"conversation": [{"from": "human", "value": ASK}], "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        PLAIN,
        None,
    ),
    "axolotl": (
        "axolotl",
        {"messages": PLAIN, "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        PLAIN,
        None,
    ),
    "Alpaca": (
        "alpaca",
        {"instruction": "Answer.", "input": ASK, "history": [["Hi", "Hello."]], "chosen": GOOD, "rejected": BAD},
        [user("Hi"), assistant("Hello."), user(f"Answer.\n\n{ASK}")],
        None,
    ),
    "Alpaca, two outputs": (
        "alpaca_outputs",
        {"instruction": ASK, "input": "", "output": [GOOD, BAD]},
        PLAIN,
        None,
    ),
    "AlpacaEval": (
        "alpaca_eval",
        {
            "instruction": ASK,
            "output_1": BAD,
            "output_2": GOOD,
            "preference": 1.9,
            "annotator": "a",
            "generator_1": "m",
        },
        PLAIN,
        0.4,
    ),
    "Stack Exchange": (
        "stack_exchange",
        {"qid": 1, "question": ASK, "response_j": GOOD, "response_k": BAD, "date": "d"},
        PLAIN,
        None,
    ),
    "HH-RLHF": (
        "transcript",
        {
            "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}",
        },
        PLAIN,
        None,
    ),
    "messages as JSON text": (
        "messages_implicit",
        {"chosen": json.dumps(turns(ASK, GOOD)), "rejected": json.dumps(turns(ASK, BAD))},
        PLAIN,
        None,
    ),
    "the assistant speaks first": (
        "messages_explicit",
        {
            "prompt": ASK,
            **{
                side: [assistant("Hi!"), user(ASK), assistant(text)]
                for side, text in (("chosen", GOOD), ("rejected", BAD))
            },
        },
        [assistant("Hi!"), user(ASK)],
        None,
    ),
}
