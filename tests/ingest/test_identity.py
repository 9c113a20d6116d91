import hashlib
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.errors import UserError
from prefsel.ingest.identity import (
    TRAIN,
    VALIDATION,
    canonical,
    completion_id,
    file_digest,
    fold_of,
    pair_id,
    prompt_id,
    split_of,
)
from prefsel.schema import ID

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=4)


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def test_canonical_bytes_are_compact_json_of_role_and_content():
    messages = [{"role": "user", "content": 'é "x"\n'}, {"role": "assistant", "content": "ok"}]
    assert canonical(messages) == '[["user","é \\"x\\"\\n"],["assistant","ok"]]'.encode()


@given(MESSAGES, MESSAGES)
def test_ids_are_blake2b_of_what_the_contract_says(prompt, completion):
    as_json = [
        json.dumps([[m["role"], m["content"]] for m in part], ensure_ascii=False, separators=(",", ":")).encode()
        for part in (prompt, completion)
    ]
    expected_prompt = blake(as_json[0])
    expected_completion = blake(expected_prompt + as_json[1])
    assert prompt_id(prompt) == expected_prompt
    assert completion_id(expected_prompt, completion) == expected_completion


def test_pair_id_covers_order_and_aspect():
    prompt, a, b = blake(b"p"), blake(b"a"), blake(b"b")
    assert pair_id(prompt, a, b, "honesty") == blake(prompt + a + b + b"honesty")
    assert pair_id(prompt, a, b, None) == blake(prompt + a + b)
    assert len({pair_id(prompt, x, y, z) for x, y in ((a, b), (b, a)) for z in (None, "honesty", "truth")}) == 6


@given(MESSAGES, MESSAGES)
def test_different_messages_have_different_ids(one, other):
    assert (prompt_id(one) == prompt_id(other)) == (one == other)


def test_a_message_boundary_is_part_of_the_id():
    whole = [{"role": "user", "content": 'a"],["user","b'}]
    parts = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert prompt_id(whole) != prompt_id(parts)


def test_file_digest_is_blake2b_of_the_stored_bytes(tmp_path):
    data = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    assert file_digest(str(tmp_path / "a.jsonl.gz")) == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert file_digest(f"file://{tmp_path}/a.jsonl.gz") == file_digest(str(tmp_path / "a.jsonl.gz"))


def test_file_digest_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        file_digest(str(tmp_path / "gone.jsonl"))


IDS = [blake(str(n).encode()) for n in range(20_000)]


def test_split_is_the_hash_of_each_id_against_the_fractions():
    codes = split_of(IDS[:300], holdout="0.2", proxy=Decimal("0.3"), salt="s")
    for one, code in zip(IDS, codes):
        u = int.from_bytes(hashlib.blake2b(b"s" + one, digest_size=8).digest(), "big") / 2**64
        assert code == (1 if u < 0.2 else 2 if u < 0.5 else 0)
    assert codes.dtype == np.uint8


def test_split_shares_are_near_the_fractions_and_stay_when_order_or_container_changes():
    codes = split_of(IDS, holdout=0.1, proxy=0.25)
    shares = np.bincount(codes, minlength=3) / len(IDS)
    # Four standard errors at N = 20 000 are 0.013.
    np.testing.assert_allclose(shares, [0.65, 0.1, 0.25], atol=0.013)
    np.testing.assert_array_equal(split_of(IDS[::-1], holdout=0.1, proxy=0.25), codes[::-1])
    np.testing.assert_array_equal(split_of(pa.array(IDS, ID), holdout=0.1, proxy=0.25), codes)
    assert (split_of(IDS, holdout=0.1, proxy=0.25, salt="other") != codes).mean() > 0.3


def test_split_extremes():
    assert set(split_of(IDS[:500], holdout=1, proxy=0)) == {1}
    assert set(split_of(IDS[:500], holdout=0, proxy=1.0)) == {2}
    assert set(split_of(IDS[:500], holdout=0, proxy=0)) == {0}
    assert len(split_of([], holdout=0.5, proxy=0)) == 0


@pytest.mark.parametrize(("holdout", "proxy"), [(-0.1, 0), (0, 1.1), ("0.6", "0.5")])
def test_split_refuses_what_is_no_fraction(holdout, proxy):
    with pytest.raises(UserError, match=r"holdout|proxy"):
        split_of(IDS[:1], holdout=holdout, proxy=proxy)


def test_validation_is_a_part_beside_the_others_and_moves_none_of_them() -> None:
    ids = [blake(str(n).encode()) for n in range(20_000)]
    before = split_of(ids, holdout=0.1, proxy=0.2)
    after = split_of(ids, holdout=0.1, proxy=0.2, validation=0.3)
    assert ((before == after) | (after == VALIDATION)).all()
    assert (before[after == VALIDATION] == TRAIN).all()
    assert abs((after == VALIDATION).mean() - 0.3) < 0.02


def test_folds_are_even_and_follow_from_the_id_and_the_seed_alone() -> None:
    ids = [blake(str(n).encode()) for n in range(9_000)]
    folds = fold_of(ids, folds=3, seed=0)
    assert (abs(np.bincount(folds) / 3_000 - 1) < 0.05).all()
    assert (fold_of(ids[::-1], folds=3, seed=0)[::-1] == folds).all()
    other = fold_of(pa.array(ids, pa.binary(16)), folds=3, seed=1)
    assert 0.3 < (other == folds).mean() < 0.37
