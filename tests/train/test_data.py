from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_rewards import reward_table, row
from tiny_runs import bradley_terry, preference

from prefsel.errors import NonFiniteError, TemplateError, UserError
from prefsel.models.chat import Encoder
from prefsel.train.data import TrainingPairs, encode_pairs
from prefsel.train.reward import encode_reward_pairs


def table(**replaced: list) -> pa.Table:
    columns = {
        "pair_id": ["aa", "bb", "cc"],
        "prompt": ["w1", "w2", "w3"],
        "chosen": ["w4", "w5", "w6 w7"],
        "rejected": ["w8", "w9", "w1"],
        "reference_logps_chosen": [-1.0, -2.0, -3.0],
        "reference_logps_rejected": [-4.0, -5.0, -6.0],
    }
    return pa.table({**columns, **replaced})


# ------------------------------------------------------------------------------------------------------- table


def test_reading_files_and_folders(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "train-0.parquet")
    pq.write_table(table(pair_id=["dd", "ee", "ff"]), tmp_path / "train-1.parquet")
    from_folder = TrainingPairs.from_parquet(tmp_path)
    from_files = TrainingPairs.from_parquet([tmp_path / "train-0.parquet", tmp_path / "train-1.parquet"])
    assert from_folder.table["pair_id"].to_pylist() == ["aa", "bb", "cc", "dd", "ee", "ff"]
    assert from_folder.table.equals(from_files.table)
    assert from_folder.reference_logps_N2[1].tolist() == [-2.0, -5.0]
    with pytest.raises(UserError, match="no such file"):
        TrainingPairs.from_parquet(tmp_path / "absent.parquet")
    with pytest.raises(UserError, match="no parquet file"):
        TrainingPairs.from_parquet([])


def test_raw_bytes_of_a_pair_id_are_shown_as_hex() -> None:
    pairs = TrainingPairs.from_table(table(pair_id=[b"\x01" * 16, b"\x02" * 16, b"\xff" * 16]))
    assert pairs.table["pair_id"].to_pylist() == ["01" * 16, "02" * 16, "ff" * 16]


def test_a_table_that_cannot_be_trained_on_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"missing columns \['reference_logps_rejected'\]"):
        TrainingPairs.from_table(table().drop_columns(["reference_logps_rejected"]))
    with pytest.raises(UserError, match="reference_logps_chosen is null in 1 rows, first: bb"):
        TrainingPairs.from_table(table(reference_logps_chosen=[-1.0, None, -3.0]))
    with pytest.raises(NonFiniteError, match="not finite for pair_ids aa, cc"):
        TrainingPairs.from_table(table(reference_logps_rejected=[math.nan, -5.0, -math.inf]))
    with pytest.raises(UserError, match=r"pair_id occurs twice.*bb"):
        TrainingPairs.from_table(table(pair_id=["aa", "bb", "bb"]))


def test_columns_that_only_some_losses_need_may_be_absent() -> None:
    bare = TrainingPairs.from_table(table().drop_columns(["reference_logps_chosen", "reference_logps_rejected"]))
    assert bare.reference_logps_N2 is None
    assert bare.table.column_names == ["pair_id", "prompt", "chosen", "rejected"]
    more = TrainingPairs.from_table(table(score=[1.0, None, 2.0], aspect=["b", "a", "b"], source=["x"] * 3))
    assert more.table.column_names[-2:] == ["aspect", "score"]  # of the others only what a loss or an order may need
    # weights 1 and 3: shares 1/4 and 3/4
    assert more.aspect_weights({"a": 1.0, "b": 3.0}).tolist() == [0.75, 0.25, 0.75]
    with pytest.raises(UserError, match="score is null in 1 rows, first: bb"):
        more.numbers("score", "a test")


def test_numbers_follow_the_pairs_that_fit(tokenizer: object) -> None:
    pairs = TrainingPairs.from_table(table(pair_id=["cc", "bb", "aa"]))
    scores = {"score": np.array([1.0, 2.0, 1.0])}
    everything = encode_pairs(pairs, Encoder(tokenizer, "auto", 8, "drop"), scores)  # type: ignore[arg-type]
    assert everything.response_tokens_N2.tolist() == [[2, 2], [2, 2], [3, 2]]
    shorter = encode_pairs(pairs, Encoder(tokenizer, "auto", 7, "drop"), scores)  # type: ignore[arg-type]
    assert shorter.columns["score"].tolist() == [1.0, 2.0]
    assert shorter.rows_N.tolist() == [0, 1]


