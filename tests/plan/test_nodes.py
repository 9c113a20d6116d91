"""The order of the work: everything after what it needs, circles refused, and what each kind of node needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.plan.check import check_names
from prefsel.plan.columns import column_names, dataset_scorers, scorers_by_column
from prefsel.plan.nodes import NON_TRAJECTORY_KEYS, all_nodes, make_plan
from prefsel.plan.plan import Plan, in_order
from prefsel.workspace.storage import Storage

DPO = {"model": "policy", "reference": "policy", "learning_rate": 1e-3}


def plan_of(tmp_path: Path, **parts: Any) -> Plan:
    table = {
        "name": "graph",
        "sources": [{"name": "corpus", "paths": ["corpus.jsonl"]}],
        "split": {"holdout": 0.1, "proxy": 0.1, "validation": 0.1},
        "models": [{"kind": "scratch_policy", "name": "policy"}],
        "scorers": [{"kind": "causal_logps", "model": "policy"}],
        **parts,
    }
    return make_plan(parse_config(table), Storage(str(tmp_path)))


def influence(tmp_path: Path) -> Plan:
    """Warm-up, validation model, tangent, two bands, and a training that goes on from the warm-up."""
    band = {"kind": "band", "low": 10, "high": 90}
    return plan_of(
        tmp_path,
        train=[
            {**DPO, "name": "final", "selection": "both", "model": "theta"},
            {**DPO, "name": "theta", "selection": "all"},
            {**DPO, "name": "theta_val", "selection": "validation", "model": "theta"},
        ],
        tangents=[{"name": "v", "model": "theta", "reference": "policy"}],
        scorers=[
            {"kind": "directional_logps", "tangent": "v"},
            {"kind": "causal_logps", "model": "theta_val"},
            {"kind": "causal_logps", "model": "theta"},
            {"kind": "causal_logps", "model": "policy"},
        ],
        metrics=[
            {"name": "if", "metric": "influence", "params": {"policy": "theta", "reference": "policy", "tangent": "v"}},
            {
                "name": "ld",
                "metric": "lossdiff",
                "params": {"policy": "theta", "validation_policy": "theta_val", "reference": "policy"},
            },
        ],
        selections=[
            {
                "name": "both",
                "rule": {"kind": "intersect", "rules": [{**band, "score": "score_if"}, {**band, "score": "score_ld"}]},
            }
        ],
    )


def test_everything_comes_after_what_it_needs(tmp_path: Path) -> None:
    order = all_nodes(influence(tmp_path))
    assert len(order) == len(set(order))
    for place, node in enumerate(order):
        assert {need.node for need in node.needs} <= set(order[:place])
    names = [str(node) for node in order]
    expected = ["scratch policy", "columns policy", "model theta", "tangent v", "columns dlogps-v"]
    expected += ["scores if", "selection both", "model final"]
    assert [name for name in names if name in expected] == expected
    assert names.index("model theta_val") < names.index("columns theta_val") < names.index("scores ld")


def test_a_part_of_the_job_takes_only_what_it_needs(tmp_path: Path) -> None:
    order = [str(node) for node in in_order([influence(tmp_path).node("scores", "if")])]
    assert "model theta" in order
    assert not {"model theta_val", "model final", "scores ld", "selection both"} & set(order)


def test_a_circle_is_refused_and_named(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        train=[{**DPO, "name": "theta", "selection": "best"}],
        scorers=[{"kind": "causal_logps", "model": "policy"}, {"kind": "causal_logps", "model": "theta"}],
        metrics=[{"name": "gap", "metric": "difficulty_gap", "params": {"policy": "theta", "reference": "policy"}}],
        selections=[{"name": "best", "rule": {"kind": "top", "score": "score_gap", "ratio": 0.5}}],
    )
    circle = "model theta → selection best → scores gap → columns theta → model theta"
    with pytest.raises(UserError, match=f"model theta needs itself: {circle}"):
        plan.node("model", "theta")
    with pytest.raises(UserError, match="needs itself"):  # a node that failed is not there the second time either
        plan.node("scores", "gap")


def needed(plan: Plan, kind: Any, name: str) -> list[str]:
    return [str(need.node) for need in plan.node(kind, name).needs]


def test_a_reward_training_with_aspects_is_one_column_set_per_aspect(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        train=[{"kind": "reward", "name": "rm", "model": "policy", "learning_rate": 1e-3, "aspects": ["a", "b"]}],
        scorers=[{"kind": "reward_model", "model": "rm"}],
        metrics=[{"name": "pd", "metric": "preference_divergence", "params": {"aspects": ["a", "b"]}}],
    )
    assert needed(plan, "scores", "pd") == ["columns rm-a", "columns rm-b", "eligible all"]
    assert needed(plan, "columns", "rm-a") == ["model rm-a"]
    assert scorers_by_column(plan)["rm_b"] is plan.scorers[1]


def test_a_dataset_holds_what_its_rule_reads_and_nothing_trained_on_it(tmp_path: Path) -> None:
    plan = influence(tmp_path)
    made = [column_names(plan, scorer)[0] for scorer in dataset_scorers(plan, "both")]
    assert made == ["dlogps_v", "logps_theta_val", "logps_theta", "logps_policy"]
    assert [column_names(plan, scorer)[0] for scorer in dataset_scorers(plan, "all")] == ["logps_policy"]


def test_a_control_comes_after_its_selection_and_draws_from_its_own_scores(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        scorers=[{"kind": "imported", "name": "gold", "field": "score"}],
        models=[],
        metrics=[{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
        selections=[
            {
                "name": "best",
                "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5},
                "controls": ["random", "reverse"],
            }
        ],
    )
    assert needed(plan, "selection", "best") == ["scores margin", "columns gold"]
    assert needed(plan, "selection", "best-random") == ["scores random-margin", "selection best", "columns gold"]
    assert needed(plan, "selection", "best-reverse") == ["scores margin", "selection best", "columns gold"]
    assert "scores margin" in needed(plan, "scores", "random-margin")


def test_a_selection_without_a_dataset_needs_only_what_its_rule_reads(tmp_path: Path) -> None:
    def chain(dataset: str) -> Plan:
        """`second` is trained on the same pairs with the model `first` as its reference."""
        return plan_of(
            tmp_path,
            train=[
                {**DPO, "name": "first", "selection": "best"},
                {**DPO, "name": "second", "selection": "best", "model": "first", "reference": "first"},
            ],
            scorers=[
                {"kind": "imported", "name": "gold", "field": "score"},
                *({"kind": "causal_logps", "model": model} for model in ("policy", "first")),
            ],
            metrics=[{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
            selections=[
                {"name": "best", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}, "dataset": dataset}
            ],
        )

    with pytest.raises(UserError, match="needs itself"):  # the dataset would hold the reference's log-probs
        chain("always").node("model", "second")
    order = [str(node) for node in in_order([chain("never").node("model", "second")])]
    assert order.index("selection best") < order.index("model first") < order.index("columns first")
    assert order[-1] == "model second"


@pytest.mark.parametrize(
    ("taken", "controls"), [("kept.fuse", []), ("kept-random.random", ["random"]), ("kept-reverse.fuse", ["reverse"])]
)
def test_a_metric_is_not_called_like_a_score_that_a_rule_makes(tmp_path: Path, taken: str, controls: list[str]) -> None:
    """Both would stand in `score_<name>`, and the report and `prefsel.open` show one of them for both."""

    def checked(name: str, rule: dict[str, Any]) -> None:
        metrics = [
            {"name": one, "metric": "implicit_margin", "params": {"policy": "policy"}} for one in ("a", "b", name)
        ]
        selections = [{"name": "kept", "rule": {**rule, "ratio": 0.5}, "controls": controls}]
        check_names(plan_of(tmp_path, metrics=metrics, selections=selections))

    fused = {"kind": "fuse", "scores": ["score_a", "score_b"], "how": "rank"}
    with pytest.raises(UserError, match=rf"metrics.name: got '{taken}'; valid: another name: selection kept makes"):
        checked(taken, fused)
    checked(taken, {"kind": "top", "score": "score_a"})
    checked(f"other-{taken}", fused)


RIGHT = {"name": "right", "metric": "reliability", "params": {"policy": "theta", "reference": "policy"}}
MARGIN = {"name": "margin", "metric": "implicit_margin", "params": {"policy": "theta", "reference": "policy"}}


def weighed(tmp_path: Path, **more: Any) -> Plan:
    """A warm-up whose margins say how probable labels are, and a training that takes them as weights."""
    return plan_of(
        tmp_path,
        train=[
            {**DPO, "name": "theta", "selection": "all"},
            {**DPO, "name": "final", "selection": "all", "weight": "right", **more},
            {**DPO, "name": "plain", "selection": "all"},
        ],
        scorers=[{"kind": "causal_logps", "model": "policy"}, {"kind": "causal_logps", "model": "theta"}],
        metrics=[RIGHT, MARGIN],
        selections=[
            {
                "name": "sure",
                "rule": {"kind": "agree", "scores": ["score_right", "score_margin"], "action": "flip"},
                "controls": ["random", "reverse"],
            }
        ],
    )


def test_a_weight_is_made_before_the_training_that_takes_it(tmp_path: Path) -> None:
    order = [str(node) for node in all_nodes(weighed(tmp_path))]
    assert order.index("model theta") < order.index("columns theta") < order.index("scores right")
    assert order.index("scores right") < order.index("model final")
    needs = {
        name: [str(need.node) for need in weighed(tmp_path).node("model", name).needs] for name in ("final", "plain")
    }
    assert "scores right" in needs["final"]
    assert "scores right" not in needs["plain"]


def test_what_a_weight_does_stands_in_the_settings_of_a_training_that_has_one(tmp_path: Path) -> None:
    """Its metric stands upstream; a training without weights is written as it was before there were any."""
    written = {
        name: weighed(tmp_path, weighting="label").node("model", name).spec.model_dump(exclude=NON_TRAJECTORY_KEYS)
        for name in ("final", "plain")
    }
    assert written["final"] == written["plain"] | {"weighting": "label"}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"weight": "wrong"}, r"train.final.weight: got 'wrong'; .*valid: right, margin"),
        ({"selection": "sure"}, r"train.final.weight: got 'right'; valid: none: selection 'sure' turns labels"),
    ],
)
def test_a_weight_that_cannot_be_one_is_refused(tmp_path: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_names(weighed(tmp_path, **more))
    check_names(weighed(tmp_path, selection="sure-random"))  # labelled as they were


def test_a_policy_that_is_trained_with_its_own_weights_is_a_circle(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        train=[{**DPO, "name": "theta", "selection": "all", "weight": "right"}],
        scorers=[{"kind": "causal_logps", "model": "policy"}, {"kind": "causal_logps", "model": "theta"}],
        metrics=[RIGHT],
    )
    with pytest.raises(UserError, match="needs itself"):
        all_nodes(plan)
