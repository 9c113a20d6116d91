"""A policy that says the same again is measured by all that it said, though a group holds each text once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from prefsel.config import GenerationOptions
from prefsel.evaluate.diversity import diversity
from prefsel.evaluate.judged import Answers
from prefsel.generate.answered import answered
from prefsel.generate.engine import Response
from prefsel.generate.samples import sample_places
from prefsel.schema import prompts_schema
from prefsel.stages.evaluate import _Asked, _Beside, _read_shard, _rows_beside
from prefsel.stages.generate import commit_answered
from prefsel.stages.vllm import ShardWork
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

IDS = [bytes([number]) * 16 for number in (1, 2)]
SAID = [["the same", "the same", "another", "the same"], ["", "once", "", "over"]]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """One shard of answers, and a column with a number of each text."""
    schema, found = prompts_schema(has_rest=False), Storage(str(tmp_path))
    rows = [
        {
            "prompt_id": prompt_id,
            "prompt": [{"role": "user", "content": f"question {number}"}],
            "parent_id": None,
            "strategy": None,
        }
        for number, prompt_id in enumerate(IDS)
    ]
    prompts = pa.Table.from_pylist(rows, schema=schema)
    responses = [[Response([7] * len(text.split()), text, "end") for text in texts] for texts in SAID]
    made = answered(prompts, responses, GenerationOptions(samples=4), label="m", spent={})
    for source in ("m", "b"):
        commit_answered(found, ShardWork(source, "0", "x", "attempt"), made, {"slow_because": ""}, {})
    groups = made.groups
    numbers = [
        [float(len(one["messages"][0]["content"])) for one in row["completions"]]
        for row in groups.select(["completions"]).to_pylist()
    ]
    table = pa.table({"prompt_id": groups["prompt_id"], "rm_j": pa.array(numbers, pa.list_(pa.float64()))})
    Artifact(found, "columns/j/m").commit("0", table, made_from="x", attempt="attempt")
    return found


def read(storage: Storage) -> Answers:
    return _read_shard("0", _Asked(storage, "m", "m", [("columns/j", ["rm_j"])]))


def test_every_sample_counts(storage: Storage) -> None:
    found = read(storage)
    first, second = (one.hex() for one in IDS)
    assert found.texts == {first: SAID[0], second: ["once", "over"]}  # what is empty is left out, and told
    assert found.columns["rm_j"] == {first: [8.0, 8.0, 7.0, 8.0], second: [4.0, 4.0]}
    assert found.num_tokens == {first: [2.0, 2.0, 1.0, 2.0], second: [1.0, 1.0]}
    # Three of the six pairs of samples are the same text, the others share no bigram.
    shared = diversity(found.texts, num_draws=100).self_similarity
    assert shared is not None
    assert shared.mean == pytest.approx((3 / 6 + 0) / 2)
    assert np.mean([one for many in found.columns["rm_j"].values() for one in many]) == pytest.approx((31 + 8) / 6)


def test_every_sample_stands_beside_every_one_of_the_baseline(storage: Storage) -> None:
    rows = _rows_beside("0", _Beside(storage, ("m", "b"), "none:none", "verdicts"))
    naive = [
        (prompt_id.hex(), f"question {number}", our, their)
        for number, prompt_id in enumerate(IDS)
        for our in SAID[number]
        for their in SAID[number]
        if our and their
    ]
    assert rows == naive


def test_what_repeats_a_refused_text_is_no_answer() -> None:
    group = {
        "prompt_id": IDS[0],
        "completions": [{"messages": [{"role": "assistant", "content": "kept"}]}],
        "responses": [{"sample": 2}],
    }
    raw = '{"prompt_id": "%s", "sample": %d, "text": "%s"}'
    quarantined = [
        ("cut_off", (raw % (IDS[0].hex(), 0, "cut")).encode()),
        ("duplicate_response", (raw % (IDS[0].hex(), 1, "cut")).encode()),
        ("duplicate_response", (raw % (IDS[0].hex(), 3, "kept")).encode()),
    ]
    assert sample_places([group], quarantined) == {IDS[0]: [0, 0]}
