"""Compound rules on a real local Ray, from files to datasets: derived scores, controls, reports, explanations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from naive_rules import Row, naive_select
from stage_runs import run

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.ingest.identity import completion_id, pair_id, prompt_id
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.report.contents import Contents
from prefsel.report.explain import explain_row, find_pair
from prefsel.rules import reversed_rule, rule_scores
from prefsel.stages import select as stage
from prefsel.stages.report import examples
from prefsel.stages.select import select
from prefsel.stages.tasks import map_shards
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

pytestmark = pytest.mark.usefixtures("local_ray")

QUIET = Progress(quiet=True)
SCORES = ("a", "b")


LABELS = ((0, 1, "help"), (1, 0, "truth"), (2, 3, "help"), (4, 0, None), (3, 1, None))
"""Chosen, rejected and aspect of a prompt's pairs; the first two are of the same completions."""


def corpus(folder: Path) -> tuple[dict[str, str], list[Row]]:
    """Two files of pairs with many ties; prompts and completions come back, some completions lack a number."""
    rng = np.random.default_rng(5)
    paths, rows = {}, []
    for source, num_prompts in (("uf", 6), ("hh", 4)):
        lines = []
        ratings = {
            (prompt, one): {name: float(rng.choice([0.5, 0.5, -1.0, 2.0, 3.25])) for name in SCORES}
            for prompt in range(num_prompts)
            for one in range(5)
        }
        del ratings[1, 0]["b"], ratings[2, 3]["b"]
        for prompt in range(num_prompts):
            for chosen, rejected, aspect in LABELS:
                texts = [f"answer {one} " + "x" * (3 * one) for one in (chosen, rejected)]
                numbers = [ratings[prompt, one] for one in (chosen, rejected)]
                sides = {f"{name}_{s}": n[name] for s, n in zip(("chosen", "rejected"), numbers) for name in n}
                # The same pair in both files would be a duplicate: the second file labels it with another aspect.
                label = f"{aspect or 'none'}-hh" if source == "hh" else aspect
                line = {"prompt": f"p{prompt}", "chosen": texts[0], "rejected": texts[1], "aspect": label, **sides}
                lines.append(line)
                rows.append(row_of(line, source, numbers))
        path = folder / f"{source}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths[source] = str(path)
    return paths, rows


def row_of(line: dict[str, Any], source: str, numbers: list[dict[str, float]]) -> Row:
    """What the naive rules need to know of an input line."""
    prompt = prompt_id([{"role": "user", "content": line["prompt"]}])
    texts = line["chosen"], line["rejected"]
    ids = [completion_id(prompt, [{"role": "assistant", "content": text}]) for text in texts]
    first, second = numbers
    margins = {name: first[name] - second[name] if name in first and name in second else None for name in SCORES}
    return {
        "id": int.from_bytes(pair_id(prompt, *ids, line["aspect"]), "big"),
        **{name: line[name] for name in ("prompt", "chosen", "rejected", "aspect")},
        "source": source,
        "lengths": tuple(len(text) for text in texts),
        **{f"score_{name}": margin for name, margin in margins.items()},
    }


TOP = {"kind": "top", "score": "score_b", "ratio": 0.5}
BANDS = [{"kind": "band", "score": f"score_{name}", "low": 10, "high": 90} for name in SCORES]
FUSE = {"kind": "fuse", "scores": ["score_a", "score_b"], "how": "rank", "weights": [1, 0.5], "ratio": 0.4}
RULES: dict[str, dict[str, Any]] = {
    "above": {"kind": "above", "score": "score_a", "threshold": 0.0},
    "bins": {"kind": "quota", "score": "score_a", "by": ["source", "length_bin"], "length_bins": 3, "ratio": 0.4},
    "rank": FUSE,
    "zscore": {**FUSE, "how": "zscore", "by": "aspect"},
    "both": {"kind": "intersect", "rules": BANDS},
    "middle": {"kind": "intersect", "rules": BANDS, "budget": {"ratio": 0.3}},
    "once": {"kind": "dedupe", "by": "pair", "rule": FUSE},
    "between": {"kind": "threshold", "score": "score_a", "low": -1.5, "high": 1.0},
    "each": {"kind": "threshold", "score": "score_a", "by": "source", "low": {"uf": 0.0, "hh": 1.25}},
    "rip": {
        "kind": "intersect",
        "rules": [
            {"kind": "threshold", "score": "score_a", "low": 0.0},
            {"kind": "threshold", "score": "score_b", "high": 0.0},
        ],
    },
    "agree": {"kind": "agree", "scores": ["score_a", "score_b"]},
    "deep": {"kind": "intersect", "rules": [{"kind": "dedupe", "by": "prompt", "rule": TOP}, {**FUSE, "ratio": 0.9}]},
}


CONTROLLED = ("above", "rank", "both", "once", "between", "agree")


