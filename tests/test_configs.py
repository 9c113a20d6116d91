"""Every shipped configuration parses, and those for the demo's inputs pass every check on inputs of a few rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefsel.config.file import load_config, parse_config, read_table
from prefsel.demo import on_inputs
from prefsel.errors import UserError
from prefsel.pipeline import run
from prefsel.plan.check import check
from prefsel.progress import Progress
from prefsel.workspace.storage import Storage

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "jobs/configs"
ON_DEMO = sorted(
    f for folder in ("methods", "baselines") for f in (CONFIGS / folder).glob("*.yaml") if f.stem != "base"
)


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_it_parses(file: Path) -> None:
    load_config(file)


@pytest.mark.parametrize("file", ON_DEMO, ids=lambda file: file.stem)
def test_it_fits_the_inputs_of_the_demo(file: Path, small_world: Any, tmp_path: Path) -> None:
    check(parse_config(on_inputs(file, small_world.inputs)), Storage(str(tmp_path)))


ON_WHAT_IT_SAW = {"influence", "lossdiff", "implicit_margin", "less"}
"""Methods whose warm-up, by their papers, is trained on the pairs that it scores; the margin is LossDiff-IRM's."""


def values_in(params: Any) -> set[str]:
    """Every text in a metric's parameters: among them the models that it reads columns of."""
    if isinstance(params, dict | list):
        return {
            one for inside in (params.values() if isinstance(params, dict) else params) for one in values_in(inside)
        }
    return {params} if isinstance(params, str) else set()


@pytest.mark.parametrize("file", ON_DEMO, ids=lambda file: file.stem)
def test_a_model_scores_pairs_it_saw_only_where_its_method_says_so(file: Path) -> None:
    """As docs/methods.md promises: others are cross-fitted, or trained on pairs that are never selected."""
    config = load_config(file)
    judges = {one.name: one for one in config.train}
    read = {name for one in config.metrics if one.metric not in ON_WHAT_IT_SAW for name in values_in(one.params)}
    for name in read & judges.keys():
        assert judges[name].cross_fit or judges[name].selection == "validation", f"{name} saw the pairs it scores"


@pytest.mark.parametrize("file", ON_DEMO, ids=lambda file: file.stem)
def test_a_control_that_is_drawn_is_trained_like_its_selection(file: Path) -> None:
    config = load_config(file)
    trained = {one.selection: one.model_dump(exclude={"name", "selection"}) for one in config.train}
    for selection in config.selections:
        if "random" in selection.controls and selection.name in trained:
            assert trained.get(f"{selection.name}-random") == trained[selection.name]


def test_what_the_promise_is_about_is_there() -> None:
    """The two whose model once was a warm-up on everything: each reads columns of a cross-fitted training."""
    for name, metric in (("dual_margin", "dual"), ("neighbours", "gap"), ("selective_dpo", "easy")):
        config = load_config(CONFIGS / f"methods/{name}.yaml")
        (params,) = (one.params for one in config.metrics if one.name == metric)
        assert [one for one in config.train if one.name in values_in(params) and one.cross_fit]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_rehearsal_runs_on_the_sample_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    fewer = ["models.policy.steps=4", "models.rm.steps=4", "train.dpo-potential30.max_steps=1"]
    outcome = run(load_config(CONFIGS / "real_small.yaml", fewer), str(tmp_path), Progress(quiet=True))
    assert outcome.page is not None
    report = json.loads((tmp_path / outcome.page).with_name("report.json").read_text())
    assert report["run"]["status"] == "done"
    stages = {f"{stage['stage']} {stage['name']}": stage for stage in report["stages"]}
    assert stages["ingest sample"]["rows_in"] == 372
    assert stages["ingest sample"]["dropped"] == {
        "duplicate": 2,
        "quarantined:empty_completion": 1,
        "quarantined:identical_completions": 1,
        "quarantined:not_json": 1,
    }
    assert stages["eligible all"]["dropped"]["contradiction"] == 2
    num_kept = 3 * stages["eligible all"]["rows_out"] // 10
    for name in ("select potential30", "select potential30-random", "train dpo-potential30"):
        assert stages[name]["rows_out"] == num_kept > 50


def test_a_base_is_laid_under(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: a\nsplit: {holdout: 0.1, proxy: 0.2}\nsources: [{name: x, paths: [p]}]\n"
    )
    (tmp_path / "over.yaml").write_text("base: base.yaml\nname: b\nsplit: {proxy: 0.3}\n")
    table = read_table(tmp_path / "over.yaml")
    assert table == {
        "name": "b",
        "split": {"holdout": 0.1, "proxy": 0.3},
        "sources": [{"name": "x", "paths": ["p"]}],
    }


def test_a_base_that_is_laid_over_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="laid over itself"):
        read_table(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "c.yaml")