def test_easy_to_hard_is_by_score_then_pair_id(tokenizer: object) -> None:
    pairs = TrainingPairs.from_table(table(pair_id=["cc", "bb", "aa"], score=[1.0, 2.0, 1.0]))
    corpus = preference(order="score").prepare(pairs, None, Encoder(tokenizer))  # type: ignore[arg-type]
    assert [corpus.draws.of_epoch(epoch).tolist() for epoch in (0, 1)] == [[1, 2, 0]] * 2  # bb; then aa before cc


def test_encoding_keeps_every_token_and_counts_what_is_too_long(tokenizer: object) -> None:
    pairs = TrainingPairs.from_table(table())
    encoded = encode_pairs(pairs, Encoder(tokenizer, "auto", 8, "drop"))
    # <bos> user w1 <eos> assistant | w4 <eos>; the third pair has one word more and 8 tokens still fit
    words = tokenizer.convert_ids_to_tokens  # type: ignore[attr-defined]
    assert [words(piece) for piece in encoded.pieces(2)] == [
        ["<bos>", "user", "w3", "<eos>", "assistant"],
        ["w6", "w7", "<eos>"],
        ["w1", "<eos>"],
    ]
    assert encoded.num_tokens_N.tolist() == [9, 9, 10]
    assert encoded.group(2).completion_tokens == encoded.pieces(2)[1:]
    shorter = encode_pairs(pairs, Encoder(tokenizer, "auto", 7, "drop"))
    assert shorter.pair_ids == ["aa", "bb"]
    assert shorter.dropped == {"too_long": 1}
    assert shorter.examples == {"too_long": "pair cc: a completion over max_length, behind 5 tokens of the prompt"}
    assert shorter.reference_logps_N2.tolist() == [[-1.0, -4.0], [-2.0, -5.0]]
    with pytest.raises(UserError, match="none of 3 pairs fits max_length"):
        encode_pairs(pairs, Encoder(tokenizer, "auto", 6, "drop"))
    with pytest.raises(UserError, match="it has no row"):
        encode_pairs(TrainingPairs.from_table(table().slice(0, 0)), Encoder(tokenizer))


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_a_truncated_pair_comes_back_as_it_was_encoded(tokenizer: object, truncation: str) -> None:
    # 5 prompt tokens; chosen has 3 and fits 8, rejected has 5 and loses 2: of its prompt on the left, or its own
    pairs = TrainingPairs.from_table(table(rejected=["w1 w2 w3 w4"] * 3, chosen=["w5 w6"] * 3))
    encoder = Encoder(tokenizer, "auto", 8, truncation)  # type: ignore[arg-type]
    encoded = encode_pairs(pairs, encoder)
    user, chosen, rejected = (
        [{"role": role, "content": content}]
        for role, content in [("user", "w3"), ("assistant", "w5 w6"), ("assistant", "w1 w2 w3 w4")]
    )
    expected = encoder.encode_group(user, [chosen, rejected])
    got = encoded.group(2)
    assert got.prompt_tokens == expected.prompt_tokens
    assert got.completion_tokens == expected.completion_tokens
    assert got.prompt_starts == expected.prompt_starts == ((0, 2) if truncation == "left" else ())
    assert encoded.num_truncated == 3
    assert encoded.dropped == {"too_long": 0}


# ----------------------------------------------------------------------------------------- of a reward model


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_tokens_lengths_and_what_is_dropped(tokenizer: Any) -> None:
    rows = [
        row(0, user("w1"), "w2 w3", "w4"),
        row(1, user("w5"), "w6", "w7 w8 w9"),
        row(2, user("w1"), "w2 w3 w4 w5 w6 w7 w8 w9", "w4"),
    ]
    # <bos> user w1 <eos> assistant | w2 w3 <eos>: 5 + 8 + 1 tokens of the third pair's chosen one do not fit 13
    table, encoder = TrainingPairs.from_table(pa.Table.from_pylist(rows)), Encoder(tokenizer, "auto", 13, "drop")
    pairs = encode_reward_pairs(table, encoder, bradley_terry().config)
    words = tokenizer.convert_ids_to_tokens
    assert [words(piece) for piece in pairs.pieces(1)] == [
        ["<bos>", "user", "w5", "<eos>", "assistant"],
        ["w6", "<eos>"],
        ["w7", "w8", "w9", "<eos>"],
    ]
    assert pairs.pair_ids == [f"{number:032x}" for number in (0, 1)]
    assert pairs.num_tokens_N.tolist() == [10, 11]
    assert pairs.columns["length_difference"].tolist() == [1.0, -2.0]
    assert pairs.dropped == {"too_long": 1, "template_error": 0}
    assert pairs.group(1).completion_tokens == pairs.pieces(1)[1:]
    by_letters = encode_reward_pairs(
        TrainingPairs.from_table(pa.Table.from_pylist(rows[:2])),
        Encoder(tokenizer, "auto", 12, "drop"),
        bradley_terry(length_unit="characters").config,
    )
    assert by_letters.columns["length_difference"].tolist() == [
        3.0,
        -6.0,
    ]  # "w2 w3" against "w4", "w6" against "w7 w8 w9"


