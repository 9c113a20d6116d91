"""Fields that go along with pairs: how they become text, and that a source without any is read as before."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from prefsel.config import FormatOptions, Source
from prefsel.ingest.carried import carried_fields
from prefsel.ingest.row_error import RowError
from prefsel.ingest.rows import RawRow
from prefsel.ingest.windows import Window, ingest_windows
from prefsel.schema import CARRIED, PAIRS


def window(
    values: list[dict[str, Any]], *, carry: tuple[str, ...] = (), format: str = "prompt_chosen_rejected"
) -> Window:
    rows = [RawRow(number, None, json.dumps(value).encode(), value) for number, value in enumerate(values)]
    (found,) = ingest_windows(
        iter(rows), file="f", format=format, options=FormatOptions(), rows_per_shard=100, carry=carry
    )
    return found


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **more}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("ann", "ann"),
        (" ann ", " ann "),
        (3, "3"),
        (3.0, "3"),
        (0.25, "0.25"),
        (Decimal("2.50"), "2.50"),
        (Decimal("2.00"), "2"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
    ],
)
def test_text_of_a_field(value: Any, text: str) -> None:
    assert carried_fields({"a": value}, ["a"]) == (("a", text),)
    assert carried_fields({"m": {"a": value}}, ["m.a"]) == (("m.a", text),)


@pytest.mark.parametrize("value", [None, "", "  ", "None", float("nan"), [], {}])
def test_nothing_is_carried_of_an_empty_field(value: Any) -> None:
    assert carried_fields({"a": value}, ["a", "b", "a.b"]) == ()


@pytest.mark.parametrize("value", [["x"], {"x": 1}])
def test_what_has_no_name_refuses_the_row(value: Any) -> None:
    with pytest.raises(RowError, match=r"wrong_type: a: got (list|dict); valid: text, a number or a truth value"):
        carried_fields({"a": value}, ["a"])


def test_pairs_carry_the_fields_of_their_row() -> None:
    rows = [pair(0, annotator="ann", meta={"task": 7}), pair(1, annotator=None), pair(2, meta={"task": "x"})]
    found = window(rows, carry=("annotator", "meta.task"))
    assert [dict(one) for one in found.pairs[CARRIED].to_pylist()] == [
        {"annotator": "ann", "meta.task": "7"},
        {},
        {"meta.task": "x"},
    ]
    assert found.fields["annotator"] == {"kept": 1}
    assert found.fields["meta"] == {"kept": 2}
    assert window(rows).fields["annotator"] == {"ignored": 1}
    refused = window([pair(0, annotator=["a", "b"]), pair(1)], carry=("annotator",))
    assert refused.reasons == {"wrong_type": 1}
    assert refused.pairs.num_rows == 1


def test_the_first_row_of_a_pair_counts() -> None:
    found = window([pair(0, annotator="ann"), pair(0, annotator="bob")], carry=("annotator",))
    assert [dict(one) for one in found.pairs[CARRIED].to_pylist()] == [{"annotator": "ann"}]
    assert found.num_duplicate == 1


def test_all_pairs_of_a_row_carry_its_fields() -> None:
    completions = [
        {"response": text, "annotations": {"help": {"Rating": rating}}}
        for text, rating in (("a", "1"), ("b", "2"), ("c", "4"))
    ]
    ranked = window(
        [{"instruction": "p", "completions": completions, "task": "chat"}], carry=("task",), format="ultrafeedback"
    )
    assert [dict(one) for one in ranked.pairs[CARRIED].to_pylist()] == [{"task": "chat"}] * 3
    single = [
        {"prompt": "p", "completion": text, "label": label, "annotator": who}
        for text, label, who in (("a", True, "ann"), ("b", False, "bob"))
    ]
    found = window(single, carry=("annotator",), format="unpaired")
    assert [dict(one) for one in found.pairs[CARRIED].to_pylist()] == [
        {"annotator": "ann"}
    ]  # of the prompt's first row


def test_a_source_without_carried_fields_is_read_as_before() -> None:
    rows = [pair(0, annotator="ann"), pair(1, annotator="bob")]
    plain, carried = window(rows), window(rows, carry=("annotator",))
    assert plain.pairs.schema == PAIRS
    assert plain.digest == window(rows, carry=()).digest != carried.digest
    assert carried.digest != window(rows, carry=("task",)).digest
    assert carried.pairs.drop_columns(CARRIED).equals(plain.pairs)
    assert carried.groups.equals(plain.groups)
    assert "carry" not in Source(name="s", paths=["p"]).model_dump()
    assert Source(name="s", paths=["p"], carry=["a"]).model_dump()["carry"] == ["a"]


@pytest.mark.parametrize(
    "name", ["source", "chosen", "score", "flipped", "length_bin", "rm_a", "x_chosen", "num_tokens_p"]
)
def test_names_of_other_columns_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"carry: got {name!r}, as a column of pairs is called already"):
        Source(name="s", paths=["p"], carry=[name])
    with pytest.raises(ValueError, match="carry: names must differ: got a, a"):
        Source(name="s", paths=["p"], carry=["a", "a"])
