"""One row as each published set has it: format, prompt, texts, direction and size of the label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import ASK, BAD, GOOD, PLAIN, ROWS, assistant, turns, user

from prefsel.config import FieldMap, FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.example import Example
from prefsel.ingest.field_use import FieldUse
from prefsel.ingest.formats import FORMATS, detect
from prefsel.ingest.readers import read_rows
from prefsel.ingest.row_error import RowError
from prefsel.ingest.rows import RawRow
from prefsel.ingest.windows import Window, ingest_windows


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_is_read_as_it_is_meant(name: str) -> None:
    format_name, row, prompt, margin = ROWS[name]
    assert detect(row) == format_name
    found = FORMATS[format_name](row, FormatOptions())
    (example,) = [found] if isinstance(found, Example) else found
    (preference,) = example.preferences
    assert example.prompt == prompt
    assert [one["content"].strip() for one in example.completions[preference.chosen].messages] == [GOOD]
    assert [one["content"].strip() for one in example.completions[preference.rejected].messages] == [BAD]
    assert preference.margin == (None if margin is None else pytest.approx(margin))


def refused(row: dict[str, Any], **options: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        FORMATS[detect(row)](row, FormatOptions(**options))
    return caught.value


PAIR = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize("field", ["images", "documents", "reasoning", "context", "tool_calls"])
def test_a_field_that_the_model_saw_is_never_left_out_unasked(field: str) -> None:
    row = {**PAIR, field: ["something that the model saw"]}
    error = refused(row)
    assert error.reason == "unread_field"
    assert error.detail.startswith(f"{field}: ")
    example = FORMATS["prompt_chosen_rejected"](row, FormatOptions(ignore=[field]))
    assert isinstance(example, Example)
    assert example.prompt == PLAIN
    empty: list[Any] = [None, "", [], [""], {}, " "]
    for nothing in empty:
        assert FORMATS["prompt_chosen_rejected"]({**PAIR, field: nothing}, FormatOptions()) == example


def test_a_system_text_stands_before_the_prompt_whatever_the_format() -> None:
    system = {"role": "system", "content": "You are brief."}
    rows = [
        {**PAIR, "system": "You are brief."},
        {**PAIR, "system_prompt": "You are brief."},
        {"chosen": turns(ASK, GOOD), "rejected": turns(ASK, BAD), "system": "You are brief."},
        {"chosen": [system, *turns(ASK, GOOD)], "rejected": [system, *turns(ASK, BAD)], "system": "You are brief."},
        {"prompt": ASK, "responses": [GOOD, BAD], "scores": [1, 0], "system": "You are brief."},
    ]
    for row in rows:
        example = FORMATS[detect(row)](row, FormatOptions())
        assert isinstance(example, Example)
        assert example.prompt == [system, user(ASK)]
    other = {"chosen": [system, *turns(ASK, GOOD)], "rejected": [system, *turns(ASK, BAD)], "system": "Be long."}
    assert refused(other).reason == "unread_field"
    # A short system text that happens to stand in the question is no less a system text.
    row = {**PAIR, "system": "ice"}
    example = FORMATS[detect(row)](row, FormatOptions())
    assert isinstance(example, Example)
    assert example.prompt == [{"role": "system", "content": "ice"}, user(ASK)]


def test_tools_and_calls_travel_with_the_messages() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    answer = {"role": "tool", "content": "4", "tool_call_id": "c", "name": None}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [user(ASK), call, answer], "chosen": GOOD, "rejected": BAD, "tools": json.dumps(tools)}
    example = FORMATS[detect(row)](row, FormatOptions())
    assert isinstance(example, Example)
    assert example.prompt == [
        {**user(ASK), "tools": tools},
        call,
        {"role": "tool", "content": "4", "tool_call_id": "c"},
    ]


def test_what_a_prompt_says_and_the_conversations_do_not() -> None:
    row = {"prompt": "Another question", "chosen": turns(ASK, GOOD), "rejected": turns(ASK, BAD)}
    assert refused(row).reason == "prompt_mismatch"


@pytest.mark.parametrize(
    ("row", "near"),
    [
        ({"prompt": ASK, "response_1": GOOD, "response_2": BAD, "strength": 1}, "helpsteer2_preference"),
        ({"question": ASK, "better_answer": GOOD, "worse_answer": BAD}, ""),
    ],
)
def test_a_failed_detection_names_the_nearest_format_and_a_map(row: dict[str, Any], near: str) -> None:
    with pytest.raises(UserError) as caught:
        detect(row)
    assert near in str(caught.value)
    assert all(name in str(caught.value) for name in row)
    assert "map: {prompt: " in str(caught.value)
    if not near:
        assert "map: {prompt: question, chosen: better_answer, rejected: worse_answer}" in str(caught.value)


def safe_rows() -> list[dict[str, Any]]:
    """Four rows as PKU-SafeRLHF has them; the two labels disagree in the third."""
    return [
        {
            "prompt": f"{ASK} {number}",
            "response_0": BAD,
            "response_1": GOOD,
            "is_response_0_safe": number != 2,
            "better_response_id": 1,
            "safer_response_id": 0 if number == 2 else 1,
        }
        for number in range(4)
    ]


@pytest.mark.parametrize(("aspect", "expected"), [("better", [GOOD] * 4), ("safer", [GOOD, GOOD, BAD, GOOD])])
def test_two_labels_are_two_aspects_and_one_can_be_taken(aspect: str, expected: list[str]) -> None:
    for options in (FormatOptions(aspect=aspect), FormatOptions()):
        examples = [FORMATS["pku_saferlhf"](row, options) for row in safe_rows()]
        chosen = [
            one.completions[told.chosen].messages[0]["content"]
            for one in examples
            if isinstance(one, Example)
            for told in one.preferences
            if told.aspect == aspect
        ]
        assert chosen == expected


def test_labels_of_two_aspects_that_disagree_are_counted() -> None:
    assert window_of(safe_rows()).num_opposed == 1
    assert window_of(safe_rows(), FormatOptions(aspect="safer")).num_opposed == 0
    # Rows of the reader's own kind: the same two responses, each way by its own aspect and twice by the same one.
    row = {"prompt": ASK, "completions": [{"response": GOOD}, {"response": BAD}]}
    for first, second in zip(row["completions"], ((5, 1, 4), (2, 3, 4))):
        first["annotations"] = {name: {"Rating": one} for name, one in zip("abc", second)}
    assert window_of([row], FormatOptions(aspects="all")).num_opposed == 1
    contradiction = [PAIR, {**PAIR, "chosen": BAD, "rejected": GOOD}]
    assert window_of(contradiction).num_opposed == 0


def window_of(values: list[dict[str, Any]], options: FormatOptions | None = None, **settings: Any) -> Window:
    rows = [RawRow(number, 0, json.dumps(value).encode(), value) for number, value in enumerate(values)]
    (window,) = ingest_windows(
        iter(rows), file="f", format="auto", options=options or FormatOptions(), rows_per_shard=100, **settings
    )
    return window


def test_prompts_of_an_excluded_set_are_the_corpus_s_prompts() -> None:
    """With a system text beside the prompt, and where a map says which field it is."""
    row = {**PAIR, "system": "You are brief."}
    alone = {"prompt": ASK, "system": "You are brief."}
    (prompt,) = window_of([row]).groups["prompt_id"].to_pylist()
    assert window_of([alone], prompts_only=True).groups["prompt_id"].to_pylist() == [prompt]
    mapped = {"q": {"text": ASK}, "system": "You are brief."}
    fields = FieldMap(prompt="q.text", chosen="a", rejected="b")
    assert window_of([mapped], prompts_only=True, fields=fields).groups["prompt_id"].to_pylist() == [prompt]
    assert window_of([{"q": {}}, mapped], prompts_only=True, fields=fields).reasons == {"missing_field": 1}


def read(rows: list[dict[str, Any]], options: FormatOptions | None = None) -> tuple[Any, str, str]:
    """Prompt, chosen and rejected text of the one pair of some rows."""
    window = window_of(rows, options)
    assert (window.num_quarantined, window.pairs.num_rows) == (0, 1), window.examples
    (pair,) = window.pairs.to_pylist()
    group = next(one for one in window.groups.to_pylist() if one["prompt_id"] == pair["prompt_id"])
    chosen, rejected = (group["completions"][pair[side]]["messages"][0]["content"] for side in ("chosen", "rejected"))
    return group["prompt"], chosen, rejected


SIDES = {"chosen": turns(ASK, GOOD), "rejected": turns(ASK, BAD)}


@pytest.mark.parametrize("as_text", [json.dumps, repr])
def test_a_conversation_kept_as_text_is_a_conversation(as_text: Any) -> None:
    """As JSON, and as Python prints it; whole conversations, answers that are one message object, and the prompt."""
    rows = [
        {side: as_text(found) for side, found in SIDES.items()},
        {"prompt": ASK, **{side: as_text(found[-1]) for side, found in SIDES.items()}},
        {"prompt": as_text(PLAIN), **{side: as_text(found[-1:]) for side, found in SIDES.items()}},
        {"prompt": as_text([{"from": "human", "value": ASK}]), "chosen": GOOD, "rejected": BAD},
    ]
    for row in rows:
        assert read([row]) == (PLAIN, GOOD, BAD)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (json.dumps(turns(ASK, GOOD)), BAD),
        ('{"role": "admin", "content": "yes"}', "I will not."),
        ('{"a": 1}', '{"a": 2}'),
        ("[{1, 2}]", "[{3}]"),
    ],
)
def test_an_answer_that_is_json_stays_the_answer(chosen: str, rejected: str) -> None:
    assert read([{"prompt": "Write JSON.", "chosen": chosen, "rejected": rejected}])[1:] == (chosen, rejected)


@pytest.mark.parametrize("roles", [("Human", "AI"), ("USER", "Bot"), ("prompter", "model"), ("user", "ChatGPT")])
def test_names_of_roles(roles: tuple[str, str]) -> None:
    row = {side: [{"role": r, "content": m["content"]} for r, m in zip(roles, found)] for side, found in SIDES.items()}
    assert read([row]) == (PLAIN, GOOD, BAD)


def test_turns_of_a_helpsteer_prompt() -> None:
    marked = f"Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\n{ASK}"
    two = [{"prompt": marked, "response": text, "helpfulness": rate} for text, rate in ((BAD, 1), (GOOD, 3))]
    assert read(two, FormatOptions(aspect="helpfulness")) == (turns("Hi", "Hello.", ASK), GOOD, BAD)
    signed = {"prompt": marked, "response_1": GOOD, "response_2": BAD, "preference_strength": -1}
    assert read([signed]) == (turns("Hi", "Hello.", ASK), GOOD, BAD)


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": turns(ASK, text), "label": text == GOOD} for text in (GOOD, BAD)],
        [
            {
                "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": text}],
                "kto_tag": text == GOOD,
            }
            for text in (BAD, GOOD)
        ],
        [{"prompt": PLAIN, "completion": [assistant(text)], "label": int(text == GOOD)} for text in (GOOD, BAD)],
        [{"instruction": ASK, "input": "", "output": [GOOD, BAD]}],
        [{"conversation_a": turns(ASK, BAD), "conversation_b": turns(ASK, GOOD), "winner": "Model_B"}],
    ],
)
def test_spellings_of_labels(rows: list[dict[str, Any]]) -> None:
    assert read(rows) == (PLAIN, GOOD, BAD)


def test_a_conversation_beside_the_prompt_may_repeat_it_and_nothing_else() -> None:
    for told in (PLAIN, turns(ASK, GOOD), [{"from": "human", "value": ASK}]):
        assert read([{**PAIR, "messages": told}]) == (PLAIN, GOOD, BAD)
    for name in ("messages", "conversation", "chosen_images", "thinking-rejected"):
        assert window_of([{**PAIR, name: turns("Earlier", "Hello.", ASK)}]).reasons == {"unread_field": 1}


NUMPY = {
    side: f"[{{'content': {ASK!r}, 'role': 'user'}}\n {{'content': {text!r}, 'role': 'assistant'}}]"
    for side, text in (("chosen", GOOD), ("rejected", BAD))
}
SAID_TWICE = {
    "the prompt holds the chosen answer": {**PAIR, "prompt": turns(ASK, GOOD)},
    "conversations hold the chosen answer": {"conversations": turns(ASK, GOOD), "chosen": GOOD, "rejected": BAD},
    "transcripts repeat the prompt": {
        "prompt": f"\n\nHuman: {ASK}\n\nAssistant:",
        "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}",
    },
    "answers begin with their speaker": {
        "prompt": f"\n\nHuman: {ASK}\n\nAssistant:",
        "chosen": f"\n\nAssistant: {GOOD}",
        "rejected": f"\n\nAssistant: {BAD}",
    },
    "an array as NumPy prints it": NUMPY,
    "an array of objects": {side: f"array({text}, dtype=object)" for side, text in NUMPY.items()},
    "null beside the name that is filled": {**PAIR, "system": None, "system_prompt": "", "tools": None, "images": "[]"},
    "an empty prompt beside an instruction": {"prompt": "", "instruction": ASK, "chosen": GOOD, "rejected": BAD},
    "a later turn was not judged": {
        "turn": 1,
        "winner": "model_a",
        "conversation_a": turns(ASK, GOOD, "More?", "Yes."),
        "conversation_b": turns(ASK, BAD, "More?", "No."),
    },
}


@pytest.mark.parametrize("name", SAID_TWICE)
def test_what_is_said_twice_is_read_once(name: str) -> None:
    assert read([SAID_TWICE[name]]) == (PLAIN, GOOD, BAD)


REFUSED = {
    "prompt_mismatch": [{**PAIR, "prompt": turns(ASK, "Something else.")}],
    "wrong_type": [
        {"prompt": ASK, "chosen": "response_b", "rejected": "response_a", "response_a": BAD, "response_b": GOOD},
        {"prompt": ASK, "chosen": "a", "rejected": "b", "answer_a": GOOD, "answer_b": BAD},
        {"prompt": ASK, "chosen": "[{'role': 'user', 'content': …}]", "rejected": "[{'role': 'user', 'content': …}]"},
        {"instruction": ASK, "output_1": GOOD, "output_2": BAD, "preference": 3},
        {**PAIR, "prompt": f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n"},
        {**PAIR, "prompt": f"<bos><start_of_turn>user\n{ASK}<end_of_turn>\n<start_of_turn>model\n"},
        {"chosen": f"\n\nUser: {ASK}\n\nAssistant: {GOOD}", "rejected": f"\n\nUser: {ASK}\n\nAssistant: {BAD}"},
    ],
    "content_part": [{**PAIR, "prompt": [{**user(ASK), "images": ["a.png"]}]}],
    "unread_field": [
        {**PAIR, "systemPrompt": "Be brief."},
        {**PAIR, "context_messages": turns("Hi", "Hello.")},
        {**PAIR, "chat_history": "Hi"},
        {**PAIR, "available_tools": [{"name": "f"}]},
        {**PAIR, "instruction": "Answer in French."},
        {**PAIR, "initial_reason_steps": "Step 1."},
        {**PAIR, "image_path": "a.png"},
        {"input": {"messages": PLAIN, "system": "S"}, "preferred_output": [assistant(GOOD)],
         "non_preferred_output": [assistant(BAD)]},
        {"info": {"post": ASK}, "summaries": [{"text": GOOD}, {"text": BAD}], "choice": 0, "images": ["a"]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in REFUSED.items() for row in rows])
def test_a_row_that_would_be_read_wrong_is_refused(reason: str, row: dict[str, Any]) -> None:
    window = window_of([row])
    assert window.reasons == {reason: 1}, window.pairs


def test_marks_and_counts_are_no_text_that_was_seen() -> None:
    for row in ({**PAIR, "num_images": 0, "system_id": 3, "has_tools": False}, {**PAIR, "tool_choice": "auto"}):
        assert read([row]) == (PLAIN, GOOD, BAD)


@pytest.mark.parametrize(("preference", "chosen"), [(1, GOOD), (2, BAD), (1.2, GOOD), (0, None), (1.5, None)])
def test_a_draw_is_no_win(preference: float, chosen: str | None) -> None:
    row = {"instruction": ASK, "output_1": GOOD, "output_2": BAD, "preference": preference}
    window = window_of([row])
    assert (window.pairs.num_rows, window.num_ties) == (int(chosen is not None), int(chosen is None))
    if chosen:
        assert read([row])[1] == chosen


def test_an_input_that_is_short_stands_once_and_always() -> None:
    told = {
        "instruction": ASK,
        "input": "ctx",
        "chosen": turns(f"{ASK}\n\nctx", GOOD),
        "rejected": turns(f"{ASK}\n\nctx", BAD),
    }
    assert read([told])[0] == [user(f"{ASK}\n\nctx")]
    assert read([{"instruction": "Say", "input": "Say", "chosen": GOOD, "rejected": BAD}])[0] == [user("Say\n\nSay")]


def test_a_system_text_that_the_user_repeats_is_still_the_system_s() -> None:
    text = "You are a helpful assistant who answers in French."
    assert read([{**PAIR, "system": text, "prompt": f"{text} Hi"}])[0][0] == {"role": "system", "content": text}
    parts = [{"type": "text", "text": text}]
    assert read([{**PAIR, "system": parts}])[0][0] == {"role": "system", "content": text}


def test_ratings_alone_label_by_aspect() -> None:
    fields = FieldMap(prompt="q", responses="rs", ratings={"h": "h", "c": "c"})
    row = {"q": ASK, "rs": [GOOD, BAD], "h": [5, 1], "c": [1, 5]}
    window = window_of([row], FormatOptions(aspects="all"), fields=fields)
    assert sorted(one["aspect"] for one in window.pairs.to_pylist()) == ["c", "h"]
    assert read_mapped(row, fields, "h") == (GOOD, BAD)
    assert read_mapped(row, fields, "c") == (BAD, GOOD)


def read_mapped(row: dict[str, Any], fields: FieldMap, aspect: str) -> tuple[str, str]:
    window = window_of([row], FormatOptions(aspect=aspect), fields=fields)
    (pair,), (group,) = window.pairs.to_pylist(), window.groups.to_pylist()
    chosen, rejected = (group["completions"][pair[side]]["messages"][0]["content"] for side in ("chosen", "rejected"))
    return chosen, rejected


def test_ratings_off_their_scale_are_absent_and_counted() -> None:
    rows = [
        {"prompt": ASK, "response": text, "helpfulness": rate, "verbosity": 44} for text, rate in ((GOOD, 4), (BAD, 1))
    ]
    window = window_of(rows, FormatOptions(aspect="helpfulness"))
    assert (window.num_absent, window.pairs.num_rows) == (2, 1)


def test_nulls_that_a_table_adds_to_objects_change_nothing(tmp_path: Path) -> None:
    """Of Parquet, where every call has the arguments of all; a null that a line of JSON says is the model's."""
    calls = [[{"function": {"name": "f", "arguments": given}}] for given in ({"a": 1}, {"b": 2})]
    turns_of = [{"role": "assistant", "content": None, "tool_calls": one} for one in calls]
    rows = [{**PAIR, "prompt": [user(ASK), one, {"role": "tool", "content": "4"}]} for one in turns_of]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read_back = [one.value for one in read_rows(str(tmp_path / "a.parquet"), max_row_bytes=1 << 20)]
    assert window_of(read_back).groups["prompt_id"] == window_of(rows).groups["prompt_id"]
    as_text = [{**row, "prompt": [row["prompt"][0], {**turn, "tool_calls": json.dumps(turn["tool_calls"])},
                                  row["prompt"][2]]} for row, turn in zip(rows, turns_of)]  # fmt: skip
    assert window_of(as_text).groups["prompt_id"] == window_of(rows).groups["prompt_id"]
    said = json.loads(json.dumps(rows[:1]).replace('{"a": 1}', '{"a": 1, "b": null}'))
    assert window_of(said).groups["prompt_id"] != window_of(rows[:1]).groups["prompt_id"]


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        (
            {"task": "t", "question": ASK, "answer_a": GOOD, "answer_b": BAD, "winner": "a"},
            "{prompt: question, responses: [answer_a, answer_b], preference: {field: winner, first: [VALUE],",
        ),
        (
            {"query": ASK, "output1": GOOD, "output2": BAD, "better_response_id": 1},
            "{prompt: query, responses: [output1, output2], preference: {field: better_response_id,",
        ),
        ({"ask": ASK, "good_text": GOOD, "bad_text": BAD, "win_model": "m"}, "chosen: good_text, rejected: bad_text}"),
    ],
)
def test_a_first_map_names_texts_as_texts_and_verdicts_as_verdicts(row: dict[str, Any], proposed: str) -> None:
    with pytest.raises(UserError) as caught:
        detect(row)
    assert proposed in str(caught.value)


