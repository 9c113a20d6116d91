"""Length difference by hand."""

from __future__ import annotations

import pytest
from pair_tables import sided

from prefsel.errors import UserError
from prefsel.metrics import score_table
from prefsel.select import select_table

TABLE = sided(num_tokens=[(30, 10), (10, 30), (20, 20), (150, 50), (151, 50), (None, 5)])


def test_signed_absolute_and_turned_around() -> None:
    assert score_table(TABLE, "length_difference")[:5].tolist() == [20, -20, 0, 100, 101]
    assert score_table(TABLE, "length_difference", absolute=True)[:5].tolist() == [20, 20, 0, 100, 101]
    similar = score_table(TABLE, "length_difference", absolute=True, order="smallest")
    assert similar[:5].tolist() == [-20, -20, 0, -100, -101]
    assert str(similar[5]) == "nan"  # a length that is unknown is no length of 0


def test_pairs_of_similar_length_can_be_kept() -> None:
    """Delta learning's limit: differences of at most 100 tokens, the 100 itself kept."""
    similar = score_table(TABLE, "length_difference", absolute=True, order="smallest")
    table = {"pair_id": list(range(6)), "score": similar}
    assert select_table(table, {"kind": "threshold", "score": "score", "low": -100}).tolist() == [0, 1, 2, 3]
    assert select_table(table, {"kind": "top", "score": "score", "count": 2}).tolist() == [0, 2]


def test_lengths_of_one_model() -> None:
    table = sided(num_tokens_p=[(7, 3)], num_tokens=[(1, 1)])
    assert score_table(table, "length_difference", length="num_tokens_p").tolist() == [4]
    with pytest.raises(UserError, match="missing columns words_chosen, words_rejected"):
        score_table(table, "length_difference", length="words")
