from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from transformers import AutoTokenizer

from prefsel.errors import TemplateError, UserError
from prefsel.scratch.tokenizer import SPECIAL_TOKENS, batches, encode, padded, train_tokenizer

TEXTS = ["the apple is red .", "the lamp is white and the lamp is tall .", "hello\n\nworld  of   ünïcode 🙂"]
CONVERSATIONS = [
    [{"role": "user", "content": "the apple"}, {"role": "assistant", "content": "is red ."}],
    [
        {"role": "system", "content": "hello"},
        {"role": "user", "content": "the lamp "},
        {"role": "assistant", "content": " is white"},
        {"role": "user", "content": "is it\n"},
        {"role": "assistant", "content": "\n tall . "},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
]


@pytest.fixture(params=["word", "bpe"])
def tokenizer(request):
    return train_tokenizer(TEXTS, kind=request.param, vocab_size=320)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_prompt_is_a_token_prefix_and_the_end_token_closes(tokenizer, conversation):
    whole = tokenizer.apply_chat_template(conversation, return_dict=False)
    prompt = tokenizer.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert len(whole) > len(prompt)
    assert whole[0] == tokenizer.bos_token_id
    assert whole[-1] == tokenizer.eos_token_id
    assert whole.count(tokenizer.eos_token_id) == len(conversation)


def test_special_tokens_are_different_and_first(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for conversation in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(conversation, return_dict=False)
        assert loaded.apply_chat_template(conversation, return_dict=False) == expected
    assert (loaded.pad_token_id, loaded.padding_side) == (tokenizer.pad_token_id, "left")


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_the_same_texts_give_the_same_tokens(kind):
    first, second = (train_tokenizer(TEXTS, kind=kind, vocab_size=290).get_vocab() for _ in range(2))
    assert first == second


def test_words_are_the_most_frequent_and_the_others_unknown():
    tokenizer = train_tokenizer(["b a b c", "a b"], kind="word", vocab_size=9)
    # Seven special tokens, then b (3) and a (2).
    assert tokenizer("a b c x")["input_ids"] == [8, 7, tokenizer.unk_token_id, tokenizer.unk_token_id]
    assert tokenizer.decode([7, 8, 7]) == "b a b"


def test_byte_pairs_merge_and_round_trip():
    tokenizer = train_tokenizer(TEXTS, kind="bpe", vocab_size=300)
    for text in (*TEXTS, " never seen: ∑ \t tail "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the lamp is")["input_ids"]) < len("the lamp is")


def test_another_chat_template_is_kept():
    tokenizer = train_tokenizer(TEXTS, kind="word", vocab_size=64, chat_template="{{ messages[0]['content'] }}")
    assert tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False) == "the apple"


@pytest.mark.parametrize(("kind", "vocab_size"), [("word", 7), ("bpe", 200), ("letters", 1000)])
def test_impossible_tokenizers_are_refused(kind, vocab_size):
    with pytest.raises(UserError, match=r"kind|vocab_size"):
        train_tokenizer(TEXTS, kind=kind, vocab_size=vocab_size)


def test_encode_cuts_the_beginning():
    tokenizer = train_tokenizer(TEXTS, kind="word", vocab_size=64)
    # bos user the apple end assistant | is red . end
    (whole,) = encode(tokenizer, CONVERSATIONS[:1], max_length=16)
    assert (len(whole.tokens), whole.response_start) == (10, 6)
    (cut,) = encode(tokenizer, CONVERSATIONS[:1], max_length=6)
    assert (cut.tokens, cut.response_start) == (whole.tokens[4:], 2)
    # The first token has nothing before it to be predicted from.
    (short,) = encode(tokenizer, CONVERSATIONS[:1], max_length=3)
    assert (short.tokens, short.response_start) == (whole.tokens[7:], 1)


def test_a_template_without_a_shared_prefix_is_named():
    template = "{{ messages | length }} {% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer = train_tokenizer(["1 2", *TEXTS], kind="word", vocab_size=64, chat_template=template)
    with pytest.raises(TemplateError, match="prefix"):
        encode(tokenizer, CONVERSATIONS[:1], max_length=16)


def test_padding_is_on_the_right():
    assert padded([[5, 6, 7], [8]], 0).tolist() == [[5, 6, 7], [8, 0, 0]]


def test_an_epoch_visits_everything_once_within_the_budget():
    length_N = np.array([3, 9, 4, 4, 30, 7, 8, 2, 9, 5])
    # 30 is over the budget and goes alone: the other lengths 2 3 4 4 | 5 7 | 8 9 | 9 pack into 20 tokens each.
    epoch = list(islice(batches(length_N, 20, seed=0), 5))
    assert sorted(np.concatenate(epoch)) == list(range(10))
    assert sorted(sorted(length_N[batch]) for batch in epoch) == [[2, 3, 4, 4], [5, 7], [8, 9], [9], [30]]
    again = list(islice(batches(length_N, 20, seed=0), 5))
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in epoch]
