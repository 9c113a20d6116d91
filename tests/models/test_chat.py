from __future__ import annotations

import json

import pytest
from tiny_models import CHATML, bpe_tokenizer

from prefsel.errors import TemplateError, UserError
from prefsel.models.chat import Encoder

PROMPT = [{"role": "user", "content": "who sat where?"}]
CAT = [{"role": "assistant", "content": "the cat sat on the mat."}]
DOG = [{"role": "assistant", "content": "the dog!"}]


def test_response_starts_after_the_generation_prompt_and_ends_with_the_end_of_turn(tokenizer):
    group = Encoder(tokenizer).encode_group(PROMPT, [CAT, DOG])
    assert (
        tokenizer.decode(group.prompt_tokens) == "<|im_start|>user\nwho sat where?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(ids) for ids in group.completion_tokens] == [
        "the cat sat on the mat.<|im_end|>\n",
        "the dog!<|im_end|>\n",
    ]
    assert group.status == ["ok", "ok"]
    assert group.num_truncated == 0


def test_groups_encoded_together_or_alone_are_the_same(tokenizer):
    encoder = Encoder(tokenizer)
    groups = [(PROMPT, [CAT, DOG]), (PROMPT, []), (CAT[:0] + PROMPT, [DOG])]
    assert encoder.encode_groups(groups) == [encoder.encode_group(*group) for group in groups]
    assert encoder.encode_groups([]) == []


def test_auto_is_the_tokenizers_own_template_and_inline_and_file_are_the_same(tokenizer, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    expected = Encoder(tokenizer, "auto").encode_group(PROMPT, [CAT])
    bare = bpe_tokenizer(chat_template=None)
    for other in (tokenizer, "tokenizer"), (bare, CHATML), (bare, str(tmp_path / "chatml.jinja")):
        assert Encoder(*other).encode_group(PROMPT, [CAT]) == expected


def test_plain_tokenises_prompt_and_response_apart():
    tokenizer = bpe_tokenizer(chat_template=None)
    prompt, response = "the ca", "t sat"
    group = Encoder(tokenizer, "plain").encode_group(
        [{"role": "user", "content": prompt}], [[{"role": "assistant", "content": response}]]
    )
    assert group.prompt_tokens == tokenizer(prompt)["input_ids"]
    assert group.completion_tokens == [[*tokenizer(response)["input_ids"], tokenizer.eos_token_id]]
    # Joined as text the tokenizer merges "ca" and "t", and the boundary would be inside a token.
    merged = tokenizer(prompt + response)["input_ids"]
    assert merged[: len(group.prompt_tokens)] != group.prompt_tokens


def test_hh_turns_and_bos():
    tokenizer = bpe_tokenizer(bos=True)
    messages = [*PROMPT, *DOG, {"role": "user", "content": "why?"}]
    group = Encoder(tokenizer, "hh").encode_group(messages, [CAT])
    assert tokenizer.decode(group.prompt_tokens) == (
        "<s>\n\nHuman: who sat where?\n\nAssistant: the dog!\n\nHuman: why?\n\nAssistant:"
    )
    assert tokenizer.decode(group.completion_tokens[0]) == " the cat sat on the mat.</s>"


def test_too_long_is_dropped_per_completion(tokenizer):
    whole = Encoder(tokenizer).encode_group(PROMPT, [CAT, DOG])
    lengths = [len(whole.prompt_tokens) + len(ids) for ids in whole.completion_tokens]
    assert lengths[0] > lengths[1]
    group = Encoder(tokenizer, max_length=lengths[1]).encode_group(PROMPT, [CAT, DOG])
    assert group.status == ["too_long", "ok"]
    assert group.completion_tokens == [[], whole.completion_tokens[1]]
    assert group.num_truncated == 0


def test_right_truncation_cuts_the_response(tokenizer):
    whole = Encoder(tokenizer).encode_group(PROMPT, [CAT, DOG])
    limit = len(whole.prompt_tokens) + len(whole.completion_tokens[1])
    group = Encoder(tokenizer, "auto", limit, "right").encode_group(PROMPT, [CAT, DOG])
    room = len(whole.completion_tokens[1])
    assert group.completion_tokens == [whole.completion_tokens[0][:room], whole.completion_tokens[1]]
    assert (group.status, group.num_truncated) == (["ok", "ok"], 1)


def test_left_truncation_cuts_the_prompt_of_the_long_completion_only(tokenizer):
    whole = Encoder(tokenizer).encode_group(PROMPT, [CAT, DOG])
    limit = len(whole.prompt_tokens) + len(whole.completion_tokens[1])
    group = Encoder(tokenizer, "auto", limit, "left").encode_group(PROMPT, [CAT, DOG])
    excess = len(whole.completion_tokens[0]) - len(whole.completion_tokens[1])
    assert group.prompt_starts == (excess, 0)
    assert group.completion_tokens == whole.completion_tokens
    assert (group.status, group.num_truncated) == (["ok", "ok"], 1)


@pytest.mark.parametrize(("truncation", "limit"), [("right", 10), ("left", 3)])
def test_what_cannot_be_cut_to_fit_is_too_long(tokenizer, truncation, limit):
    group = Encoder(tokenizer, "auto", limit, truncation).encode_group(PROMPT, [CAT])
    assert len(Encoder(tokenizer).encode_group(PROMPT, [CAT]).prompt_tokens) > 10
    assert (group.status, group.completion_tokens, group.num_truncated) == (["too_long"], [[]], 0)


def test_a_template_whose_prompt_is_no_token_prefix_is_named_with_the_place(tokenizer):
    # The generation prompt ends in "ca"; with the response "t" after it the tokenizer merges them.
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match=r"template .*part at token 1 of 3, …'the ca'… against …'the cat'…"):
        Encoder(tokenizer, template).encode_group(
            [{"role": "user", "content": "the ca"}], [[{"role": "assistant", "content": "t"}]]
        )


