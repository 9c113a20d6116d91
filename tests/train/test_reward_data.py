from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from tiny_rewards import reward_table, row

from prefsel.errors import UserError
from prefsel.models.chat import Encoder
from prefsel.train.reward_config import RewardConfig
from prefsel.train.reward_data import check_table, encode_reward_pairs, epoch_draws, next_draws, plan_sampling


def config(**options: Any) -> RewardConfig:
    return RewardConfig.model_validate({"learning_rate": 1e-3, "max_length": 64, "dtype": "fp32", **options})


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


# ------------------------------------------------------------------------------------------------ table → tokens


def test_tokens_lengths_and_what_is_dropped(tokenizer: Any) -> None:
    rows = [
        row(0, user("w1"), "w2 w3", "w4"),
        row(1, user("w5"), "w6", "w7 w8 w9"),
        row(2, user("w1"), "w2 w3 w4 w5 w6 w7 w8 w9", "w4"),
    ]
    # <bos> user w1 <eos> assistant | w2 w3 <eos>: 5 + 8 + 1 tokens of the third pair's chosen one do not fit 13
    pairs = encode_reward_pairs(pa.Table.from_pylist(rows), Encoder(tokenizer, "auto", 13, "drop"), config(holdout=0.0))
    words = tokenizer.convert_ids_to_tokens
    assert [words(piece) for piece in pairs.pieces(1)] == [
        ["<bos>", "user", "w5", "<eos>", "assistant"],
        ["w6", "<eos>"],
        ["w7", "w8", "w9", "<eos>"],
    ]
    assert pairs.pair_ids == [f"{number:032x}" for number in (0, 1)]
    assert pairs.num_tokens_N.tolist() == [10, 11]
    assert pairs.length_difference_N.tolist() == [1.0, -2.0]
    assert pairs.dropped == {"too_long": 1, "template_error": 0}
    assert pairs.group(1).completion_tokens == pairs.pieces(1)[1:]
    by_letters = encode_reward_pairs(
        pa.Table.from_pylist(rows[:2]),
        Encoder(tokenizer, "auto", 12, "drop"),
        config(length_unit="characters", holdout=0.0),
    )
    assert by_letters.length_difference_N.tolist() == [3.0, -6.0]  # "w2 w3" against "w4", "w6" against "w7 w8 w9"


def test_a_response_that_cannot_be_cut_off_is_counted_and_too_many_are_an_error(tokenizer: Any) -> None:
    # A template that hides the generation prompt from answers that begin with w9.
    template = tokenizer.chat_template.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if m['content'][:2] == 'w9' %}w8 {% endif %}"
    )
    table = pa.Table.from_pylist([row(n, user(f"w{n}"), "w1", "w9" if n == 1 else "w2") for n in range(4)])
    pairs = encode_reward_pairs(table, Encoder(tokenizer, template, 64, "drop"), config(holdout=0.0))
    assert pairs.dropped == {"too_long": 0, "template_error": 1}
    assert pairs.pair_ids == [f"{number:032x}" for number in (0, 2, 3)]
    bad = pa.Table.from_pylist([row(n, user(f"w{n}"), "w1", "w9" if n else "w2") for n in range(4)])
    with pytest.raises(UserError, match=r"3 of 4 pairs: template .* not a token prefix"):
        encode_reward_pairs(bad, Encoder(tokenizer, template, 64, "drop"), config())


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6])
def test_prompts_are_held_out_by_their_hash(tokenizer: Any, fraction: float) -> None:
    table = reward_table(200)
    pairs = encode_reward_pairs(table, Encoder(tokenizer, "auto", 64, "drop"), config(holdout=fraction))
    hashes = [hashlib.blake2b(b"reward-holdout" + prompt, digest_size=8).digest() for prompt in pairs.prompt_ids]
    expected = [int.from_bytes(digest, "big") / 2**64 < fraction for digest in hashes]
    assert pairs.is_held_out_N.tolist() == expected
    assert [prompt.hex() for prompt in pairs.prompt_ids] == table["prompt_id"].to_pylist()
    assert sum(expected) == pytest.approx(200 * fraction, abs=25)


def test_raw_and_hex_ids_are_the_same() -> None:
    table = reward_table(3)
    raw = table
    for position, name in enumerate(("pair_id", "prompt_id")):
        values = [bytes.fromhex(value) for value in table[name].to_pylist()]
        raw = raw.set_column(position, name, pa.array(values, pa.binary(16)))
    assert check_table(raw).equals(check_table(table))


def test_a_table_that_cannot_be_trained_on_is_refused_by_name(tokenizer: Any) -> None:
    table, encoder = reward_table(3), Encoder(tokenizer, "auto", 64, "drop")
    with pytest.raises(UserError, match=r"missing columns \['prompt_id'\]"):
        encode_reward_pairs(table.drop_columns(["prompt_id"]), encoder, config())
    with pytest.raises(UserError, match="it has no row"):
        encode_reward_pairs(table.slice(0, 0), encoder, config())
    nulls = table.set_column(1, "prompt_id", pa.array([None, "aa", None], pa.string()))
    with pytest.raises(UserError, match=r"prompt_id is null in 2 rows, first: \[0, 2\]"):
        encode_reward_pairs(nulls, encoder, config())
    with pytest.raises(UserError, match="pair_id: got 'xyz'; valid: 32 hex digits"):
        encode_reward_pairs(table.set_column(0, "pair_id", pa.array(["xyz"] * 3)), encoder, config())
    with pytest.raises(UserError, match=r"pair_id occurs twice, first: \['a"):
        encode_reward_pairs(table.set_column(0, "pair_id", pa.array(["a" * 32] * 3)), encoder, config())
    with pytest.raises(UserError, match="none of 3 pairs fits max_length"):
        encode_reward_pairs(table, Encoder(tokenizer, "auto", 3, "drop"), config())
    with pytest.raises(UserError, match=r"holdout: got 0\.999, which leaves none of 3 pairs"):
        encode_reward_pairs(table, encoder, config(holdout=0.999))


