"""The page of a real run: what it says about kept pairs agrees with the dataset, the rule and `explain`."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefsel.config.file import parse_config
from prefsel.pipeline import Outcome, run
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.report.explain import explain_pair
from prefsel.select.percentiles import selection_percentiles
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_PAIRS = 300
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SELECTIONS: list[dict[str, Any]] = [
    {
        "name": "top",
        "rule": {"kind": "top", "score": "score_margin", "ratio": 0.3},
        "controls": ["random", "reverse"],
    },
    {"name": "mid", "rule": {"kind": "band", "score": "score_margin", "low": 20, "high": 80}},
    {"name": "fair", "rule": {"kind": "quota", "score": "score_margin", "by": "source", "ratio": 0.25}},
]


def pairs() -> list[dict[str, Any]]:
    """Margins that share a bin (100 to 101), ties among them, a prompt that would be a program."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": f"{HOSTILE} {number}",
            "chosen": f"good {number}",
            "rejected": f"bad {number}",
            "score_chosen": 100.5 if number % 4 == 0 else float(100 + rng.random()),
            "score_rejected": 0.0,
        }
        for number in range(NUM_PAIRS)
    ]


def made(folder: Path, rows_per_shard: int) -> tuple[Plan, Outcome, dict[str, Any], str]:
    """A run on two files: plan, outcome, report.json, page."""
    rows, paths = pairs(), []
    for name, part in (("a", rows[:200]), ("b", rows[200:])):
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in part))
    config = parse_config(
        {
            "name": "page",
            "sources": [{"name": path.stem, "paths": [str(path)]} for path in paths],
            "ingest": {"rows_per_shard": rows_per_shard},
            "scorers": [{"kind": "imported", "name": "gold", "field": "score"}],
            "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
            "selections": SELECTIONS,
            "report": {"examples": 4},
        }
    )
    outcome = run(config, str(folder / "w"), Progress(quiet=True))
    assert outcome.page is not None
    page = folder / "w" / outcome.page
    record = json.loads((page.parent / "report.json").read_text())
    return make_plan(config, Storage(str(folder / "w"))), outcome, record, page.read_text()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Any:
    return made(tmp_path_factory.mktemp("page"), 40)


def selected(outcome: Outcome) -> dict[str, StageReport]:
    return {report.name: report for report in outcome.reports if report.stage == "select"}


def dataset(plan: Plan, report: StageReport) -> dict[str, float]:
    """pair_id → score of what a selection kept."""
    files = sorted((plan.storage.local(report.details["dataset"]) / "data").glob("train-*.parquet"))
    return {row["pair_id"]: row["score"] for file in files for row in pq.read_table(file).to_pylist()}


def all_scores(plan: Plan) -> dict[str, float]:
    files = sorted(plan.storage.local(plan.node("scores", "margin").path).glob("*/*.parquet"))
    tables = [pq.read_table(file, columns=["pair_id", "score"]).to_pylist() for file in files]
    return {row["pair_id"].hex(): row["score"] for rows in tables for row in rows}


def test_a_kept_pair_is_never_shown_below_the_cut(done: Any) -> None:
    plan, outcome, record, _ = done
    reports, scores = selected(outcome), all_scores(plan)
    bounds = {"top": (70, 100), "top-reverse": (0, 30), "mid": (20, 80)}
    for name, (low, high) in bounds.items():
        kept = set(dataset(plan, reports[name]))
        percentiles = selection_percentiles(reports[name])
        shown = {one: float(percentiles.of(np.array([score]))[0]) for one, score in scores.items()}
        assert all(low <= shown[one] <= high for one in kept), name
        outside = [shown[one] for one in shown if one not in kept]
        assert all(value <= low or value >= high for value in outside), name
        # What the page shows is the same number.
        section = next(one for one in record["selections"] if one["name"] == name)
        assert len(section["examples"]) == 8
        for example in section["examples"]:
            assert example["percentile"] == shown[example["pair_id"]]
            assert (example["pair_id"] in kept) == ("kept" in example["kind"])