def config(paths: dict[str, str], **more: Any) -> Any:
    selections = [{"name": name, "rule": rule} for name, rule in RULES.items()]
    for one in selections:
        if one["name"] in CONTROLLED:
            one["controls"] = ["random", "reverse"]
    return parse_config(
        {
            "name": "t",
            "sources": [{"name": name, "paths": [path]} for name, path in paths.items()],
            "ingest": {"rows_per_shard": 12},
            "duplicates": {"contradictions": "keep"},
            "scorers": [{"kind": "imported", "name": name, "field": name} for name in SCORES],
            "metrics": [{"name": n, "metric": "explicit_margin", "params": {"rm": n}} for n in SCORES],
            "selections": selections,
        }
        | more
    )


def dataset(plan: Plan, name: str) -> pa.Table:
    folder = plan.storage.local(plan.node("dataset", name).path)
    return pa.concat_tables(pq.read_table(file) for file in sorted((folder / "data").glob("*.parquet")))


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> tuple[Any, Path, Plan, list[StageReport], list[Row]]:
    home = tmp_path_factory.mktemp("compose")
    paths, rows = corpus(home)
    made = config(paths)
    return made, home / "w", *run(made, home / "w"), rows


def chosen_by(rule: dict[str, Any], rows: list[Row]) -> list[str]:
    return sorted(f"{rows[n]['id']:032x}" for n in naive_select(rule, rows))


@pytest.mark.parametrize("name", RULES)
def test_selections_and_reverses_are_the_naive_ones(done: Any, name: str) -> None:
    _, _, plan, _, rows = done
    assert len(plan.catalog.shards) == 5
    assert sorted(dataset(plan, name)["pair_id"].to_pylist()) == chosen_by(RULES[name], rows)
    if name in CONTROLLED:
        reverse = dataset(plan, f"{name}-reverse")["pair_id"].to_pylist()
        assert sorted(reverse) == chosen_by(reversed_rule(RULES[name]), rows)


def test_what_rests_on_moments_lists_the_pairs_beside_its_threshold(done: Any) -> None:
    """The z-scores of this corpus are a few per unit: none lies so close. Ranks and plain margins have no moments."""
    _, _, _, reports, _ = done
    close = {report.name: report.details.get("close") for report in reports if report.stage == "select"}
    assert close["zscore"] == {"tolerance": 1e-12, "count": 0, "pairs": []}
    assert {name for name, found in close.items() if found is not None} == {"zscore"}


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_random_control_is_as_large_and_of_the_same_population(done: Any, name: str) -> None:
    _, _, plan, _, rows = done
    kept = dataset(plan, f"{name}-random")
    assert kept.num_rows == dataset(plan, name).num_rows
    by_id = {f"{row['id']:032x}": row for row in rows}
    drawn = [by_id[one] for one in kept["pair_id"].to_pylist()]
    needed = [f"score_{metric}" for metric in rule_scores(RULES[name])]
    assert all(row[score] is not None for row in drawn for score in needed)
    if name == "once":
        pairs = [(row["prompt"], frozenset((row["chosen"], row["rejected"]))) for row in drawn]
        assert len(set(pairs)) == len(pairs)
    else:
        assert len({row["prompt"] for row in drawn}) < len(drawn)
    assert kept["pair_id"].to_pylist() != dataset(plan, name)["pair_id"].to_pylist()


def test_every_pair_is_accounted_for_and_everything_is_verified(done: Any) -> None:
    _, _, plan, reports, rows = done
    made = {report.name: report for report in reports if report.stage == "fuse"}
    kept = {report.name: report for report in reports if report.stage == "select"}
    assert made["rank.fuse"].rows_in == len(rows) == 50
    # In each file: the first answer to p1, chosen once and rejected twice, and the fourth to p2, once each.
    assert made["rank.fuse"].dropped == {"missing_rm_b_chosen": 4, "missing_rm_b_rejected": 6}
    assert made["once.dedupe"].dropped["same_pair"] > 10
    # Of an intersection without a budget the first score is shown; it has pairs that the second lacks.
    assert kept["both"].rows_in == 50
    assert kept["both"].dropped["missing_rm_b_chosen"] == 4
    assert kept["both"].details["metric"] == "a"
    assert kept["once"].rows_in == made["once.dedupe"].rows_out
    assert kept["once"].details["metric"] == "once.dedupe"
    assert verify(plan.storage).is_clean


def test_controls_share_the_scores_of_their_selection(done: Any) -> None:
    _, _, plan, reports, _ = done
    names = [report.name for report in reports if report.stage == "fuse"]
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith("rank")] == ["rank.fuse", "rank-random.random"]
    # A reversed dedupe keeps other pairs, of the same fused score.
    once = [name for name in names if name.startswith("once")]
    assert once == ["once.fuse", "once.dedupe", "once-random.random", "once-random.dedupe", "once-reverse.dedupe"]
    assert {name.split("@")[0] for name in plan.storage.folders("scores")} == {*names, "a", "b", "random-a"}