def test_text_that_mentions_a_mark_is_text() -> None:
    asked = "<|im_start|>user is what? And <|im_start|>assistant, what is it?"
    assert read([{**PAIR, "prompt": asked}])[0] == [user(asked)]


def test_prompts_of_one_label_are_counted() -> None:
    rows = [{"prompt": f"{ASK} {n // 2}", "completion": f"{n}", "label": n % 2 == 0 or n < 2} for n in range(6)]
    window = window_of(rows)
    assert (window.pairs.num_rows, window.num_unpaired) == (2, 1)
    assert window_of([PAIR]).num_unpaired == 0


@pytest.mark.parametrize(
    "names", [("chosenScore", "rejectedScore"), ("chosen score", "rejected score"), ("chosen.score", "rejected.score")]
)
def test_a_rating_is_known_however_its_side_is_spelled(names: tuple[str, str]) -> None:
    for row in ({**PAIR, names[0]: "4", names[1]: 1.5}, {**PAIR, "score": {"chosen": 4, "rejected": 1.5}}):
        example = FORMATS[detect(row)](row, FormatOptions())
        assert isinstance(example, Example)
        assert [one.ratings for one in example.completions] == [{"score": 4.0}, {"score": 1.5}]
        assert example.preferences[0].margin == 2.5