def test_the_dataset_and_the_selection_store_the_percentiles_that_are_shown(done: Any) -> None:
    plan, outcome, _, _ = done
    for report in selected(outcome).values():
        files = sorted((plan.storage.local(report.details["dataset"]) / "data").glob("train-*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        shown_K = selection_percentiles(report).of(np.array([row["score"] for row in rows]))
        assert [row["percentile"] for row in rows] == shown_K.tolist()
        stored = sorted(plan.storage.local(report.artifact).glob("*/*.parquet"))
        by_id = {row["pair_id"].hex(): row["percentile"] for file in stored for row in pq.read_table(file).to_pylist()}
        assert by_id == {row["pair_id"]: row["percentile"] for row in rows}


def test_explain_and_the_page_name_the_same_percentile(done: Any) -> None:
    plan, _, record, page = done
    for section in record["selections"]:
        for example in section["examples"][:3]:
            lines = list(explain_pair(plan.storage, example["pair_id"]))
            (told,) = [line for line in lines if line.startswith(f"selection {section['name']}: ")]
            assert f"percentile {example['percentile']:.2f} among {NUM_PAIRS} pairs" in told
            assert ("not kept" in told) == ("dropped" in example["kind"])
            assert f"percentile {example['percentile']:.2f}</small>" in page
            if section["name"] != "top-random":
                (score,) = [line for line in lines if line.startswith("score     margin: ")]
                found = re.search(r"percentile ([\d.]+) to ([\d.]+) ", score)
                assert found is not None
                # The bin of the score, which the selection's own percentile lies in.
                assert float(found[1]) - 0.01 <= example["percentile"] <= float(found[2]) + 0.01


def test_the_examples_are_the_nearest_of_all_shards(done: Any) -> None:
    plan, outcome, record, _ = done
    kept, scores = dataset(plan, selected(outcome)["top"]), all_scores(plan)
    shown: dict[str, list[float]] = {}
    for example in record["selections"][0]["examples"]:
        shown.setdefault(example["kind"], []).append(example["score"])
    dropped = [score for one, score in scores.items() if one not in kept]
    assert shown["just kept"] == sorted(kept.values())[:2]
    assert shown["just dropped"] == sorted(dropped)[:-3:-1]


def test_overlap_is_that_of_sets(done: Any) -> None:
    plan, outcome, record, _ = done
    kept = {name: set(dataset(plan, report)) for name, report in selected(outcome).items()}
    assert [(one["first"], one["second"]) for one in record["overlap"]] == list(combinations(kept, 2))
    for one in record["overlap"]:
        first, second = kept[one["first"]], kept[one["second"]]
        assert one["num_shared"] == len(first & second)
        assert one["jaccard"] == pytest.approx(len(first & second) / len(first | second))
        assert one["expected"] == pytest.approx(len(first) * len(second) / NUM_PAIRS)


def test_histograms_count_every_pair_once_on_its_side_of_the_cut(done: Any) -> None:
    plan, outcome, record, _ = done
    for section in record["selections"]:
        everything, kept = (np.array(section[f"{part}_histogram"]["counts"]) for part in ("all", "kept"))
        assert (everything.sum(), kept.sum()) == (NUM_PAIRS, section["num_kept"])
        assert (kept <= everything).all()
    top = record["selections"][0]
    edges = np.array(top["all_histogram"]["edges"])
    (cut,) = top["marks"]
    assert cut == min(dataset(plan, selected(outcome)["top"]).values())
    assert np.array(top["kept_histogram"]["counts"])[edges[1:] <= cut].sum() == 0


def test_the_verdict_says_what_was_kept_and_that_nothing_was_trained(done: Any) -> None:
    _, _, record, page = done
    assert record["random"] == ["top-random"]
    assert record["comparisons"] == []
    assert "<b>top</b> kept <b>90</b> of 300 pairs (30.0 %): the 30 % with the highest score_margin." in " ".join(
        page.split()
    )
    assert "No model was trained on a selection" in page
    assert page.index('<h2 id="verdict">') < page.index('<h2 id="selections">') < page.index('<h2 id="flow">')


def test_a_prompt_that_would_be_a_program_is_text(done: Any) -> None:
    _, _, record, page = done
    assert any(HOSTILE in one["prompt"] for one in record["selections"][0]["examples"])
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_same_page_for_one_shard_and_many(done: Any, tmp_path: Path) -> None:
    _, _, many, _ = done
    _, _, one, _ = made(tmp_path, 1_000)
    for ours, theirs in zip(one["selections"], many["selections"]):
        assert ours["examples"] == theirs["examples"]
    assert one["overlap"] == many["overlap"]