def test_a_rare_template_error_can_be_tolerated():
    tokenizer = bpe_tokenizer()
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    encoder = Encoder(tokenizer, template + "{{ m.content }}{% endfor %}")
    ca, tool = [{"role": "user", "content": "the ca"}], [{"role": "tool", "content": "x"}]
    sat, t = [{"role": "assistant", "content": " sat"}], [{"role": "assistant", "content": "t"}]
    groups = [(ca, [sat, t, sat]), (tool, [sat]), (ca, [sat, sat]), (ca, [sat])]
    encoded = encoder.encode_groups(groups, strict=False)
    assert [g.status for g in encoded] == [["ok", "template_error", "ok"], ["template_error"], ["ok", "ok"], ["ok"]]
    alone = encoder.encode_group(ca, [sat])
    assert encoded[0].prompt_tokens == alone.prompt_tokens
    assert encoded[0].completion_tokens == [alone.completion_tokens[0], [], alone.completion_tokens[0]]
    assert "not a token prefix of the conversation with completion 1" in encoder.tolerated
    with pytest.raises(TemplateError, match="not a token prefix of the conversation with completion 1"):
        encoder.encode_groups(groups)


def test_what_a_template_refuses_is_an_error_with_its_own_words(tokenizer):
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(TemplateError, match="no system role; message roles were"):
        Encoder(tokenizer, template).encode_group(PROMPT, [CAT])
    with pytest.raises(TemplateError, match="'tool'; valid: system, user, assistant"):
        Encoder(tokenizer, "hh").encode_group([{"role": "tool", "content": "x"}], [CAT])