def test_reports_of_derived_scores_look_like_those_of_metrics(done: Any) -> None:
    _, _, _, reports, rows = done
    metric = next(report for report in reports if report.stage == "metric")
    fuse = next(report for report in reports if report.name == "zscore.fuse")
    assert set(fuse.details) == set(metric.details)
    assert fuse.details["kind"] == "fuse by zscore"
    assert fuse.details["params"]["weights"] == [1.0, 0.5]
    both = [row["score_a"] for row in rows if row["score_b"] is not None]
    assert fuse.details["fitted"]["score_a"]["mean"] == pytest.approx(np.mean(both))
    assert fuse.details["fitted"]["score_a"]["std"] == pytest.approx(np.std(both))


def test_edges_of_length_bins_are_reported(done: Any) -> None:
    _, _, _, reports, rows = done
    report = next(report for report in reports if report.stage == "select" and report.name == "bins")
    gaps = [abs(chosen - rejected) for chosen, rejected in (row["lengths"] for row in rows)]
    assert report.details["length_edges"] == [pytest.approx(np.quantile(gaps, [1 / 3, 2 / 3]))]


def test_the_percentiles_that_a_budget_reached_are_reported(done: Any) -> None:
    _, _, plan, reports, _ = done
    report = next(report for report in reports if report.stage == "select" and report.name == "middle")
    worst = -dataset(plan, "middle")["score"].to_numpy().min()
    distances = [abs(pct - 50) for ends in report.details["percentiles"].values() for pct in ends]
    assert max(distances) == pytest.approx(worst)
    assert set(report.details["percentiles"]) == {"a", "b"}


def test_explanations_and_examples_follow_the_derived_scores(done: Any) -> None:
    _, _, plan, reports, _ = done
    kept = dataset(plan, "once")["pair_id"].to_pylist()[0]
    contents = Contents(plan.storage, plan.catalog, tuple(reports))
    ((shard, _, full),) = find_pair(contents, kept)
    lines = list(explain_row(contents, shard, full))
    assert sum(line.startswith("score     once.dedupe:") for line in lines) == 1
    assert any(line.startswith("selection once: kept") for line in lines)
    assert any(line.startswith("selection middle:") and "percentiles reached {'a':" in line for line in lines)
    for name, sign in (("once", 1), ("once-reverse", -1), ("both", 1), ("middle", 1)):
        report = next(one for one in reports if one.stage == "select" and one.name == name)
        shown = examples(plan, report, is_random=False)
        assert {one["kind"] for one in shown} == {"just kept", "just dropped", "kept", "dropped"}
        ids = dataset(plan, name)["pair_id"].to_pylist()
        assert all((one["pair_id"] in ids) == ("kept" in one["kind"]) for one in shown)
        if name != "both":
            worst = min(sign * one["score"] for one in shown if "kept" in one["kind"])
            assert all(sign * one["score"] <= worst for one in shown if "dropped" in one["kind"])


def test_a_second_run_computes_nothing(done: Any) -> None:
    made, workspace, _, first, _ = done
    files = {p: p.stat().st_mtime_ns for p in workspace.rglob("*") if p.is_file()}
    _, reports = run(made, workspace)
    assert all(report.computed_shards == 0 for report in reports)
    assert [report.name for report in reports] == [report.name for report in first]
    assert {p: p.stat().st_mtime_ns for p in workspace.rglob("*") if p.is_file()} == files


def test_a_killed_run_continues(done: Any, tmp_path: Path) -> None:
    made, workspace, plan, _, _ = done
    made = made.model_copy(update={"selections": [one for one in made.selections if one.name == "rank"]})
    again = tmp_path / "w"
    shutil.copytree(workspace, again)
    storage = Storage(str(again))
    kept = dataset(plan, "rank")["pair_id"].to_pylist()
    # As if the run had died while the fused scores were written: three of five shards are there, and no summary.
    (folder,) = (name for name in storage.folders("scores") if name.startswith("rank.fuse@"))
    storage.delete(f"scores/{folder}/summary.json")
    for shard in plan.catalog.shards[3:]:
        storage.delete(f"scores/{folder}/{shard.source}/_ledger/{shard.shard}.json")
    storage.delete_tree("selections")
    storage.delete_tree("datasets")
    resumed, reports = run(made, again)
    assert next(report for report in reports if report.name == "rank.fuse").computed_shards == 2
    attempts = [Artifact(storage, f"scores/{folder}/{source}").attempts() for source in ("uf", "hh")]
    assert sorted(count for counted in attempts for count in counted.values()) == [1] * 3 + [2] * 2
    assert dataset(resumed, "rank")["pair_id"].to_pylist() == kept