@pytest.mark.parametrize(
    "prompt",
    [
        f"<s>[INST] {ASK} [/INST]",
        f"<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] {ASK} [/INST]",
        f"<|user|>\n{ASK}</s>\n<|assistant|>\n",
        f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_a_prompt_that_went_through_a_template_is_refused(prompt: str) -> None:
    assert "a chat template was applied" in refused({**PAIR, "prompt": prompt}).detail
    about = {**PAIR, "prompt": f"What does {prompt} mean?"}
    assert FORMATS[detect(about)](about, FormatOptions()).prompt == [user(f"What does {prompt} mean?")]


def test_turns_may_be_one_line_break_apart() -> None:
    for row in (
        {**PAIR, "prompt": f"Human: {ASK}\nAssistant:"},
        {"chosen": f"Human: {ASK}\nAssistant: {GOOD}", "rejected": f"Human: {ASK}\nAssistant: {BAD}"},
    ):
        example = FORMATS[detect(row)](row, FormatOptions())
        assert example.prompt == PLAIN
        assert [one.messages for one in example.completions] == [[assistant(GOOD)], [assistant(BAD)]]


def test_messages_whose_json_was_written_as_json_are_no_answers() -> None:
    sides = {name: json.dumps(json.dumps(turns(ASK, text))) for name, text in (("chosen", GOOD), ("rejected", BAD))}
    assert "looks like messages" in refused({**PAIR, **sides}).detail


@pytest.mark.parametrize("name", ROWS)
def test_no_field_that_labels_is_called_ignored(name: str) -> None:
    format_name, row, *_ = ROWS[name]
    uses = FieldUse(FORMATS[format_name], FormatOptions())
    uses.count(row)
    labels = {"winner", "preference", "label", "labels", "overall_preference", "preference_strength", "choice"}
    for field, use in uses.totals().items():
        assert field not in labels or "ignored" not in use


def test_a_turn_and_a_winner_are_used() -> None:
    battle = {
        "conversation_a": turns("Q", "a", "R", "b"),
        "conversation_b": turns("Q", "c", "R", "d"),
        "winner": "model_a",
    }
    uses = FieldUse(FORMATS["arena"], FormatOptions())
    uses.count({**battle, "turn": 1, "judge": "x"})
    assert uses.totals()["winner"] == uses.totals()["turn"] == {"used": 1}
    assert uses.totals()["judge"] == {"ignored": 1}