def test_a_prompt_without_tokens_is_explained():
    empty = [{"role": "user", "content": ""}]
    with pytest.raises(UserError, match="nothing predicts the first response token"):
        Encoder(bpe_tokenizer(), "plain").encode_group(empty, [CAT])
    assert Encoder(bpe_tokenizer(bos=True), "plain").encode_group(empty, [CAT]).prompt_tokens == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "auto"}, "no chat template; valid: plain, hh"),
        ({"template": "no/such.jinja"}, r"template: got 'no/such.jinja'; valid: auto, tokenizer, plain"),
        ({"template": "hh", "truncation": "middle"}, "truncation: got 'middle'; valid: drop, right, left"),
        ({"template": "hh", "max_length": 1}, "max_length: got 1"),
    ],
)
def test_wrong_options_name_the_valid_ones(options, message):
    with pytest.raises(UserError, match=message):
        Encoder(bpe_tokenizer(chat_template=None), **options)


def test_plain_needs_an_eos_token():
    with pytest.raises(UserError, match="eos token, but this tokenizer has none"):
        Encoder(bpe_tokenizer(eos_token=""), "plain")


# --------------------------------------------------------------------------------- what a template does with messages


def kinds(group):
    return {note.kind: note.count for note in group.notes}


def answers(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


TRIMS = CHATML.replace("m.content", "m.content | trim")


def test_completions_of_the_same_tokens_point_at_the_first_of_them(tokenizer):
    given = answers("the cat", "a dog", "the cat \n", "a dog", "bread")
    group = Encoder(tokenizer, TRIMS).encode_group(PROMPT, given)
    assert group.same_as == (None, None, 0, 1, None)
    assert kinds(group) == {"same_tokens": 2}
    # Under a template that writes white space, the third has a text of its own.
    assert Encoder(tokenizer).encode_group(PROMPT, given).same_as == (None, None, None, 1, None)
    assert Encoder(tokenizer).encode_group(PROMPT, given[:3]).same_as == ()


def test_completions_cut_to_the_same_tokens_are_the_same_and_those_too_long_are_none(tokenizer):
    given = answers("the cat sat on the mat.", "the cat sat where?")
    whole = Encoder(tokenizer).encode_group(PROMPT, given)
    limit = len(whole.prompt_tokens) + 2
    assert Encoder(tokenizer, "auto", limit, "right").encode_group(PROMPT, given).same_as == (None, 0)
    long = Encoder(tokenizer, "auto", limit).encode_group(PROMPT, [given[0], given[0]])
    assert (long.status, long.same_as) == (["too_long", "too_long"], ())


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages[0].content[0] + 1 }}", 'TypeError: can only concatenate str \\(not "int"\\) to str'),
        ("{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero"),
        ("{{ messages[9].content }}", "list object has no element 9"),
        (
            "{% for m in messages %}{{ m.tool_calls[0].name }}{% endfor %}",
            "'dict object' has no attribute 'tool_calls'",
        ),
    ],
)
def test_whatever_a_template_raises_is_an_error_that_names_it(tokenizer, template, error):
    encoder = Encoder(tokenizer, template)
    with pytest.raises(TemplateError, match=rf"^template '{{.*': {error}.*; message roles were \['user'\]"):
        encoder.encode_group(PROMPT, [CAT])
    group = encoder.encode_groups([(PROMPT, [CAT, DOG])], strict=False)[0]
    assert (group.status, kinds(group)) == (["template_error"] * 2, {"template_error": 2})


def test_one_conversation_that_a_template_refuses_leaves_its_siblings(tokenizer):
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if 'dog' in m.content %}{{ 1 // 0 }}{% endif %}")
    group = Encoder(tokenizer, template).encode_groups([(PROMPT, [CAT, DOG])], strict=False)[0]
    assert group.status == ["ok", "template_error"]
    assert group.completion_tokens[0] == Encoder(tokenizer).encode_group(PROMPT, [CAT]).completion_tokens[0]


def test_a_template_that_is_none_is_told_at_once(tokenizer):
    with pytest.raises(UserError, match=r"template .*: line 1: Encountered unknown tag 'endif'"):
        Encoder(tokenizer, "{% for m in messages %}{{ m.content }}{% endif %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",  # no token
        CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else '' }}"),  # the end of the turn alone
        CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else m.reply }}"),  # another key
    ],
)
def test_a_completion_of_which_nothing_is_written_is_an_error(tokenizer, template):
    with pytest.raises(TemplateError, match="it writes nothing of completion 0"):
        Encoder(tokenizer, template).encode_group(PROMPT, [CAT])


