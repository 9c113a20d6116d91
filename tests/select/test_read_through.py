"""Selections with and without a dataset: when one is written, and that the rows read through are the dataset's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from stage_runs import run

from prefsel.config.file import parse_config
from prefsel.errors import IntegrityError
from prefsel.plan.columns import pair_reader
from prefsel.plan.nodes import make_plan, writes_dataset
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.stages import select as stage
from prefsel.stages.select import select
from prefsel.stages.tasks import map_shards
from prefsel.train.pair_source import TEXT, Dataset, SelectionPairs
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

QUIET = Progress(quiet=True)
TOP = {"kind": "top", "score": "score_margin", "ratio": 0.3}


def corpus(folder: Path) -> list[dict[str, Any]]:
    """Two files of 30 pairs with ties; ten prompts stand in both, none of their pairs."""
    sources = []
    for name, first in (("a", 0), ("b", 20)):
        lines = [
            {
                "prompt": f"p{number}",
                "chosen": f"good {number} {name}",
                "rejected": "bad " + "x" * number,
                "score_chosen": float(number % 7),
                "score_rejected": 0.0,
                "aspect": "odd" if number % 2 else None,
            }
            for number in range(first, first + 30)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources.append({"name": name, "paths": [str(path)]})
    return sources


def config(sources: list[dict[str, Any]], dataset: str, **more: Any) -> Any:
    return parse_config(
        {
            "name": "t",
            "sources": sources,
            "ingest": {"rows_per_shard": 7},
            "scorers": [{"kind": "imported", "name": "gold", "field": "score"}],
            "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
            "selections": [{"name": "top", "rule": TOP, "controls": ["random"], "dataset": dataset}],
            **more,
        }
    )


def read_through(plan: Plan, name: str) -> SelectionPairs:
    return SelectionPairs(pair_reader(plan, []), tuple(plan.catalog.shards), plan.node("selection", name).path)


@pytest.mark.parametrize(
    ("trainings", "written"),
    [
        ([], True),
        ([{}], False),
        ([{"num_epochs": 3}], False),
        ([{"workers": 2}], True),
        ([{}, {"name": "second"}], True),
        ([{"cross_fit": {"folds": 2}}], True),
        ([{"selection": "top-random"}], True),
    ],
)
def test_auto_writes_what_is_not_read_exactly_once(trainings: list[dict[str, Any]], written: bool) -> None:
    base = {"name": "one", "selection": "top", "model": "m", "reference": "m", "learning_rate": 1e-3}
    for dataset, expected in (("auto", written), ("always", True), ("never", False)):
        made = config([{"name": "a", "paths": ["a.jsonl"]}], dataset, train=[base | more for more in trainings])
        assert writes_dataset(make_plan(made, Storage("memory")), "top") is expected


def test_auto_looks_at_a_control_by_itself() -> None:
    train = [{"name": "one", "selection": "top-random", "model": "m", "reference": "m", "learning_rate": 1e-3}]
    plan = make_plan(config([{"name": "a", "paths": ["a.jsonl"]}], "auto", train=train), Storage("memory"))
    assert (writes_dataset(plan, "top"), writes_dataset(plan, "top-random")) == (True, False)


@pytest.mark.usefixtures("local_ray")
def test_the_rows_read_through_are_those_of_the_dataset(tmp_path: Path) -> None:
    sources = corpus(tmp_path)
    written, reports = run(config(sources, "always"), tmp_path / "with")
    plan, without = run(config(sources, "never"), tmp_path / "without")
    assert not (tmp_path / "without" / "datasets").exists()
    columns = [*TEXT, "score"]
    for name in ("top", "top-random"):
        dataset = written.node("dataset", name).path
        assert dataset is not None
        expected = pa.concat_tables(Dataset(written.storage, dataset).tables(columns)).select(columns)
        assert expected.num_rows == 18
        assert pa.concat_tables(read_through(plan, name).tables(columns)).select(columns).equals(expected)
        one, other = (next(r for r in found if r.name == name) for found in (reports, without))
        assert {**one.details, "dataset": None} == other.details
        assert (one.rows_in, one.rows_out, one.dropped) == (other.rows_in, other.rows_out, other.dropped)
    strata = next(r for r in without if r.name == "top").details["strata"]["kept"]
    texts = pa.concat_tables(read_through(plan, "top").tables(TEXT)).to_pylist()
    labels = [f"{row['source']} / {row['aspect']}" if row["aspect"] else row["source"] for row in texts]
    assert strata == {label: labels.count(label) for label in sorted(set(labels))}
    kept = next(r for r in without if r.name == "top").details["length"]["kept"]
    for side in ("chosen", "rejected"):
        assert kept[side] == pytest.approx(sum(len(row[side][0]["content"]) for row in texts) / len(texts))
    assert verify(plan.storage).is_clean
    _, again = run(config(sources, "never"), tmp_path / "without")
    assert all(report.computed_shards == 0 for report in again if report.stage != "select")


@pytest.mark.usefixtures("local_ray")
def test_a_killed_selection_without_a_dataset_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(corpus(tmp_path), "never")
    plan, _ = run(made, tmp_path / "w")
    folder = plan.node("selection", "top").path
    before = {
        shard.key: Artifact(plan.storage, f"{folder}/{shard.source}").read(shard.shard) for shard in plan.catalog.shards
    }
    # As if the run had died when the first source was through.
    plan.storage.delete_tree(f"{folder}/b")
    plan.storage.delete(f"{folder}/summary.json")
    monkeypatch.setattr("prefsel.select.writer.SHARDS_PER_FILE", 2)
    written: list[str] = []

    def noted(function: Any, items: Any, **kwargs: Any) -> Any:
        if function.__name__ == "write_file":
            written.extend(shard.key for part in items for shard in part.shards)
        return map_shards(function, items, **kwargs)

    monkeypatch.setattr(stage, "map_shards", noted)
    select(plan, plan.node("selection", "top"), QUIET)
    shards = plan.catalog.shards
    assert set(written) == {shard.key for shard in shards if shard.source == "b"} | set(written[:1])
    for shard in shards:
        artifact = Artifact(plan.storage, f"{folder}/{shard.source}")
        assert artifact.read(shard.shard).equals(before[shard.key])
    assert verify(plan.storage).is_clean


@pytest.mark.usefixtures("local_ray")
def test_a_lost_selection_is_written_again_beside_its_dataset(tmp_path: Path) -> None:
    made = config(corpus(tmp_path), "always")
    plan, reports = run(made, tmp_path / "w")
    plan.storage.delete_tree("selections")
    _, again = run(made, tmp_path / "w")
    first, second = (next(r.details for r in found if r.name == "top") for found in (reports, again))
    assert first == second
    assert verify(plan.storage).is_clean


@pytest.mark.usefixtures("local_ray")
def test_rows_of_another_corpus_are_not_read_through(tmp_path: Path) -> None:
    plan, _ = run(config(corpus(tmp_path), "never"), tmp_path / "w")
    folder = plan.node("selection", "top").path
    shard = next(
        s for s in plan.catalog.shards if Artifact(plan.storage, f"{folder}/{s.source}").read(s.shard).num_rows
    )
    artifact = Artifact(plan.storage, f"{folder}/{shard.source}")
    table = artifact.read(shard.shard)
    moved = table.set_column(
        table.column_names.index("row"), "row", pa.array([(r + 1) % 7 for r in table["row"].to_pylist()])
    )
    artifact.commit(shard.shard, moved, made_from="x", attempt="x")
    with pytest.raises(IntegrityError, match=f"{shard.key}: its pair_ids are not those"):
        list(read_through(plan, "top").tables(TEXT))


@pytest.mark.usefixtures("local_ray")
def test_a_lost_shard_of_a_selection_is_named(tmp_path: Path) -> None:
    plan, _ = run(config(corpus(tmp_path), "never"), tmp_path / "w")
    shard = plan.catalog.shards[-1]
    plan.storage.delete(f"{plan.node('selection', 'top').path}/{shard.key}.parquet")
    with pytest.raises(IntegrityError, match=f"{shard.key}.parquet: missing"):
        list(read_through(plan, "top").tables(TEXT))


@pytest.mark.usefixtures("local_ray")
def test_a_dataset_asked_for_later_is_written(tmp_path: Path) -> None:
    sources = corpus(tmp_path)
    run(config(sources, "never"), tmp_path / "w")
    plan, reports = run(config(sources, "always"), tmp_path / "w")
    dataset = plan.node("dataset", "top").path
    assert dataset is not None
    rows = pa.concat_tables(Dataset(plan.storage, dataset).tables(["pair_id", "score"]))
    assert rows.equals(pa.concat_tables(read_through(plan, "top").tables(["pair_id", "score"])))
    assert next(r for r in reports if r.name == "top").details["dataset"] == dataset
    _, without = run(config(sources, "never"), tmp_path / "w")
    report = next(r for r in without if r.name == "top")
    assert (report.details["dataset"], report.computed_shards) == (None, 0)
    assert verify(plan.storage).is_clean


# -------------------------------------------------------------------------------------------------------- what is read


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each column of a shard is read, `<kind>.<column>`, by tasks that run here, one after another."""
    reads: Counter[str] = Counter()
    real = Artifact.read

    def read(artifact: Artifact, shard: str, columns: list[str] | None = None) -> pa.Table:
        table = real(artifact, shard, columns)
        reads.update(f"{artifact.path.split('/')[0]}.{name}" for name in table.column_names)
        return table

    def serial(function: Any, items: Any, *, shared: Any = None, **_: Any) -> list[Any]:
        return [function(item, shared) for item in items]

    monkeypatch.setattr(Artifact, "read", read)
    monkeypatch.setattr(stage, "map_shards", serial)
    return reads


