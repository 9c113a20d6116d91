from __future__ import annotations

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
