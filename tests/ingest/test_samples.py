"""Samples of found data and of our own, end to end: what is kept, what is not, and why."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from prefsel.config import FormatOptions
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.windows import ingest_windows

REPOSITORY = Path(__file__).resolve().parents[2]

# format, rows, accepted, duplicate, reasons, groups, completions, pairs, ties: counted by hand-written one-liners over
# the raw JSON. Ours are written by jobs/data/make_samples.py; the others lie beside a checkout or are skipped.
EXPECTED = {
    "conversations.jsonl": (
        "messages_explicit", 372, 367, 2, {"not_json": 1, "empty_completion": 1, "identical_completions": 1},
        320, 729, 367, 0,
    ),
    "pairs.jsonl": (
        "prompt_chosen_rejected", 90, 85, 0, {"empty_completion": 2, "identical_completions": 3}, 85, 170, 85, 0,
    ),
    "transcripts.jsonl": ("transcript", 90, 87, 0, {"empty_completion": 3}, 87, 174, 87, 0),
    "ranked.jsonl": ("ranked", 45, 45, 0, {}, 45, 177, 202, 63),
    "hh_rlhf_harmless_1156.jsonl.gz": ("transcript", 1156, 1152, 0, {"empty_completion": 4}, 1152, 2304, 1152, 0),
    "qa_feedback_250x4.jsonl.gz": ("ranked", 250, 250, 0, {}, 250, 1000, 1349, 151),
    "ultrafeedback_binarized_1k.jsonl.gz": (
        "prompt_chosen_rejected", 1000, 994, 0, {"empty_completion": 2, "identical_completions": 4}, 994, 1988, 994, 0,
    ),
}  # fmt: skip


@pytest.fixture
def sample(request):
    """The path of a file of `EXPECTED`."""
    if request.param.endswith(".gz"):
        return request.getfixturevalue("shared") / "data" / "real" / request.param
    return request.getfixturevalue("samples") / request.param


def ingest(path, rows_per_shard=4096):
    rows = read_rows(str(path), max_row_bytes=1 << 24)
    options = FormatOptions()
    return list(ingest_windows(rows, file=path.name, format="auto", options=options, rows_per_shard=rows_per_shard))


def raw_lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        return list(stream)


@pytest.mark.parametrize("sample", EXPECTED, indirect=True)
def test_counts(sample):
    (window,) = ingest(sample)
    num_completions = sum(len(one) for one in window.groups["completions"].to_pylist())
    assert (
        window.format, window.num_rows, window.num_accepted, window.num_duplicate, window.reasons,
        window.groups.num_rows, num_completions, window.pairs.num_rows, window.num_ties,
    ) == EXPECTED[sample.name]  # fmt: skip


@pytest.mark.parametrize("sample", EXPECTED, indirect=True)
def test_small_windows_hold_the_same_pairs(sample):
    (whole,) = ingest(sample)
    parts = ingest(sample, rows_per_shard=35)
    ids = [one for window in parts for one in window.pairs["pair_id"].to_pylist()]
    assert list(dict.fromkeys(ids)) == whole.pairs["pair_id"].to_pylist()
    # A pair that comes again in another window stays until the corpus is read as a whole.
    again = len(ids) - whole.pairs.num_rows
    assert again + sum(window.num_duplicate for window in parts) == whole.num_duplicate
    assert len({window.digest for window in parts}) == len(parts) > 1


@pytest.mark.parametrize("sample", [name for name in EXPECTED if EXPECTED[name][0] == "transcript"], indirect=True)
def test_transcripts_can_be_written_back(sample):
    (window,) = ingest(sample)
    groups = {group["prompt_id"]: group for group in window.groups.to_pylist()}
    originals = [json.loads(line) for line in raw_lines(sample)]
    names = {"user": "Human", "assistant": "Assistant"}
    num_turns = Counter()
    for row in window.pairs.to_pylist():
        group = groups[row["prompt_id"]]
        original = originals[row["provenance"]["row"]]
        assert group["prompt"][-1]["role"] in names
        num_turns[len(group["prompt"])] += 1
        for side in ("chosen", "rejected"):
            messages = group["prompt"] + group["completions"][row[side]]["messages"]
            assert len(messages) == len(group["prompt"]) + 1
            written = "".join(f"\n\n{names[one['role']]}: {one['content']}" for one in messages)
            assert written.split() == original[side].split()  # up to white space around turns
    assert {1, 3, 5} <= set(num_turns)


@pytest.mark.parametrize("sample", ["pairs.jsonl", "ultrafeedback_binarized_1k.jsonl.gz"], indirect=True)
def test_scores_become_ratings_and_margins(sample):
    (window,) = ingest(sample)
    originals = [json.loads(line) for line in raw_lines(sample)]
    for row in window.pairs.to_pylist():
        original = originals[row["provenance"]["row"]]
        assert row["label_margin"] == original["score_chosen"] - original["score_rejected"]
    ratings = Counter(len(one["ratings"]) for group in window.groups["completions"].to_pylist() for one in group)
    assert ratings == {1: EXPECTED[sample.name][6]}


@pytest.mark.parametrize("sample", ["ranked.jsonl", "qa_feedback_250x4.jsonl.gz"], indirect=True)
def test_labels_stand_for_two_texts(sample):
    (window,) = ingest(sample)
    originals = [json.loads(line) for line in raw_lines(sample)]
    places = [(first, second) for first in range(4) for second in range(first + 1, 4)]
    for group, original in zip(window.groups.to_pylist(), originals, strict=True):
        texts = [one["messages"][0]["content"] for one in group["completions"]]
        found = {
            (texts[row["chosen"]], texts[row["rejected"]])
            for row in window.pairs.to_pylist()
            if row["prompt_id"] == group["prompt_id"]
        }
        named = set()
        for label, (first, second) in zip(original["preference"], places, strict=True):
            duel = original["completions"][first], original["completions"][second]
            if label:
                named.add(duel if label == 1 else duel[::-1])
        assert found == named


def names_in(folder):
    return [Path(file).name for file in list_files(str(folder))]


def test_a_folder_lists_its_samples(samples):
    assert names_in(samples) == sorted(name for name in EXPECTED if not name.endswith(".gz"))
    # What lies beside the shipped file is no data.
    assert names_in(REPOSITORY / "jobs/data") == ["conversations.jsonl"]


def test_a_folder_lists_found_samples(shared):
    assert names_in(shared / "data" / "real") == sorted(name for name in EXPECTED if name.endswith(".gz"))


def test_the_shipped_sample_is_what_its_script_writes(samples):
    shipped = REPOSITORY / "jobs/data/conversations.jsonl"
    assert shipped.read_bytes() == (samples / "conversations.jsonl").read_bytes()