def test_what_was_committed_before_a_kill_is_not_committed_again(done: Any, tmp_path: Path) -> None:
    """In every pass over numbers, one of whose shards is lacking: also where all shards decide together."""
    made, workspace, plan, _, _ = done
    again = tmp_path / "w"
    shutil.copytree(workspace, again)
    storage = Storage(str(again))
    last = plan.catalog.shards[-1]
    paths = [f"{kind}/{name}" for kind in ("eligible", "scores", "selections") for name in storage.folders(kind)]
    for path in paths:
        storage.delete(f"{path}/summary.json")
        storage.delete(f"{path}/{last.source}/_ledger/{last.shard}.json")
    storage.delete_tree("datasets")
    left = {path: Artifact(storage, f"{path}/{last.source}").entries() for path in paths}
    resumed, reports = run(made, again)
    assert all(report.computed_shards == 1 for report in reports if report.stage in ("eligible", "metric", "fuse"))
    for path, entries in left.items():
        now = Artifact(storage, f"{path}/{last.source}").entries()
        assert last.shard in now
        assert {shard: now[shard].attempt for shard in entries} == {s: one.attempt for s, one in entries.items()}
    for name in made.selections:
        assert dataset(resumed, name.name).equals(dataset(plan, name.name))


def test_nothing_with_both_scores_is_refused(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n}", "chosen": "y", "rejected": "z", "a_chosen": n, "a_rejected": 0} for n in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = config({"a": str(path)}, selections=[{"name": "rank", "rule": FUSE}])
    with pytest.raises(UserError, match=r"selections\.rank: no pair is eligible; dropped: .'missing_rm_b_chosen': 3"):
        run(made, tmp_path / "w")


# -------------------------------------------------------------------------------------------------- eligibility


def sources(folder: Path, prompts: dict[str, list[int]]) -> list[dict[str, Any]]:
    found = []
    for role, numbers in prompts.items():
        path = folder / f"{role}.jsonl"
        values = {"a_chosen": 1, "a_rejected": 0}
        rows = [{"prompt": f"p{n}", "chosen": f"{role} y", "rejected": "z", **values} for n in numbers]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append({"name": f"{role}-set", "paths": [str(path)], "role": role})
    return found


ONE_SCORE = {
    "scorers": [{"kind": "imported", "name": "a", "field": "a"}],
    "metrics": [{"name": "a", "metric": "explicit_margin", "params": {"rm": "a"}}],
    "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_a", "ratio": 1}}],
}


def test_a_validation_source_that_shares_prompts_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = config({}, sources=sources(tmp_path, {"train": list(range(20)), "validation": [*range(8), 99]}), **ONE_SCORE)
    with pytest.raises(UserError) as error:
        run(made, tmp_path / "w")
    message = str(error.value)
    assert "sources.validation-set (role validation): 8 prompts also stand in train-set (role train), first" in message
    assert prompt_id([{"role": "user", "content": "p0"}]).hex() in message
    assert message.count(",") >= 4
    assert "split.validation" in message
    assert not (tmp_path / "w" / "eligible").exists()


def test_validation_prompts_that_are_excluded_or_held_out_are_shared_by_nobody(tmp_path: Path) -> None:
    exclude = tmp_path / "exclude.jsonl"
    exclude.write_text(json.dumps({"prompt": "p3"}) + "\n")
    given = sources(tmp_path, {"train": [0, 1, 2, 3, 4], "validation": [2, 3, 7, 8], "holdout": [2]})
    made = config({}, sources=given, exclude_prompts=[str(exclude)], **ONE_SCORE)
    _, reports = run(made, tmp_path / "w")
    eligible = next(report for report in reports if report.stage == "eligible")
    assert eligible.dropped == {"excluded_prompt": 2, "holdout": 1, "holdout_prompt": 2, "validation": 2}
    assert eligible.rows_out == 3


@pytest.mark.parametrize(
    ("name", "passes"),
    [("rank", ["_answer", "write_file"]), ("both", [*["_answer"] * 4, "count_kept", "write_file"])],
)
def test_a_rule_of_one_leaf_takes_one_light_pass(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, passes: list[str]
) -> None:
    _, workspace, _, _, _ = done
    made = done[0]
    shutil.copytree(workspace, tmp_path / "w")
    plan = make_plan(made, Storage(str(tmp_path / "w")))
    plan.storage.delete_tree(plan.node("selection", name).path)
    plan.storage.delete_tree(plan.node("dataset", name).path)
    taken: list[str] = []

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(function.__name__)
        return map_shards(function, *args, **kwargs)

    monkeypatch.setattr(stage, "map_shards", noted)
    select(plan, plan.node("selection", name), QUIET)
    assert taken == passes
    assert dataset(plan, name).equals(dataset(done[2], name))
