"""The arithmetic stages on a real local Ray: files in, exact subsets out, whatever the sharding; resume; bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from stage_runs import run

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.stages.ingest import ingest
from prefsel.workspace.catalog import quarantine_name
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")

QUIET = Progress(quiet=True)


def row(number: int, *, chosen: float | None = None, flip: bool = False) -> dict[str, Any]:
    """One pair about prompt `number`; its explicit margin is `chosen`, or number mod 7 (many ties)."""
    sides = [f"good {number}", f"bad {number}"]
    if flip:
        sides.reverse()
    margin = float(number % 7) if chosen is None else chosen
    return {
        "prompt": f"p{number}",
        "chosen": sides[0],
        "rejected": sides[1],
        "score_chosen": margin,
        "score_rejected": 0.0,
    }


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def config(paths: dict[str, str], **more: Any) -> Any:
    table: dict[str, Any] = {
        "name": "t",
        "sources": [{"name": name, "paths": [path]} for name, path in paths.items()],
        "ingest": {"max_quarantine_fraction": 0.5},
        "scorers": [{"kind": "imported", "name": "gold", "field": "score"}],
        "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
        "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.3}}],
    }
    return parse_config(table | more)


def kept(plan: Plan, name: str = "top") -> list[str]:
    """Hex ids of a selection's dataset."""
    folder = plan.storage.local(plan.node("dataset", name).path)
    return [
        i for file in sorted((folder / "data").glob("*.parquet")) for i in pq.read_table(file)["pair_id"].to_pylist()
    ]


def test_the_same_set_for_one_shard_and_many(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(60)])
    one, _ = run(config({"a": path}, ingest={"rows_per_shard": 1000}), tmp_path / "one")
    many, reports = run(config({"a": path}, ingest={"rows_per_shard": 4}), tmp_path / "many")
    assert len(many.catalog.shards) == 15
    assert sorted(kept(one)) == sorted(kept(many))
    # A full sort by (margin descending, pair_id ascending) over rows anyone can recompute.
    ids = []
    for shard in many.catalog.shards:
        table = Artifact(many.storage, f"pairs/{shard.source}").read(shard.shard)
        ids += list(zip(table["label_margin"].to_pylist(), table["pair_id"].to_pylist()))
    expected = [pair_id.hex() for _, pair_id in sorted(ids, key=lambda item: (-item[0], item[1]))[:18]]
    assert sorted(kept(many)) == sorted(expected)
    assert [r.rows_out for r in reports if r.stage == "select"] == [18]
    assert verify(many.storage).is_clean


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(20)])
    made = config({"a": path}, ingest={"rows_per_shard": 5})
    run(made, tmp_path / "w")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("*") if p.is_file()}
    _, reports = run(made, tmp_path / "w")
    assert all(report.computed_shards == 0 for report in reports)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("*") if p.is_file()} == files


def test_a_killed_run_continues_without_doubling(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(20)])
    made = config({"a": path}, ingest={"rows_per_shard": 5})
    clean, _ = run(made, tmp_path / "clean")
    plan, _ = run(made, tmp_path / "w")
    storage = plan.storage
    # As if the run had died after two of four shards were scored and before anything was selected.
    columns = plan.node("columns", made.scorers[0].label).path
    for shard in plan.catalog.shards[2:]:
        storage.delete(f"{columns}/{shard.source}/_ledger/{shard.shard}.json")
    storage.delete_tree(plan.node("scores", "margin").path)
    storage.delete_tree("selections")
    storage.delete_tree("datasets")
    again, reports = run(made, tmp_path / "w")
    assert {r.stage: r.computed_shards for r in reports}["score"] == 2
    assert Artifact(storage, f"{columns}/a").attempts() == {
        shard.shard: 1 + (number >= 2) for number, shard in enumerate(plan.catalog.shards)
    }
    assert kept(again) == kept(clean)
    assert verify(storage).is_clean


def test_duplicates_and_contradictions_across_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [row(n) for n in range(6)])
    second = write(tmp_path / "b.jsonl", [row(0), row(1), row(2, flip=True), row(6)])
    plan, reports = run(config({"a": first, "b": second}), tmp_path / "w")
    eligible = next(r for r in reports if r.stage == "eligible")
    assert (eligible.rows_in, eligible.rows_out) == (10, 6)
    assert eligible.dropped == {"contradiction": 2, "duplicate": 2}
    sources = {s: Artifact(plan.storage, f"{plan.node('eligible', 'all').path}/{s}") for s in ("a", "b")}
    dropped = {s: a.read(next(iter(a.entries())))["dropped"].cast("string").to_pylist() for s, a in sources.items()}
    assert dropped["a"] == [None, None, "contradiction", None, None, None]
    assert dropped["b"] == ["duplicate", "duplicate", "contradiction", None]


