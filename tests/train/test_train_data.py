from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefsel.errors import NonFiniteError, UserError
from prefsel.models.chat import Encoder
from prefsel.train.data import (
    TrainingPairs,
    encode_pairs,
    epoch_order,
    global_batch,
    micro_batches,
    num_steps,
    rank_share,
)


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


def test_scores_sort_pairs_and_follow_those_that_fit(tokenizer: object) -> None:
    pairs = TrainingPairs.from_table(table(pair_id=["cc", "bb", "aa"]))
    scores = {"score": np.array([1.0, 2.0, 1.0])}
    everything = encode_pairs(pairs, Encoder(tokenizer, "auto", 8, "drop"), scores)  # type: ignore[arg-type]
    assert everything.by_score_N.tolist() == [1, 2, 0]  # bb; then aa before cc
    assert everything.response_tokens_N2.tolist() == [[2, 2], [2, 2], [3, 2]]
    shorter = encode_pairs(pairs, Encoder(tokenizer, "auto", 7, "drop"), scores)  # type: ignore[arg-type]
    assert shorter.columns["score"].tolist() == [1.0, 2.0]
    assert shorter.by_score_N.tolist() == [1, 0]


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
    assert shorter.reference_logps_N2.tolist() == [[-1.0, -4.0], [-2.0, -5.0]]
    with pytest.raises(UserError, match="none of 3 pairs fits max_length"):
        encode_pairs(pairs, Encoder(tokenizer, "auto", 6, "drop"))


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


# ------------------------------------------------------------------------------------------------------- order


def test_every_epoch_visits_every_pair_once_and_batches_never_span_two() -> None:
    # 10 pairs in batches of 4: 4 + 4 + 2 per epoch
    consumed, sizes, seen = 0, [], []
    for _ in range(6):
        batch = global_batch(consumed, 10, global_batch_pairs=4, seed=3, order="shuffled")
        consumed += len(batch)
        sizes.append(len(batch))
        seen.append(batch)
    assert sizes == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert global_batch(4, 10, global_batch_pairs=4, seed=3, order="given").tolist() == [4, 5, 6, 7]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    orders = {(seed, epoch): tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    epoch_order.cache_clear()
    assert tuple(epoch_order(50, seed=1, epoch=1)) == orders[1, 1]


def test_number_of_steps() -> None:
    assert num_steps(10, global_batch_pairs=4, num_epochs=2, max_steps=None) == 6
    assert num_steps(10, global_batch_pairs=4, num_epochs=2, max_steps=11) == 11


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_pairs", [1, 2, 7, 16])
def test_shares_partition_the_batch_and_level_the_tokens(world_size: int, num_pairs: int) -> None:
    rng = np.random.default_rng(num_pairs)
    batch = rng.permutation(100)[:num_pairs]
    lengths = rng.integers(5, 50, size=num_pairs)
    length_of = dict(zip(batch.tolist(), lengths.tolist()))
    shares = [rank_share(batch, lengths, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
    tokens = [sum(length_of[pair] for pair in share.tolist()) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_micro_batches_keep_both_limits_and_every_pair() -> None:
    share, lengths = np.arange(7), np.array([90, 40, 40, 30, 10, 10, 10])
    by_tokens = micro_batches(share, lengths, micro_batch_pairs=10, token_budget=80)
    assert [run.tolist() for run in by_tokens] == [[0], [1, 2], [3, 4, 5, 6]]  # pair 0 is over the budget and alone
    by_pairs = micro_batches(share, lengths, micro_batch_pairs=3, token_budget=10_000)
    assert [run.tolist() for run in by_pairs] == [[0, 1, 2], [3, 4, 5], [6]]
    assert micro_batches(share[:0], lengths[:0], micro_batch_pairs=3, token_budget=10) == []