def test_a_response_that_cannot_be_cut_off_is_counted_and_too_many_are_an_error(tokenizer: Any) -> None:
    # A template that hides the generation prompt from answers that begin with w9.
    template = tokenizer.chat_template.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if m['content'][:2] == 'w9' %}w8 {% endif %}"
    )
    table = pa.Table.from_pylist([row(n, user(f"w{n}"), "w1", "w9" if n == 1 else "w2") for n in range(4)])
    encoder = Encoder(tokenizer, template, 64, "drop")
    pairs = encode_pairs(TrainingPairs.from_table(table), encoder, strict=False)
    assert pairs.dropped == {"too_long": 0, "template_error": 1}
    assert pairs.pair_ids == [f"{number:032x}" for number in (0, 2, 3)]
    assert pairs.examples["template_error"].startswith(f"pair {1:032x}: template '{template[:37]}")
    bad = pa.Table.from_pylist([row(n, user(f"w{n}"), "w1", "w9" if n else "w2") for n in range(4)])
    with pytest.raises(UserError, match=r"3 of 4 pairs: template .* not a token prefix"):
        encode_pairs(TrainingPairs.from_table(bad), Encoder(tokenizer, template, 64, "drop"), strict=False)
    with pytest.raises(TemplateError, match="not a token prefix"):
        encode_pairs(TrainingPairs.from_table(table), encoder)


def test_pairs_of_the_same_tokens_are_dropped_and_the_others_stay_as_they_are(tokenizer: Any) -> None:
    same = [row(n, user(f"w{n}"), "w1", "w1 " if n in (0, 3) else "w2") for n in range(5)]
    table, encoder = pa.Table.from_pylist(same), Encoder(tokenizer, "auto", 64, "drop")
    pairs = encode_pairs(TrainingPairs.from_table(table), encoder)
    assert pairs.dropped == {"too_long": 0, "same_tokens": 2}
    assert pairs.rows_N.tolist() == [1, 2, 4]
    assert list(pairs.examples) == ["same_tokens"]
    assert pairs.examples["same_tokens"].startswith(f"pair {0:032x}: ")
    assert "w1" in pairs.examples["same_tokens"]
    alone = encode_pairs(TrainingPairs.from_table(table.take(pa.array([1, 2, 4]))), encoder)
    assert [pairs.pieces(n) for n in range(3)] == [alone.pieces(n) for n in range(3)]
    with pytest.raises(UserError, match="none of 2 pairs can be trained on under this template: 2 same_tokens"):
        encode_pairs(TrainingPairs.from_table(table.take(pa.array([0, 3]))), encoder)


def test_raw_and_hex_prompt_ids_are_the_same() -> None:
    table = reward_table(3)
    raw = [bytes.fromhex(value) for value in table["prompt_id"].to_pylist()]
    as_bytes = table.set_column(1, "prompt_id", pa.array(raw, pa.binary(16)))
    for given in (table, as_bytes):
        assert TrainingPairs.from_table(given).prompt_ids("a test") == raw


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, "aa" * 16, None], f"prompt_id is null in 2 rows, first: {0:032x}, {2:032x}"),
        (["xyz"] * 3, "prompt_id: got 'xyz'; valid: 32 hex digits"),
        (["aa"] * 3, "prompt_id: got 'aa'; valid: 32 hex digits, or 16 bytes"),
        ([7] * 3, "prompt_id: got 7; valid"),
    ],
)
def test_prompt_ids_that_are_none_are_refused_by_name(values: list[Any], message: str) -> None:
    table = reward_table(3).set_column(1, "prompt_id", pa.array(values))
    with pytest.raises(UserError, match=message):
        TrainingPairs.from_table(table).prompt_ids("a test")
