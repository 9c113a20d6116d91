"""Everything that can be known to be wrong before anything is started: names, combinations, files, parameters."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from prefsel.config import CausalLogps, Config, Imported, PretrainedModel, Train
from prefsel.errors import UserError, invalid
from prefsel.ingest.formats import FORMATS
from prefsel.ingest.readers import list_files
from prefsel.lineage import Lineage, scorer_label
from prefsel.metrics import METRICS
from prefsel.select.rules import RULES, parse_rule, rule_budget
from prefsel.train.deepspeed_config import refuse_owned
from prefsel.workspace.storage import Storage


def check(config: Config, storage: Storage) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        UserError: names the field, the value and the valid ones.
    """
    for field in ("sources", "models", "metrics", "selections", "train"):
        _require_unique(field, [record.name for record in getattr(config, field)])
    _require_unique("scorers", [scorer_label(scorer) for scorer in config.scorers])
    controls = [f"{s.name}-{control}" for s in config.selections for control in s.controls]
    _require_unique("selections", [s.name for s in config.selections] + controls)
    for source in config.sources:
        if source.format != "auto" and source.format not in FORMATS:
            raise invalid(f"sources.{source.name}.format", source.format, ["auto", *FORMATS])
    for path in [path for source in config.sources for path in source.paths] + config.exclude_prompts:
        list_files(path)
    lineage = Lineage(config, storage)
    _check_models(config, lineage)
    _check_selections(config, lineage)
    for spec in config.train:
        _check_training(config, spec)


def check_budgets(config: Config, eligible: int) -> None:
    """Refuse a budget above the eligible pairs, before any model has run.

    Raises:
        UserError: names both numbers.
    """
    for selection in config.selections:
        rule = parse_rule(selection.rule)
        if hasattr(rule, "count"):
            try:
                budget = rule_budget(rule, eligible)  # type: ignore[arg-type]
                if not budget:
                    raise UserError(f"rule {rule.kind}: its budget of {eligible:,} eligible pairs is 0; raise it")
            except UserError as error:
                raise UserError(f"selections.{selection.name}: {error}") from None


def full_schema() -> dict[str, Any]:
    """The JSON schema of the configuration, with the parameters of every rule and metric."""
    return {
        **Config.model_json_schema(),
        "rules": {name: rule.model_json_schema() for name, rule in RULES.items()},
        "metrics": {name: metric.params.model_json_schema() for name, metric in METRICS.items()},
    }


def _require_unique(field: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{field}: the name {name!r} stands twice; names must differ")
        seen.add(name)


def _check_models(config: Config, lineage: Lineage) -> None:
    by_name = {spec.name: spec for spec in config.models}
    for spec in config.models:
        if isinstance(spec, PretrainedModel):
            from prefsel.models.loading import check_directory, load_tokenizer

            check_directory(spec.path)
            load_tokenizer(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
            lineage.model(spec.name)
    for scorer in config.scorers:
        if isinstance(scorer, Imported):
            if scorer.as_ == "rm" and isinstance(scorer.field, list) and len(scorer.field) > 1:
                raise invalid(f"scorers.{scorer.name}.field", scorer.field, "one field for `as: rm`")
            continue
        if scorer.model not in by_name:
            raise invalid(f"scorers.{scorer.kind}.model", scorer.model, by_name or "none: `models` is empty")
        kind, wrong = by_name[scorer.model].kind, {"causal_logps": "scratch_reward", "reward_model": "scratch_policy"}
        if kind == wrong[scorer.kind]:
            raise invalid(f"scorers.{scorer.kind}.model", scorer.model, f"a model that is not a {kind}")


def _check_selections(config: Config, lineage: Lineage) -> None:
    for spec in config.metrics:
        if spec.metric not in METRICS:
            raise invalid(f"metrics.{spec.name}.metric", spec.metric, METRICS)
    for name in lineage.metrics:
        lineage.scorers_for(lineage.metric_columns(name), field=f"metrics.{name}")
    for selection in config.selections:
        try:
            rule = parse_rule(selection.rule)
            lineage.metric_columns(rule.score.removeprefix("score_"))
        except UserError as error:
            raise UserError(f"selections.{selection.name}: {error}") from None
        if not rule.score.startswith("score_"):
            valid = [f"score_{name}" for name in lineage.metrics]
            raise invalid(f"selections.{selection.name}.rule.score", rule.score, valid)


def _check_training(config: Config, spec: Train) -> None:
    field = f"train.{spec.name}"
    kinds = {model.name: model.kind for model in config.models if model.kind != "scratch_reward"}
    if spec.model not in kinds:
        raise invalid(f"{field}.model", spec.model, kinds or "none: no causal model in `models`")
    references = [scorer.model for scorer in config.scorers if isinstance(scorer, CausalLogps)]
    if spec.reference not in references:
        valid = references or "none: `scorers` has no causal_logps, whose log-probs are the reference"
        raise invalid(f"{field}.reference", spec.reference, valid)
    selected = [s.name for s in config.selections]
    selected += [f"{s.name}-{control}" for s in config.selections for control in s.controls]
    if spec.selection not in selected:
        raise invalid(f"{field}.selection", spec.selection, selected or "none: `selections` is empty")
    refuse_owned(spec.deepspeed)
    if spec.lora is not None and importlib.util.find_spec("peft") is None:
        raise UserError(f"{field}.lora: needs the extra `peft`: pip install 'prefsel[peft]'")
