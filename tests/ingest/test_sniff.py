"""What is seen in the first rows: counted by hand on rows small enough to count."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from prefsel.errors import UserError
from prefsel.ingest import sniff as sniff_module
from prefsel.ingest.sniff import FieldUse, sniff


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_pairs_with_numbers(tmp_path: Path) -> None:
    row = {"prompt": "p1", "chosen": "long", "rejected": "no", "score_chosen": 2, "score_rejected": 1, "id": 7}
    rows = [
        row,
        row | {"id": 8},  # the same text: adds nothing
        row | {"chosen": "no", "rejected": "long", "score_chosen": 1, "score_rejected": 2},  # the other way round
        {"prompt": "p2", "chosen": "a", "rejected": "bcd", "aspect": "safety", "note": None},
        {"prompt": "p3", "chosen": "same", "rejected": "same"},
        "{broken",
    ]
    found = sniff(written(tmp_path / "a.jsonl", rows))
    assert (found.format, found.num_rows, found.is_all) == ("prompt_chosen_rejected", 6, True)
    assert found.reasons == {"identical_completions": 1, "not_json": 1}
    assert (found.num_duplicate, found.num_ties) == (1, 0)
    assert (found.num_prompts, found.num_completions, found.num_pairs) == (2, 4, 3)
    assert found.num_contradictions == 2
    assert found.aspects == {"safety": 1}
    assert found.numbers == {"score": 2}
    # Chosen: 4, 2 and 1 characters; rejected: 2, 4 and 3.
    assert found.characters == {"prompt": (2, 2, 2), "chosen": (2, 4, 4), "rejected": (3, 4, 4)}
    assert found.longer_share == pytest.approx(1 / 3)
    assert found.fields == [
        FieldUse("prompt", 5, 5, "read"),
        FieldUse("chosen", 5, 5, "read"),
        FieldUse("rejected", 5, 5, "read"),
        FieldUse("score_chosen", 3, 5, "number"),
        FieldUse("score_rejected", 3, 5, "number"),
        FieldUse("id", 3, 5, "ignored"),
        FieldUse("aspect", 1, 5, "read"),
        FieldUse("note", 0, 5, "ignored"),
    ]


def test_fields_inside_lists(tmp_path: Path) -> None:
    """Ratings are read by aspect; the model's name and the critique are not."""

    def completion(text: str, help: int, style: int | None) -> dict[str, Any]:
        ratings = {"help": {"Rating": help}} | ({"style": {"Rating": style}} if style is not None else {})
        return {"response": text, "annotations": ratings, "model": "m", "critique": "…", "overall_score": help}

    rows = [
        {"instruction": "p1", "completions": [completion("a", 1, 2), completion("b", 2, 1)], "source": "x"},
        {"instruction": "p2", "completions": [completion("a", 1, None), completion("b", 2, 3)]},
    ]
    found = sniff(written(tmp_path / "a.jsonl", rows))
    assert found.format == "ultrafeedback"
    assert found.numbers.keys() >= {"help", "overall"}
    assert found.numbers["overall"] == found.num_pairs == 2
    uses = {field.name: (field.present, field.of, field.use) for field in found.fields}
    assert uses["completions[].response"] == (4, 4, "read")
    assert uses["completions[].annotations"] == (4, 4, "read")
    assert uses["completions[].critique"] == (4, 4, "ignored")
    assert uses["source"] == (1, 2, "ignored")


def test_only_the_first_rows_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sniff_module, "MAX_ROWS", 3)
    rows = [{"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(4)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
    found = sniff(str(tmp_path / "a.jsonl.gz"))
    assert (found.num_rows, found.is_all, found.num_pairs) == (3, False, 3)
    whole = sniff(written(tmp_path / "b.jsonl", rows[:3]))
    assert (whole.num_rows, whole.is_all) == (3, True)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no row in 1 file"),
        ([{"text": "only text"}], r"cannot tell from the fields text \(str\)"),
    ],
)
def test_what_cannot_be_looked_at(tmp_path: Path, rows: list[Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        sniff(written(tmp_path / "a.jsonl", rows))


def test_rows_that_are_all_bad_have_no_format(tmp_path: Path) -> None:
    found = sniff(written(tmp_path / "a.json", ["nope", '"text"', "3"]))
    assert (found.format, found.num_pairs, found.fields) == ("unknown", 0, [])
    assert sum(found.reasons.values()) == 3
