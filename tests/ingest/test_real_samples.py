"""The three real samples, end to end: what is kept, what is not, and why."""

import gzip
import json
from collections import Counter

import pytest

from prefsel.config import FormatOptions
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.windows import ingest_windows

# rows, accepted, reasons, groups, completions, pairs, ties: counted by hand-written one-liners over the raw JSON.
EXPECTED = {
    "hh_rlhf_harmless_1156": ("transcript", 1156, 1152, {"empty_completion": 4}, 1152, 2304, 1152, 0),
    "qa_feedback_250x4": ("ranked", 250, 250, {}, 250, 1000, 1349, 151),
    "ultrafeedback_binarized_1k": (
        "prompt_chosen_rejected", 1000, 994, {"empty_completion": 2, "identical_completions": 4}, 994, 1988, 994, 0,
    ),
}  # fmt: skip


def ingest(path, rows_per_shard=4096):
    rows = read_rows(str(path), max_row_bytes=1 << 24)
    options = FormatOptions()
    return list(ingest_windows(rows, file=path.name, format="auto", options=options, rows_per_shard=rows_per_shard))


@pytest.mark.parametrize("name", EXPECTED)
def test_counts(shared, name):
    (window,) = ingest(shared / "data" / "real" / f"{name}.jsonl.gz")
    num_completions = sum(len(one) for one in window.groups["completions"].to_pylist())
    assert (
        window.format, window.num_rows, window.num_accepted, window.reasons, window.groups.num_rows, num_completions,
        window.pairs.num_rows, window.num_ties,
    ) == EXPECTED[name]  # fmt: skip
    assert window.num_duplicate == 0


@pytest.mark.parametrize("name", EXPECTED)
def test_small_windows_hold_the_same_pairs(shared, name):
    path = shared / "data" / "real" / f"{name}.jsonl.gz"
    (whole,) = ingest(path)
    parts = ingest(path, rows_per_shard=90)
    ids = [one for window in parts for one in window.pairs["pair_id"].to_pylist()]
    assert ids == whole.pairs["pair_id"].to_pylist()
    assert len({window.digest for window in parts}) == len(parts)


def test_transcripts_can_be_written_back(shared):
    path = shared / "data" / "real" / "hh_rlhf_harmless_1156.jsonl.gz"
    (window,) = ingest(path)
    groups = {group["prompt_id"]: group for group in window.groups.to_pylist()}
    with gzip.open(path) as stream:
        originals = [json.loads(line) for line in stream]
    names = {"user": "Human", "assistant": "Assistant"}
    for row in window.pairs.to_pylist():
        group = groups[row["prompt_id"]]
        original = originals[row["provenance"]["row"]]
        assert group["prompt"][-1]["role"] in names
        for side in ("chosen", "rejected"):
            messages = group["prompt"] + group["completions"][row[side]]["messages"]
            assert len(messages) == len(group["prompt"]) + 1
            written = "".join(f"\n\n{names[one['role']]}: {one['content']}" for one in messages)
            assert written.split() == original[side].split()  # up to white space around turns


def test_scores_become_ratings_and_margins(shared):
    path = shared / "data" / "real" / "ultrafeedback_binarized_1k.jsonl.gz"
    (window,) = ingest(path)
    with gzip.open(path) as stream:
        originals = [json.loads(line) for line in stream]
    for row in window.pairs.to_pylist():
        original = originals[row["provenance"]["row"]]
        assert row["label_margin"] == original["score_chosen"] - original["score_rejected"]
    ratings = Counter(len(one["ratings"]) for group in window.groups["completions"].to_pylist() for one in group)
    assert ratings == {1: 1988}


def test_the_folder_lists_the_samples(shared):
    found = list_files(str(shared / "data" / "real"))
    assert [name.rsplit("/", 1)[-1].removesuffix(".jsonl.gz") for name in found] == sorted(EXPECTED)
