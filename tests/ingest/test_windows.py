"""Windows: every row accounted for, equal things stored once, names that depend on content alone."""

import json
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.config import FormatOptions
from prefsel.errors import UserError
from prefsel.ingest.identity import completion_id, pair_id, prompt_id
from prefsel.ingest.readers import BadRow, RawRow, read_rows
from prefsel.ingest.windows import ingest_windows
from prefsel.reasons import QUARANTINE as QUARANTINE_REASONS
from prefsel.schema import GROUPS, PAIRS, QUARANTINE

ASPECTS = FormatOptions(aspects="all")


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def raw_rows(values):
    for number, value in enumerate(values):
        if isinstance(value, dict):
            yield RawRow(number, None, json.dumps(value).encode(), value)
        else:
            yield BadRow(number, None, value, "not_json", "no")


def windows(values, rows_per_shard=100, format="auto", options=ASPECTS, **more):
    rows = raw_rows(values)
    found = list(
        ingest_windows(rows, file="f.jsonl", format=format, options=options, rows_per_shard=rows_per_shard, **more)
    )
    for window in found:
        check(window)
    return found


def one_window(values, **more):
    (window,) = windows(values, **more)
    return window


def check(window):
    """What holds for every window."""
    for table, schema in ((window.groups, GROUPS), (window.pairs, PAIRS), (window.quarantine, QUARANTINE)):
        table.validate(full=True)
        assert table.schema.equals(schema)
    assert window.num_rows == window.num_accepted + window.num_quarantined + window.num_duplicate
    assert window.num_quarantined == window.quarantine.num_rows == sum(window.reasons.values())
    assert window.reasons.keys() <= QUARANTINE_REASONS.keys()
    groups = {group["prompt_id"]: group for group in window.groups.to_pylist()}
    assert len(groups) == window.groups.num_rows
    for key, group in groups.items():
        ids = [completion["completion_id"] for completion in group["completions"]]
        assert key == prompt_id(group["prompt"])
        assert ids == [completion_id(key, completion["messages"]) for completion in group["completions"]]
        assert len(set(ids)) == len(ids)
    rows = window.pairs.to_pylist()
    assert len({row["pair_id"] for row in rows}) == len(rows)
    for row in rows:
        ids = [completion["completion_id"] for completion in groups[row["prompt_id"]]["completions"]]
        chosen, rejected = ids[row["chosen"]], ids[row["rejected"]]
        assert row["pair_id"] == pair_id(row["prompt_id"], chosen, rejected, row["aspect"])
        assert row["mirror_id"] == pair_id(row["prompt_id"], rejected, chosen, row["aspect"])


def counts(window):
    return window.num_rows, window.num_accepted, window.num_quarantined, window.num_duplicate


def texts(window):
    """prompt → completion texts."""
    return {
        group["prompt"][0]["content"]: [one["messages"][0]["content"] for one in group["completions"]]
        for group in window.groups.to_pylist()
    }


def test_equal_prompts_are_one_group_and_equal_completions_one_entry():
    window = one_window([pair("p", "a", "b"), pair("q", "a", "b"), pair("p", "c", "a"), pair("p", "a", "b")])
    assert counts(window) == (4, 3, 0, 1)
    assert texts(window) == {"p": ["a", "b", "c"], "q": ["a", "b"]}
    assert [(row["chosen"], row["rejected"]) for row in window.pairs.to_pylist()] == [(0, 1), (0, 1), (2, 0)]
    assert window.groups["provenance"].to_pylist() == [{"row": 0}, {"row": 1}]
    assert [row["row"] for row in window.pairs["provenance"].to_pylist()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("second", "is_accepted"),
    [
        (pair("p", "a", "b", aspect="x"), False),
        (pair("p", "b", "a", aspect="x"), True),  # the mirror is another pair
        (pair("p", "a", "b", aspect="y"), True),
        (pair("p", "a", "b"), True),
        (pair("p", "a", "c", aspect="x"), True),
        (pair("q", "a", "b", aspect="x"), True),
        (pair("p", "a", "b", aspect="x", score_chosen=2), True),  # a new rating
        (pair("p", "a", "b", aspect="x", score_chosen=1), True),
        (pair("p", "a", "b", aspect="x", note="other"), False),
    ],
)
def test_a_row_is_a_duplicate_only_if_it_adds_nothing(second, is_accepted):
    window = one_window([pair("p", "a", "b", aspect="x"), second])
    assert counts(window) == (2, 1 + is_accepted, 0, 1 - is_accepted)


def test_ratings_merge_and_the_first_value_wins():
    first = pair("p", "a", "b", score_chosen=5, score_rejected=1)
    second = pair("p", "a", "b", score_chosen=4, score_rejected=1, style_chosen=2)
    window = one_window([first, second, first])
    assert counts(window) == (3, 2, 0, 1)
    assert window.num_rating_conflicts == 1
    (group,) = window.groups.to_pylist()
    assert [dict(one["ratings"]) for one in group["completions"]] == [{"score": 5.0, "style": 2.0}, {"score": 1.0}]
    assert window.pairs["label_margin"].to_pylist() == [4.0]