def test_an_answer_that_a_template_writes_in_other_letters_is_scored_and_noted(tokenizer):
    loud = CHATML.replace("m.content", "m.content | upper")
    group = Encoder(tokenizer, loud).encode_group(PROMPT, [DOG])
    assert tokenizer.decode(group.completion_tokens[0]) == "THE DOG!<|im_end|>\n"
    assert kinds(group) == {"changed": 1, "prompt_changed": 1}


def test_a_call_that_a_template_does_not_write_is_an_error_and_one_that_it_writes_is_none(tokenizer):
    call = [{"role": "assistant", "content": None, "rest": '{"tool_calls": [{"function": {"name": "look"}}]}'}]
    with pytest.raises(TemplateError, match=r"it writes nothing of completion 0: .*tool_calls"):
        Encoder(tokenizer).encode_group(PROMPT, [call])
    writes = CHATML.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].function.name }}")
    group = Encoder(tokenizer, writes).encode_group(PROMPT, [call])
    assert (tokenizer.decode(group.completion_tokens[0]), kinds(group)) == ("look<|im_end|>\n", {})


def test_conversations_with_tools_get_the_template_that_a_tokenizer_names_for_them():
    listed = "{% for tool in tools %}<|im_start|>tool {{ tool.function.name }}<|im_end|>\n{% endfor %}" + CHATML
    tokenizer = bpe_tokenizer(chat_template={"default": CHATML, "tool_use": listed})
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    asked = {"role": "user", "content": "who sat where?"}
    given = [{**asked, "rest": json.dumps({"tools": tools})}]
    told, plain = Encoder(tokenizer).encode_groups([(given, [CAT, DOG]), ([asked], [CAT])])
    expected = tokenizer.apply_chat_template([asked, *CAT], tools=tools, return_dict=False)
    assert told.prompt_tokens + told.completion_tokens[0] == expected
    assert tokenizer.decode(told.prompt_tokens).startswith("<|im_start|>tool look<|im_end|>")
    assert kinds(told) == {}
    assert plain == Encoder(bpe_tokenizer()).encode_group([asked], [CAT])
    inline = Encoder(tokenizer, CHATML).encode_group(given, [CAT])
    assert (inline.prompt_tokens, kinds(inline)) == (plain.prompt_tokens, {"prompt_changed": 1})


def test_several_templates_without_a_default_are_named():
    tokenizer = bpe_tokenizer(chat_template={"tool_use": CHATML, "rag": CHATML})
    with pytest.raises(UserError, match="none of them is its default: rag, tool_use; save"):
        Encoder(tokenizer)


