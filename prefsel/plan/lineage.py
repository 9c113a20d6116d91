"""The old names of the plan, for stages that have not moved to nodes yet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from prefsel.config import Config, Selection
from prefsel.pairs.reader import PairReader
from prefsel.plan import columns, models, nodes, scores
from prefsel.plan.models import ModelRef
from prefsel.plan.plan import Plan
from prefsel.workspace.catalog import Catalog
from prefsel.workspace.storage import Storage

__all__ = ["Lineage", "ModelRef"]


class Lineage:
    """A plan under its old names."""

    def __init__(self, config: Config, storage: Storage) -> None:
        self.config, self.storage = config, storage
        self.plan: Plan = nodes.make_plan(config, storage)

    @property
    def catalog(self) -> Catalog:
        return self.plan.catalog

    @property
    def corpus(self) -> str:
        return self.plan.corpus

    @property
    def eligible_recipe(self) -> dict[str, Any]:
        return self.plan.node("eligible", "all").recipe

    @property
    def eligible_folder(self) -> str:
        return self.plan.node("eligible", "all").path

    def scratch_path(self, name: str) -> str:
        return self.plan.node("scratch", name).path

    def model_spec(self, name: str) -> Any:
        return models.model_spec(self.plan, name)

    def model(self, name: str) -> ModelRef:
        return models.find_model(self.plan, name)

    def model_members(self, name: str, aspect: str | None = None) -> dict[Any, ModelRef]:
        return models.find_models(self.plan, name, aspect)

    def scoring_settings(self, name: str) -> dict[str, Any]:
        return models.scoring_settings(self.plan, name)

    @cached_property
    def trainings(self) -> dict[str, Any]:
        return {spec.name: spec for spec in self.config.train}

    @cached_property
    def tangents(self) -> dict[str, Any]:
        return {spec.name: spec for spec in self.config.tangents}

    def training(self, name: str) -> Any:
        return self.trainings[name]

    @property
    def scorers(self) -> list[Any]:
        return self.plan.scorers

    def scorer(self, label: str) -> Any:
        return self.plan.node("columns", label).spec

    def columns_folder(self, scorer: Any) -> str:
        return self.plan.node("columns", scorer.label).path

    def columns_recipe(self, scorer: Any) -> dict[str, Any]:
        return self.plan.node("columns", scorer.label).recipe

    def logps_scorer(self, model: str) -> Any:
        return columns.reference_scorer(self.plan, model)

    def is_early(self, scorer: Any) -> bool:
        return columns.needs_no_training(self.plan, scorer)

    @property
    def length_scorer(self) -> Any:
        return columns.length_scorer(self.plan)

    def reader(self, flat_names: list[str] | None = None, *, field: str = "columns") -> PairReader:
        if flat_names is None:
            return self.reader_of([scorer for scorer in self.scorers if self.is_early(scorer)])
        return self.reader_of(columns.scorers_for(self.plan, flat_names, field=field))

    def reader_of(self, scorers: list[Any], *, lengths: bool = True) -> PairReader:
        return columns.pair_reader(self.plan, scorers, lengths=lengths)

    def text_reader(self) -> PairReader:
        return PairReader(self.storage, self.eligible_folder)

    def column_names(self, scorer: Any) -> list[str]:
        return columns.column_names(self.plan, scorer)

    def scorers_for(self, flat_names: list[str], *, field: str) -> list[Any]:
        return columns.scorers_for(self.plan, flat_names, field=field)

    @property
    def metrics(self) -> dict[str, Any]:
        return scores.metric_specs(self.plan)

    @property
    def controls(self) -> dict[str, str]:
        return scores.control_metrics(self.plan)

    def metric_columns(self, name: str) -> list[str]:
        return scores.metric_columns(self.plan, name)

    def metric_recipe(self, name: str) -> dict[str, Any]:
        return self.plan.node("scores", name).recipe

    def scores_folder(self, name: str) -> str:
        return self.plan.node("scores", name).path

    def selected_folder(self, name: str, rule: Mapping[str, Any]) -> str:
        return self.plan.node("selection", name).path

    def dataset_folder(self, name: str, selection: str) -> str:
        return self.plan.node("dataset", name).path

    def writes_dataset(self, name: str) -> bool:
        return nodes.writes_dataset(self.plan, name)

    def control_rules(self, selection: Selection) -> dict[str, dict[str, Any]]:
        found = (self.plan.node("selection", name) for name in selection.names[1:])
        return {node.name: nodes.selection_rule(self.plan, node) for node in found}

    def selected_dataset(self, name: str) -> str | None:
        return self.plan.node("dataset", name).path if self.writes_dataset(name) else None

    def selected_path(self, name: str) -> str:
        return self.plan.node("selection", name).path

    def exported(self, name: str) -> list[Any]:
        return columns.dataset_scorers(self.plan, name)

    @property
    def holdout_dataset(self) -> str:
        return self.plan.node("dataset", "holdout").path

    def member_recipe(self, member: Any) -> dict[str, Any]:
        return self.plan.node("model", member.label).recipe

    def member_path(self, member: Any) -> str:
        return self.plan.node("model", member.label).path

    def tangent_path(self, name: str) -> str:
        return self.plan.node("tangent", name).path
