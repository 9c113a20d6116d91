"""The order of the work: everything after what it needs, circles refused, and what each kind of node needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.plan.graph import Node, all_nodes, needs, ordered
from prefsel.plan.lineage import Lineage
from prefsel.workspace.storage import Storage

DPO = {"model": "policy", "reference": "policy", "learning_rate": 1e-3}


def lineage(tmp_path: Path, **parts: Any) -> Lineage:
    table = {
        "name": "graph",
        "sources": [{"name": "corpus", "paths": ["corpus.jsonl"]}],
        "split": {"holdout": 0.1, "proxy": 0.1, "validation": 0.1},
        "models": [{"kind": "scratch_policy", "name": "policy"}],
        "scorers": [{"kind": "causal_logps", "model": "policy"}],
        **parts,
    }
    return Lineage(parse_config(table), Storage(str(tmp_path)))


def influence(tmp_path: Path) -> Lineage:
    """Warm-up, validation model, tangent, two bands, and a training that goes on from the warm-up."""
    band = {"kind": "band", "low": 10, "high": 90}
    return lineage(
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
    graph = influence(tmp_path)
    order = ordered(graph, all_nodes(graph))
    assert len(order) == len(set(order))
    assert set(order) == set(all_nodes(graph))
    for place, node in enumerate(order):
        assert set(needs(graph, node)) <= set(order[:place])
    names = [str(node) for node in order]
    expected = ["scratch", "columns policy", "train theta", "tangent v", "columns dlogps-v", "metric if", "select both"]
    assert [name for name in names if name in expected] == expected
    assert names.index("train theta_val") < names.index("columns theta_val") < names.index("metric ld")
    assert names.index("select both") < names.index("train final")


def test_a_part_of_the_job_takes_only_what_it_needs(tmp_path: Path) -> None:
    graph = influence(tmp_path)
    order = [str(node) for node in ordered(graph, [Node("metric", "if")])]
    assert "train theta" in order
    assert not {"train theta_val", "train final", "metric ld", "select both"} & set(order)


def test_a_circle_is_refused_and_named(tmp_path: Path) -> None:
    graph = lineage(
        tmp_path,
        train=[{**DPO, "name": "theta", "selection": "best"}],
        scorers=[{"kind": "causal_logps", "model": "policy"}, {"kind": "causal_logps", "model": "theta"}],
        metrics=[{"name": "gap", "metric": "difficulty_gap", "params": {"policy": "theta", "reference": "policy"}}],
        selections=[{"name": "best", "rule": {"kind": "top", "score": "score_gap", "ratio": 0.5}}],
    )
    with pytest.raises(UserError, match="train theta → select best → metric gap → columns theta → train theta"):
        ordered(graph, [Node("train", "theta")])


def test_a_reward_training_with_aspects_is_one_column_set_per_aspect(tmp_path: Path) -> None:
    graph = lineage(
        tmp_path,
        train=[{"kind": "reward", "name": "rm", "model": "policy", "learning_rate": 1e-3, "aspects": ["a", "b"]}],
        scorers=[{"kind": "reward_model", "model": "rm"}],
        metrics=[{"name": "pd", "metric": "preference_divergence", "params": {"aspects": ["a", "b"]}}],
    )
    assert [str(node) for node in needs(graph, Node("metric", "pd"))] == ["columns rm-a", "columns rm-b"]
    assert [str(node) for node in needs(graph, Node("columns", "rm-a"))] == ["train rm"]
    assert graph.providers["rm_b"] is graph.scorers[1]


def test_a_dataset_holds_what_its_rule_reads_and_nothing_trained_on_it(tmp_path: Path) -> None:
    graph = influence(tmp_path)
    made = [graph.column_names(scorer)[0] for scorer in graph.exported("both")]
    assert made == ["dlogps_v", "logps_theta_val", "logps_theta", "logps_policy"]
    assert [graph.column_names(scorer)[0] for scorer in graph.exported("all")] == ["logps_policy"]


def test_a_selection_without_a_dataset_needs_only_what_its_rule_reads(tmp_path: Path) -> None:
    def chain(dataset: str) -> Lineage:
        """`second` is trained on the same pairs with the model `first` as its reference."""
        return lineage(
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
        ordered(chain("always"), [Node("train", "second")])
    order = [str(node) for node in ordered(chain("never"), [Node("train", "second")])]
    assert order.index("select best") < order.index("train first") < order.index("columns first")
    assert order[-1] == "train second"