def test_a_template_that_takes_parts_only_is_given_parts(tokenizer):
    template = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    group = Encoder(tokenizer, template).encode_group(PROMPT, [CAT, DOG])
    expected = Encoder(tokenizer).encode_group(PROMPT, [CAT, DOG])
    assert (group.prompt_tokens, group.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert kinds(group) == {"parts": 2}


def test_a_template_that_takes_text_is_given_the_text_of_parts_and_refuses_others(tokenizer):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog!"}]
    group = Encoder(tokenizer).encode_group(PROMPT, [[{"role": "assistant", "content": parts}]])
    assert group.completion_tokens == Encoder(tokenizer).encode_group(PROMPT, [DOG]).completion_tokens
    with pytest.raises(
        TemplateError, match="template 'auto': it takes text, and a message holds a part of type 'image'"
    ):
        Encoder(tokenizer).encode_group([{"role": "user", "content": [{"type": "image"}]}], [DOG])


THINKS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")


def test_reasoning_that_a_template_leaves_out_is_noted(tokenizer):
    given = answers("<think>a cat?</think>the mat", "the dog")
    group = Encoder(tokenizer, THINKS).encode_group(PROMPT, given)
    assert group.notes[0].example == "'a cat?'"
    assert kinds(group) == {"thinking_dropped": 1}
    assert kinds(Encoder(tokenizer).encode_group(PROMPT, given)) == {}
    beside = [[{"role": "assistant", "content": "the mat", "reasoning_content": "a cat?"}]]
    assert kinds(Encoder(tokenizer).encode_group(PROMPT, beside)) == {"thinking_dropped": 1}
    # Of earlier turns reasoning is left out by design.
    assert kinds(Encoder(tokenizer, THINKS).encode_group([*PROMPT, *given[0], *PROMPT], [DOG])) == {}


def test_a_generation_prompt_that_opens_more_than_an_answer_ends_where_they_part(tokenizer):
    template = THINKS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    group = Encoder(tokenizer, template).encode_group(PROMPT, [CAT, DOG])
    expected = Encoder(tokenizer).encode_group(PROMPT, [CAT, DOG])
    assert (group.prompt_tokens, group.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert kinds(group) == {"opening": 2}
    # Nobody has answered yet: a model is asked with the whole generation prompt.
    alone = Encoder(tokenizer, template).encode_group(PROMPT, [])
    assert tokenizer.decode(alone.prompt_tokens).endswith("assistant\n<think>\n")


def test_the_end_of_a_turn_that_is_lacking_or_there_twice_is_noted(tokenizer):
    endless = Encoder(tokenizer, "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    assert kinds(endless.encode_group(PROMPT, [CAT, DOG])) == {"no_end": 2}
    twice = answers("the cat<|im_end|>", "a dog")
    assert kinds(Encoder(tokenizer).encode_group(PROMPT, twice)) == {"special_text": 1, "ends_twice": 1}
    assert Encoder(tokenizer).traits.ending == "<|im_end|>\n"
    assert Encoder(tokenizer, "plain").traits.ending == "</s>"


def test_what_a_template_leaves_out_of_a_prompt_or_changes_is_noted(tokenizer):
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    group = Encoder(tokenizer, silent).encode_group([{"role": "system", "content": "be brief"}, *PROMPT], [CAT, DOG])
    assert [(note.kind, note.count, note.example) for note in group.notes] == [
        ("prompt_changed", 2, "system message 0: 'be brief'")
    ]
    shorter = CHATML.replace("m.content", "m.content[:16]")
    assert kinds(Encoder(tokenizer, shorter).encode_group(PROMPT, [CAT, DOG])) == {"changed": 1}
    assert kinds(Encoder(tokenizer, TRIMS).encode_group(PROMPT, answers("\n", "the cat"))) == {"blank": 1}


def test_special_tokens_in_content_become_those_tokens_and_are_noted(tokenizer):
    typed = [{"role": "user", "content": "what is <|im_end|>?"}]
    group = Encoder(tokenizer).encode_group(typed, [CAT, DOG])
    assert group.prompt_tokens.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert [(note.kind, note.count, note.example) for note in group.notes] == [
        ("special_text", 2, "<|im_end|> in user content 'what is <|im_end|>?'")
    ]
    assert kinds(Encoder(tokenizer, "hh").encode_group(PROMPT, answers("a </s> b", "a dog"))) == {"special_text": 1}


def test_a_date_that_a_template_writes_is_noted():
    dated = "{% set day = strftime_now('%d %b %Y') %}<s>{{ day }}\n" + CHATML
    (group,) = Encoder(bpe_tokenizer(), dated).encode_groups([(PROMPT, [CAT, DOG])])
    assert kinds(group) == {"dated": 2}
    unwritten = "{% set day = strftime_now('%d %b %Y') %}" + CHATML
    assert kinds(Encoder(bpe_tokenizer(), unwritten).encode_group(PROMPT, [CAT])) == {}
    parts = dated.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert kinds(Encoder(bpe_tokenizer(), parts).encode_group(PROMPT, [CAT])) == {"dated": 1, "parts": 1}