def test_the_same_file_twice_is_all_duplicates(tmp_path: Path) -> None:
    rows = [row(n) for n in range(6)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", rows)
    _, reports = run(config({"a": str(tmp_path)}), tmp_path / "w")
    assert (reports[0].rows_in, reports[0].rows_out, reports[0].dropped["duplicate"]) == (12, 6, 6)


def test_holdout_and_excluded_prompts_are_never_selected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(40)])
    held = write(tmp_path / "held.jsonl", [row(1), row(2)])
    exclude = write(tmp_path / "eval.jsonl", [{"prompt": "p3"}, {"prompt": "p4"}])
    made = config(
        {"a": path},
        sources=[{"name": "a", "paths": [path]}, {"name": "held", "paths": [held], "role": "holdout"}],
        exclude_prompts=[exclude],
        split={"holdout": 0.25},
        selections=[{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": 1.0}}],
    )
    plan, reports = run(made, tmp_path / "w")
    dropped = next(r for r in reports if r.stage == "eligible").dropped
    assert dropped["excluded_prompt"] == 2
    assert dropped["holdout_prompt"] == 2
    folder = plan.storage.local(plan.node("dataset", "top").path)
    table = pq.read_table(next((folder / "data").glob("*.parquet")))
    prompts = {p[0]["content"] for p in table["prompt"].to_pylist()}
    assert not prompts & {"p1", "p2", "p3", "p4"}
    assert len(prompts) == 42 - sum(dropped.values())


def test_every_row_is_accounted_for_and_bad_ones_are_kept(tmp_path: Path) -> None:
    bad = ["not json", {"prompt": "x"}, {"prompt": "q", "chosen": "same", "rejected": "same"}]
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(5)] + bad + [row(0)])
    plan, reports = run(config({"a": path}), tmp_path / "w")
    assert (reports[0].rows_in, reports[0].rows_out) == (9, 5)
    assert sum(reports[0].dropped.values()) == 4
    shard = plan.catalog.shards[0]
    quarantine = Artifact(plan.storage, "quarantine/a").read(quarantine_name(shard.shard, path))
    assert quarantine.num_rows == 3
    assert b"not json" in quarantine["raw"].to_pylist()


def test_too_much_quarantine_and_an_empty_corpus_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(0), "x", "y", "z"])
    with pytest.raises(UserError, match=r"3 of 4 rows are quarantined .*max_quarantine_fraction is 0.5"):
        run(config({"a": path}), tmp_path / "w")
    assert not (tmp_path / "w" / "catalog.json").exists()
    with pytest.raises(UserError, match="empty corpus"):
        run(config({"a": write(tmp_path / "none.jsonl", [])}), tmp_path / "w2")


def test_a_missing_number_drops_the_pair_and_says_which(tmp_path: Path) -> None:
    rows = [row(n) for n in range(10)]
    for r in rows[:3]:
        del r["score_chosen"], r["score_rejected"]
    path = write(tmp_path / "a.jsonl", rows)
    plan, reports = run(config({"a": path}), tmp_path / "w")
    metric = next(r for r in reports if r.stage == "metric")
    assert metric.dropped == {"missing_rm_gold_chosen": 3}
    assert len(kept(plan)) == 2  # floor(0.3 · 7)


def test_quota_band_and_controls(tmp_path: Path) -> None:
    paths = {s: write(tmp_path / f"{s}.jsonl", [row(n + k) for n in range(20)]) for s, k in (("a", 0), ("b", 100))}
    made = config(
        paths,
        selections=[
            {"name": "q", "rule": {"kind": "quota", "score": "score_margin", "ratio": 0.5, "by": "source"}},
            {
                "name": "mid",
                "rule": {"kind": "band", "score": "score_margin", "low": 20, "high": 80},
                "controls": ["random", "reverse"],
            },
        ],
    )
    plan, reports = run(made, tmp_path / "w")
    rows_out = {r.name: r.rows_out for r in reports if r.stage == "select"}
    assert rows_out["q"] == 20
    assert rows_out["mid-random"] == rows_out["mid"]
    assert rows_out["mid"] + rows_out["mid-reverse"] == 40
    assert not set(kept(plan, "mid")) & set(kept(plan, "mid-reverse"))
    folder = plan.storage.local(plan.node("dataset", "q").path)
    table = pq.read_table(next((folder / "data").glob("*.parquet")))
    assert pc.value_counts(table["source"]).to_pylist() == [
        {"values": "a", "counts": 10},
        {"values": "b", "counts": 10},
    ]