# -------------------------------------------------------------------------------------------------------- draws


# 40 pairs, 10 held out; of the other 30 the chosen completion is at least as long in 24 (three of them ties).
MEMBERS = np.arange(10, 40)
DIFFERENCE = np.array([5.0] * 10 + [2.0] * 21 + [0.0] * 3 + [-1.0] * 6)


def epochs(tau: float | None, number: int, seed: int = 0) -> list[list[int]]:
    sampling = plan_sampling(MEMBERS, DIFFERENCE, tau)
    return [epoch_draws(sampling, epoch, seed=seed, order="shuffled").tolist() for epoch in range(number)]


@pytest.mark.parametrize(
    ("tau", "num_longer"),
    [
        (1e9, 15),  # one half
        (1.0, 19),  # 1 / (1 + e^-0.6) = 0.6457, of 30: 19.37
        (0.5, 23),  # 1 / (1 + e^-1.2) = 0.7685, of 30: 23.06
        (0.1, 30),  # 1 / (1 + e^-6) = 0.9975, of 30: 29.93
        (None, 24),
    ],
)
def test_draws_have_exactly_the_balanced_frequency(tau: float | None, num_longer: int) -> None:
    for draws in epochs(tau, 3):
        assert len(draws) == 30
        assert set(draws) <= set(MEMBERS.tolist())
        assert sum(DIFFERENCE[draws] >= 0) == num_longer


@pytest.mark.parametrize("tau", [1e9, 1.0, None])
def test_no_pair_of_a_side_is_drawn_more_than_once_more_often_than_another(tau: float | None) -> None:
    seen: Counter[int] = Counter()
    for draws in epochs(tau, 7):
        seen.update(draws)
        for side in (DIFFERENCE[MEMBERS] >= 0, DIFFERENCE[MEMBERS] < 0):
            counts = [seen[index] for index in MEMBERS[side].tolist()]
            assert max(counts) - min(counts) <= 1


def test_draws_depend_on_seed_and_epoch_alone_and_are_mixed() -> None:
    orders = [tuple(draws) for seed in (0, 1) for draws in epochs(1.0, 2, seed)]
    assert len(set(orders)) == 4
    assert tuple(epochs(1.0, 2, 1)[1]) == orders[3]
    # Both sides in both halves of an epoch: 11 of 30 draws are of the shorter side.
    is_shorter = DIFFERENCE[list(orders[0])] < 0
    assert 1 <= is_shorter[:15].sum() <= 10


def test_batches_are_slices_of_the_epochs() -> None:
    sampling, options = plan_sampling(MEMBERS, DIFFERENCE, 1.0), config(global_batch_pairs=8)
    consumed, batches = 0, []
    for _ in range(8):  # 8 + 8 + 8 + 6 per epoch
        batches.append(next_draws(sampling, options, consumed).tolist())
        consumed += len(batches[-1])
    assert [len(batch) for batch in batches] == [8, 8, 8, 6] * 2
    assert [np.concatenate(batches[:4]).tolist(), np.concatenate(batches[4:]).tolist()] == epochs(1.0, 2)


def test_warnings() -> None:
    assert plan_sampling(MEMBERS, DIFFERENCE, 0.5).facts["warnings"] == []
    low = plan_sampling(MEMBERS, DIFFERENCE, 0.4).facts
    assert low["longer_chosen_share"] == 0.8
    assert low["longer_chosen_frequency"] == pytest.approx(25 / 30)  # 1 / (1 + e^-1.5) = 0.8176, of 30: 24.5
    assert "0.4 is below 0.5" in low["warnings"][0]
    assert "0.800 of the pairs and in 0.818 of the draws" in low["warnings"][0]
    for difference, side in ((np.abs(DIFFERENCE), "shorter"), (-1 - np.abs(DIFFERENCE), "at least as long")):
        one_sided = plan_sampling(MEMBERS, difference, 1.0)
        assert one_sided.facts["warnings"] == [
            f"length_balance_tau: no chosen completion is {side}, so pairs are drawn as they come"
        ]
        assert sorted(epoch_draws(one_sided, 0, seed=0, order="shuffled")) == MEMBERS.tolist()


def test_the_given_order_is_kept_and_cannot_be_balanced() -> None:
    sampling = plan_sampling(MEMBERS, DIFFERENCE, None)
    assert epoch_draws(sampling, 3, seed=0, order="given").tolist() == MEMBERS.tolist()
    assert config(order="given", length_balance_tau=None).order == "given"
    with pytest.raises(ValidationError, match="set length_balance_tau: null"):
        config(order="given")