WRITTEN = {"score": 1, "pair_id": 1, "aspect": 1, "chosen_length": 1, "rejected_length": 1}
"""Of scores, for the rows that are written."""
READ_FOR = {
    "top": (TOP, {"score": 2, "pair_id": 1}),  # its cut ties: a second round asks about ids
    "all": ({**TOP, "ratio": 1}, {"score": 1}),
    "band": ({"kind": "band", "score": "score_margin", "low": 10, "high": 60}, {"score": 1}),
    "quota": ({**TOP, "kind": "quota", "by": ["aspect"]}, {"score": 2, "pair_id": 1, "aspect": 2}),
    "length": ({**TOP, "kind": "quota", "by": ["length_bin"]}, None),
}
"""Rules, and what is read of every score shard to find their thresholds."""


def shards_of(plan: Plan, folder: str) -> list[pa.Table]:
    storage = plan.storage
    return [Artifact(storage, f"{folder}/{shard.source}").read(shard.shard) for shard in plan.catalog.shards]


@pytest.mark.usefixtures("local_ray")
def test_a_selection_without_a_dataset_reads_scores_and_ids_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selections = [{"name": name, "rule": rule, "dataset": "never"} for name, (rule, _) in READ_FOR.items()]
    plan, _ = run(config(corpus(tmp_path), "never", selections=selections), tmp_path / "w")
    reads = counted(monkeypatch)
    for name, (_, searched) in READ_FOR.items():
        folder = plan.node("selection", name).path
        kept = shards_of(plan, folder)
        plan.storage.delete_tree(folder)
        reads.clear()
        select(plan, plan.node("selection", name), QUIET)
        per_shard = {column: count / len(plan.catalog.shards) for column, count in reads.items()}
        pairs = {column: count for column, count in per_shard.items() if not column.startswith("scores.")}
        assert pairs == {"pairs.pair_id": 1, "pairs.prompt_id": 1}
        if searched is not None:
            expected = Counter(WRITTEN) + Counter(searched)
            assert per_shard == {**pairs, **{f"scores.{column}": count for column, count in expected.items()}}
        assert shards_of(plan, folder) == kept