def test_mirrors_point_at_each_other():
    first, second = one_window([pair("p", "a", "b"), pair("p", "b", "a")]).pairs.to_pylist()
    assert (first["mirror_id"], second["mirror_id"]) == (second["pair_id"], first["pair_id"])


def test_quarantined_rows_keep_bytes_reason_and_place():
    values = [pair("p", "a", "b"), b"{broken", pair("p", "a", "a"), {"prompt": "p", "note": 1}, pair("p", "", "b")]
    window = one_window(values)
    assert counts(window) == (5, 1, 4, 0)
    assert window.reasons == {"not_json": 1, "identical_completions": 1, "missing_field": 1, "empty_completion": 1}
    rows = window.quarantine.to_pylist()
    assert [row["row"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["raw"] == b"{broken"
    assert json.loads(rows[1]["raw"]) == values[2]
    assert "note" in rows[2]["detail"]
    assert {row["file"] for row in rows} == {"f.jsonl"}


def test_a_detail_that_is_no_utf8_is_escaped():
    bad = BadRow(0, None, b"", "truncated_arrow", "column \udcff")
    (window,) = ingest_windows(iter([bad]), file="f", format="auto", options=ASPECTS, rows_per_shard=1)
    assert window.quarantine["detail"].to_pylist() == [r"column \udcff"]


def test_ties_of_accepted_rows_are_counted_once():
    row = {"question": "q", "completions": ["a", "b", "c"], "preference": [0, 1, 0]}
    window = one_window([row, row])
    assert (window.num_ties, window.num_duplicate) == (2, 1)
    tied = {"question": "r", "completions": ["a", "b"], "preference": [0]}
    window = one_window([tied])
    assert (counts(window), window.num_ties, window.pairs.num_rows, window.groups.num_rows) == ((1, 1, 0, 0), 1, 0, 1)


def test_a_file_without_rows_is_one_empty_window():
    for format in ("auto", None, "ranked"):
        window = one_window([], format=format)
        assert counts(window) == (0, 0, 0, 0)
        assert window.groups.num_rows == window.pairs.num_rows == window.quarantine.num_rows == 0


VALUES = [pair(f"p{n % 7}", f"a{n}", f"b{n}") for n in range(10)]


def test_windows_are_full_but_the_last():
    assert [window.num_rows for window in windows(VALUES, rows_per_shard=4)] == [4, 4, 2]
    assert [window.num_rows for window in windows(VALUES, rows_per_shard=5)] == [5, 5]


def test_a_window_of_large_rows_ends_early(monkeypatch):
    monkeypatch.setattr("prefsel.ingest.windows.WINDOW_BYTES", 1000)
    large = [pair("p", "a" * 600, f"b{n}") for n in range(5)]
    assert [window.num_rows for window in windows(large)] == [2, 2, 1]
    assert [window.num_rows for window in windows([b"x" * 600] * 5)] == [2, 2, 1]


def test_appending_leaves_the_names_of_full_windows():
    before = [window.digest for window in windows(VALUES, rows_per_shard=4)]
    after = [window.digest for window in windows([*VALUES, *VALUES[:3]], rows_per_shard=4)]
    assert (after[:2], len(after)) == (before[:2], 4)
    assert after[2] != before[2]


@pytest.mark.parametrize(
    "other",
    [
        {"values": VALUES[::-1]},
        {"values": VALUES[:-1]},
        {"values": [*VALUES[:-1], pair("p", "a", "other")]},
        {"values": [*VALUES[:-1], json.dumps(VALUES[-1]).encode()]},
        {"options": FormatOptions(pairs="all")},
        {"format": "messages_explicit"},
    ],
)
def test_the_digest_covers_bytes_order_format_and_options(other):
    assert one_window(**({"values": VALUES} | other)).digest != one_window(VALUES).digest


def test_the_digest_does_not_depend_on_place_or_on_how_the_format_was_found():
    assert one_window(VALUES, format="prompt_chosen_rejected").digest == one_window(VALUES).digest
    first, second = windows([*VALUES, *VALUES], rows_per_shard=10)
    assert first.digest == second.digest


def test_the_first_row_that_looks_like_a_format_decides_and_a_row_that_lacks_its_fields_is_read_as_its_own():
    values = [
        b"broken",
        {"note": 1},
        pair("p", "a", "b"),
        {"question": "q", "completions": ["a", "b"], "preference": [1]},
    ]
    window = one_window(values)
    assert window.format == "prompt_chosen_rejected"
    assert window.reasons == {"not_json": 1, "missing_field": 1}
    assert window.pairs.num_rows == 2
    named = one_window(values, format="prompt_chosen_rejected")
    assert named.reasons == {"not_json": 1, "missing_field": 2}


def test_no_format_is_an_error_that_names_file_fields_and_formats():
    with pytest.raises(UserError, match=r"f\.jsonl, row 1: .*text \(str\).*ultrafeedback"):
        windows([b"broken", *[{"text": "a"}] * 300])
    with pytest.raises(UserError, match=r"format: got 'nope'; valid: auto, prompt_chosen_rejected"):
        windows(VALUES, format="nope")
    with pytest.raises(UserError, match="rows_per_shard"):
        windows(VALUES, rows_per_shard=0)


def test_a_file_that_begins_with_bad_rows_only_is_still_read():
    found = windows([b"bad"] * 25 + VALUES, rows_per_shard=10)
    assert [window.num_quarantined for window in found] == [10, 10, 5, 0]
    assert sum(window.num_accepted for window in found) == 10
    bad_only = windows([b"bad"] * 250, rows_per_shard=100)
    assert [(window.num_quarantined, window.format) for window in bad_only] == [
        (100, "unknown"),
        (100, "unknown"),
        (50, "unknown"),
    ]
    many = windows([b"bad"] * 250 + VALUES, rows_per_shard=100)
    assert [window.num_rows for window in many] == [100, 100, 60]
    assert [window.digest for window in many[:2]] == [window.digest for window in bad_only[:2]]


def test_prompts_only():
    values = [{"prompt": "p"}, pair("q", "a", "b"), {"instruction": "p"}, pair("r", "a", "a"), {"text": "x"}]
    window = one_window(values, prompts_only=True)
    assert counts(window) == (5, 3, 1, 1)
    assert texts(window) == {"p": [], "q": [], "r": []}
    assert window.pairs.num_rows == 0
    with pytest.raises(UserError, match=r"f\.jsonl, row 0: no prompt: .*text"):
        windows([{"text": "x"}], prompts_only=True)


SMALL_ROWS = st.lists(
    st.one_of(
        st.builds(
            pair,
            st.sampled_from("pq"),
            st.sampled_from(["a", "b", "c", ""]),
            st.sampled_from(["a", "b", "c"]),
            aspect=st.sampled_from([None, "x", "y"]),
        ),
        st.just(b"broken"),
    ),
    max_size=25,
)


@given(SMALL_ROWS, st.integers(1, 9), st.randoms())
def test_the_corpus_does_not_depend_on_order_or_windows(values, rows_per_shard, random):
    format = "prompt_chosen_rejected"
    good = [value for value in values if isinstance(value, dict) and value["chosen"] not in ("", value["rejected"])]
    expected = {(value["prompt"], value["chosen"], value["rejected"], value["aspect"]) for value in good}
    whole = one_window(values, format=format)
    assert whole.num_quarantined == len(values) - len(good)
    assert {tuple(key) for key in keys(whole)} == expected
    assert texts(whole).keys() == {value["prompt"] for value in good}
    random.shuffle(values)
    shuffled = windows(values, rows_per_shard=rows_per_shard, format=format)
    ids = {one for window in shuffled for one in window.pairs["pair_id"].to_pylist()}
    assert ids == set(whole.pairs["pair_id"].to_pylist())
    assert sum(window.num_rows for window in shuffled) == len(values)


def keys(window):
    """(prompt, chosen, rejected, aspect) of every pair, as text."""
    groups = {group["prompt_id"]: group for group in window.groups.to_pylist()}
    for row in window.pairs.to_pylist():
        group = groups[row["prompt_id"]]
        content = [one["messages"][0]["content"] for one in group["completions"]]
        yield group["prompt"][0]["content"], content[row["chosen"]], content[row["rejected"]], row["aspect"]


def peak_of(path):
    tracemalloc.start()
    rows = read_rows(str(path), max_row_bytes=1 << 20)
    settings = {"file": "f", "format": "auto", "options": ASPECTS, "rows_per_shard": 1000}
    num_rows = sum(window.num_rows for window in ingest_windows(rows, **settings))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return num_rows, peak


def test_memory_is_one_window_whatever_the_length_of_the_file(tmp_path):
    lines = [json.dumps(pair(f"prompt {n}", f"chosen {n}" * 20, f"rejected {n}" * 20)) + "\n" for n in range(8000)]
    (tmp_path / "short.jsonl").write_text("".join(lines[:2000]))
    (tmp_path / "long.jsonl").write_text("".join(lines))
    num_short, short = peak_of(tmp_path / "short.jsonl")
    num_long, long = peak_of(tmp_path / "long.jsonl")
    assert (num_short, num_long) == (2000, 8000)
    assert long < 1.5 * short


def test_arrow_memory_is_given_back_between_windows(tmp_path):
    before = pa.total_allocated_bytes()
    for window in ingest_windows(raw_rows(VALUES), file="f", format="auto", options=ASPECTS, rows_per_shard=3):
        del window
    assert pa.total_allocated_bytes() == before