def test_the_dataset_opens_with_datasets(tmp_path: Path) -> None:
    from datasets import load_dataset

    path = write(tmp_path / "a.jsonl", [row(n) for n in range(20)])
    plan, _ = run(config({"a": path}), tmp_path / "w")
    folder = plan.storage.local(plan.node("dataset", "top").path)
    loaded = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 6
    assert loaded[0]["chosen"][0]["role"] == "assistant"
    assert {"score", "percentile", "rm_gold_chosen", "pair_id"} <= set(loaded.column_names)
    files = str(folder / "data" / "train-*.parquet")
    assert load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "c2"))["train"].num_rows == 6


def test_the_order_of_sources_decides_which_duplicate_stays(tmp_path: Path) -> None:
    """Also in a workspace that has already seen the other order."""
    values = {"a": 6.0, "b": 9.0}
    paths = {s: write(tmp_path / f"{s}.jsonl", [row(n, chosen=v) for n in range(4)]) for s, v in values.items()}
    for order, expected in (("ab", "a"), ("ba", "b")):
        plan, _ = run(config({s: paths[s] for s in order}), tmp_path / "w")
        folder = plan.storage.local(plan.node("dataset", "top").path)
        table = pq.read_table(next((folder / "data").glob("*.parquet")))
        assert set(table["source"].to_pylist()) == {expected}


def test_a_longer_file_under_another_name_scores_only_what_is_new(tmp_path: Path) -> None:
    rows = [row(n) for n in range(140)]
    made = {"ingest": {"rows_per_shard": 2}}
    run(config({"a": write(tmp_path / "d1.jsonl", rows)}, **made), tmp_path / "w")
    longer = write(tmp_path / "d2.jsonl", [*rows, row(999)])
    plan, reports = run(config({"a": longer}, **made), tmp_path / "w")
    assert {r.stage: r.computed_shards for r in reports}["score"] == 1
    assert set(Artifact(plan.storage, "groups/a").attempts().values()) == {1}


@pytest.mark.parametrize("role", ["holdout", "exclude"])
def test_an_evaluation_set_that_cannot_be_read_is_refused(tmp_path: Path, role: str) -> None:
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(100)])
    unread = write(tmp_path / "eval.jsonl", ["[1,", "x"])
    sources = [{"name": "a", "paths": [path]}, {"name": "e", "paths": [unread], "role": role, "format": "scored"}]
    with pytest.raises(UserError, match=rf"sources.e: .*eval.jsonl holds no usable {role} row"):
        run(config({}, sources=sources), tmp_path / "w")


def test_a_control_draws_from_what_its_selector_scored(tmp_path: Path) -> None:
    rows = [row(n) for n in range(20)]
    for r in rows[:12]:
        del r["score_chosen"], r["score_rejected"]
    rule = {"kind": "top", "score": "score_margin", "ratio": 0.5}
    made = config(
        {"a": write(tmp_path / "a.jsonl", rows)}, selections=[{"name": "top", "rule": rule, "controls": ["random"]}]
    )
    plan, reports = run(made, tmp_path / "w")
    counts = {r.name: (r.rows_in, r.rows_out) for r in reports if r.stage == "select"}
    assert counts == {"top": (8, 4), "top-random": (8, 4)}
    folder = plan.storage.local(plan.node("dataset", "top-random").path)
    assert pq.read_table(next((folder / "data").glob("*.parquet")))["rm_gold_chosen"].null_count == 0


def test_an_empty_selection_is_refused(tmp_path: Path) -> None:
    rule = {"kind": "band", "score": "score_margin", "low": 49.9, "high": 50.1}
    made = config({"a": write(tmp_path / "a.jsonl", [row(0), row(1)])}, selections=[{"name": "none", "rule": rule}])
    with pytest.raises(UserError, match=r"selections\.none: keeps none of 2 eligible pairs"):
        run(made, tmp_path / "w")


@pytest.mark.parametrize("lost", ["selections/top", "eligible/all", "scores/margin"])
def test_verify_misses_no_lost_shard(tmp_path: Path, lost: str) -> None:
    path = write(tmp_path / "a.jsonl", [row(n) for n in range(20)])
    plan, _ = run(config({"a": path}, ingest={"rows_per_shard": 5}), tmp_path / "w")
    ledger = next((tmp_path / "w").glob(f"{lost}@*/a/_ledger/*.json"))
    ledger.unlink()
    result = verify(plan.storage)
    assert not result.is_clean
    assert any(f.problem == "missing" and f.path.startswith(lost) for f in result.findings)


def test_rows_of_one_label_say_why_there_is_no_pair(tmp_path: Path, local_ray: None) -> None:
    lines = [{"prompt": f"p{number}", "completion": "c", "label": number % 2 == 0} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = parse_config({"name": "t", "sources": [{"name": "s", "paths": [str(tmp_path / "a.jsonl")]}]})
    with pytest.raises(
        UserError, match="3 prompts were read as unpaired, 0 comparisons are ties, and no prompt has two"
    ):
        ingest(config, Storage(str(tmp_path / "W")), Progress(quiet=True))