@pytest.mark.usefixtures("local_ray")
def test_scores_of_an_earlier_version_are_selected_from(tmp_path: Path) -> None:
    """Their shards have no lengths: these are counted again from the groups."""
    by_length = {"kind": "quota", "score": "score_margin", "by": ["length_bin"], "ratio": 0.3}
    selections = [{"name": "top", "rule": TOP}, {"name": "length", "rule": by_length}]
    made = config(corpus(tmp_path), "never", selections=[{**one, "dataset": "never"} for one in selections])
    plan, reports = run(made, tmp_path / "w")
    folder = plan.node("scores", "margin").path
    for shard in plan.catalog.shards:
        artifact = Artifact(plan.storage, f"{folder}/{shard.source}")
        entry = artifact.entries()[shard.shard]
        table = artifact.read(shard.shard).drop_columns(["chosen_length", "rejected_length"])
        artifact.commit(shard.shard, table, made_from=entry.input, attempt=entry.attempt, info=entry.info)
    plan.storage.delete_tree("selections")
    _, again = run(made, tmp_path / "w")
    for name in ("top", "length"):
        first, second = (next(one for one in found if one.name == name) for found in (reports, again))
        assert first.details == second.details
        assert (first.rows_out, first.dropped) == (second.rows_out, second.dropped)
