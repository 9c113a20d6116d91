"""Everything that can be known to be wrong before anything is started: names, combinations, files, parameters."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

from prefsel.config import (
    PARTS,
    CausalLogps,
    Config,
    DirectionalLogps,
    GeneratedReward,
    Imported,
    MetricSpec,
    PairGradients,
    PretrainedModel,
    RewardModel,
    Scorer,
    Tangent,
    Train,
    Training,
    TrainReward,
)
from prefsel.errors import UserError, invalid
from prefsel.graph import all_nodes, ordered
from prefsel.ingest.formats import FORMATS
from prefsel.ingest.readers import list_files
from prefsel.lineage import Lineage
from prefsel.metrics import METRICS
from prefsel.metrics.influence import tangent_names
from prefsel.metrics.table import find_metric
from prefsel.naming import members, scorer_label, selection_names
from prefsel.resources import check_resources, cluster_address, given_resources
from prefsel.select.rules import RULES, parse_rule, require_budgets, rule_columns
from prefsel.train.deepspeed_config import refuse_owned
from prefsel.workspace.storage import Storage


def check(config: Config, storage: Storage) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        UserError: names the field, the value and the valid ones.
    """
    check_without_models(config, storage)
    lineage = Lineage(config, storage)
    _check_models(config, lineage)
    for tangent in config.tangents:
        _check_tangent(config, tangent, lineage)
    _check_columns(lineage)
    ordered(lineage, all_nodes(lineage))


def check_without_models(config: Config, storage: Storage) -> None:
    """Refuse what shows without a look at any model; imports neither torch nor Ray, so that an answer comes at once.

    Raises:
        UserError: as `check`.
    """
    check_names(Lineage(config, storage))
    for source in config.sources:
        _check_paths(f"sources.{source.name}.paths", source.paths)
    _check_paths("exclude_prompts", config.exclude_prompts)
    storage.require_folder()
    if not cluster_address(config.ray):
        check_resources(config, given_resources(config.ray))


def _check_paths(field: str, paths: Iterable[str]) -> None:
    for path in paths:
        try:
            list_files(path)
        except UserError as error:
            raise UserError(f"{field}: {error}") from None


def check_names(lineage: Lineage) -> None:
    """Refuse what the configuration's text alone shows to be wrong: names, formats, rules, parameters.

    Raises:
        UserError: names the field, the value and the valid ones.
    """
    config = lineage.config
    for field in ("sources", "tangents", "metrics", "selections"):
        _require_unique(field, [record.name for record in getattr(config, field)])
    _require_unique("models and train", [spec.name for spec in (*config.models, *config.train)])
    _require_unique("selections", [name for selection in config.selections for name in selection_names(selection)])
    for selection in config.selections:
        if selection.name in (*PARTS, "holdout"):
            raise invalid("selections.name", selection.name, "another name: this one is a part of the corpus")
    for source in config.sources:
        if source.format != "auto" and source.format not in FORMATS:
            raise invalid(f"sources.{source.name}.format", source.format, ["auto", *FORMATS])
    _require_unique("scorers", [scorer_label(scorer) for scorer in lineage.scorers])
    made = [spec.name for spec in config.models if spec.kind != "pretrained"]
    if made and not config.split.proxy:
        raise invalid("split.proxy", config.split.proxy, f"above 0: model {made[0]!r} is trained on that part")
    # Scorers first: a training refers to a scorer's model, and a slip is to be told where it stands.
    for scorer in config.scorers:
        _check_scorer(config, scorer)
    for spec in config.train:
        _check_training(config, spec)
    for tangent in config.tangents:
        _check_tangent_names(config, tangent)
    _check_metrics(config)
    is_known = not _asks_models_for_heads(config)
    if is_known:
        _check_columns(lineage)
    _check_rules(config, lineage)
    if is_known:
        ordered(lineage, all_nodes(lineage))


def check_budgets(config: Config, eligible: int) -> None:
    """Refuse a budget above the eligible pairs, before any model has run.

    Raises:
        UserError: names both numbers.
    """
    for selection in config.selections:
        try:
            require_budgets(parse_rule(selection.rule), eligible)
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
    for spec in config.models:
        if isinstance(spec, PretrainedModel):
            from prefsel.models.loading import check_directory, load_tokenizer

            check_directory(spec.path)
            load_tokenizer(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
            lineage.model(spec.name)


def model_kinds(config: Config) -> dict[str, str]:
    """Every model and training by name: `policy`, `reward`, or `any` for a pretrained model."""
    by_kind = {"pretrained": "any", "scratch_policy": "policy", "scratch_reward": "reward", "dpo": "policy"}
    return {spec.name: by_kind.get(spec.kind, "reward") for spec in (*config.models, *config.train)}


def _require_model(config: Config, field: str, name: str, kind: str) -> None:
    fitting = [known for known, its in model_kinds(config).items() if its in (kind, "any")]
    if name not in fitting:
        raise invalid(field, name, fitting or f"none: no {kind} in `models` or `train`")


def _require_reference(config: Config, field: str, name: str) -> None:
    known = [scorer.model for scorer in config.scorers if isinstance(scorer, CausalLogps) and not scorer.unconditional]
    if name not in known:
        raise invalid(field, name, known or "none: `scorers` has no causal_logps, whose log-probs are the reference")


def _require_single(config: Config, field: str, name: str) -> None:
    """Refuse a training that is several models where one is loaded."""
    for spec in config.train:
        if spec.name == name and len(members(spec)) > 1:
            raise invalid(field, name, "a single model: this training is one per fold or aspect")


def _require_untrained(config: Config, field: str, name: str) -> None:
    """Refuse a start from weights that have seen labels of what is to be scored."""
    trainings = {spec.name: spec for spec in config.train}
    while name in trainings:
        if trainings[name].selection != "validation":
            raise UserError(
                f"{field}: got {name!r}, which was trained on {trainings[name].selection!r}; its weights remember the "
                "labels of prompts that this training is to leave out; valid: a model that is not trained here"
            )
        name = trainings[name].model


def _has_validation(config: Config) -> bool:
    return bool(config.split.validation) or any(source.role == "validation" for source in config.sources)


def _check_scorer(config: Config, scorer: Scorer) -> None:
    field = f"scorers.{scorer_label(scorer)}"
    trainings = {spec.name: spec for spec in config.train}
    if isinstance(scorer, Imported):
        if scorer.as_ == "rm" and isinstance(scorer.field, list) and len(scorer.field) > 1:
            raise invalid(f"{field}.field", scorer.field, "one field for `as: rm`")
    elif isinstance(scorer, DirectionalLogps | PairGradients):
        tangents = {spec.name: spec for spec in config.tangents}
        if scorer.tangent not in tangents:
            raise invalid(f"{field}.tangent", scorer.tangent, tangents or "none: `tangents` is empty")
        tangent = tangents[scorer.tangent]
        if isinstance(scorer, DirectionalLogps) and scorer.method != "exact" and tangent.dtype != "fp32":
            raise invalid(f"tangents.{tangent.name}.dtype", tangent.dtype, "fp32, for finite differences")
        if isinstance(scorer, PairGradients):
            if tangent.preconditioner != "none":
                raise invalid(
                    f"tangents.{tangent.name}.preconditioner", tangent.preconditioner, "none: LESS keeps v plain"
                )
            _require_adam(config, f"tangents.{tangent.name}.model", tangent.model)
    else:
        _require_model(
            config, f"{field}.model", scorer.model, "policy" if isinstance(scorer, CausalLogps) else "reward"
        )
        if isinstance(scorer, GeneratedReward):
            _require_model(config, f"{field}.policy", scorer.policy, "policy")
            _require_single(config, f"{field}.policy", scorer.policy)
            _require_single(config, f"{field}.model", scorer.model)
            _require_untrained(config, f"{field}.model", scorer.model)
        training = trainings.get(scorer.model)
        if isinstance(scorer, RewardModel) and scorer.aspect and not isinstance(training, TrainReward):
            raise invalid(f"{field}.aspect", scorer.aspect, "none: only a reward training has aspects")
        if isinstance(training, TrainReward):
            if isinstance(scorer, RewardModel) and scorer.heads:
                raise invalid(f"{field}.heads", scorer.heads, "none: a trained reward model has one head")
            if isinstance(scorer, RewardModel) and scorer.aspect and scorer.aspect not in training.aspects:
                raise invalid(f"{field}.aspect", scorer.aspect, training.aspects or "none: it has no aspects")
            if not training.aspects and not training.cross_fit and training.selection == "all":
                raise UserError(
                    f"{field}: {training.name!r} would score the prompts it is trained on; "
                    f"set train.{training.name}.cross_fit, and every prompt is scored by a fold that never saw it"
                )


def _require_adam(config: Config, field: str, name: str) -> None:
    kept = [spec.name for spec in config.train if isinstance(spec, Train) and spec.keep_optimizer_state]
    if name not in kept:
        raise invalid(field, name, kept or "none: no training has keep_optimizer_state")


def _check_tangent_names(config: Config, spec: Tangent) -> None:
    field = f"tangents.{spec.name}"
    _require_model(config, f"{field}.model", spec.model, "policy")
    _require_reference(config, f"{field}.reference", spec.reference)
    for key, name in (("model", spec.model), ("reference", spec.reference)):
        _require_single(config, f"{field}.{key}", name)
    if spec.preconditioner == "adam":
        _require_adam(config, f"{field}.model", spec.model)
    if not _has_validation(config):
        raise UserError(f"{field}: needs validation pairs; set split.validation, or give a source the role validation")


def _check_tangent(config: Config, spec: Tangent, lineage: Lineage) -> None:
    field = f"tangents.{spec.name}"
    ours, theirs = lineage.scoring_settings(spec.model), lineage.scoring_settings(spec.reference)
    for key in ("template", "max_length", "truncation"):
        if ours[key] != theirs[key]:
            raise invalid(f"{field}.reference", spec.reference, f"a model with the same {key} as {spec.model!r}")


def _check_metrics(config: Config) -> None:
    for spec in config.metrics:
        if spec.metric not in METRICS:
            raise invalid(f"metrics.{spec.name}.metric", spec.metric, METRICS)
        if spec.name.removeprefix("random-") in {one.name for one in config.metrics} - {spec.name}:
            raise invalid("metrics.name", spec.name, "another name: controls are called random-<metric>")
    for spec in config.metrics:
        _check_metric(config, spec)


def _check_rules(config: Config, lineage: Lineage) -> None:
    for selection in config.selections:
        try:
            parse_rule(selection.rule)
            for column in rule_columns(selection.rule):
                if not column.startswith("score_"):
                    raise invalid("rule.score", column, [f"score_{name}" for name in lineage.metrics])
                lineage.metric_columns(column.removeprefix("score_"))
        except UserError as error:
            raise UserError(f"selections.{selection.name}: {error}") from None


def _asks_models_for_heads(config: Config) -> bool:
    """Whether what a reward model's columns are called stands in its own files."""
    pretrained = {spec.name for spec in config.models if isinstance(spec, PretrainedModel)}
    rewards = [scorer for scorer in config.scorers if isinstance(scorer, RewardModel)]
    return any(scorer.model in pretrained and not scorer.heads for scorer in rewards)


def _check_columns(lineage: Lineage) -> None:
    """Every column that a metric reads must be made by a scorer."""
    for name in lineage.metrics:
        lineage.scorers_for(lineage.metric_columns(name), field=f"metrics.{name}")


def _parsed(spec: MetricSpec) -> Any:
    """A metric's checked parameters.

    Raises:
        UserError: names the metric, the parameter and the valid ones.
    """
    try:
        return find_metric(spec.metric, spec.params)[1]
    except UserError as error:
        raise UserError(f"metrics.{spec.name}: {error}") from None


def _check_metric(config: Config, spec: MetricSpec) -> None:
    """Parameters that must agree with what makes the columns."""
    params, field = _parsed(spec), f"metrics.{spec.name}.params"
    if spec.metric == "influence":
        _check_influence(config, field, params)
    elif spec.metric == "selective_dpo":
        trainings = {one.name: one for one in config.train}
        for policy in params.policies or ():
            if policy in trainings and not trainings[policy].cross_fit:
                raise UserError(f"{field}.policies: {policy!r} has seen these pairs; set train.{policy}.cross_fit")
    elif spec.metric == "preference_divergence" and params.source == "rm":
        for one in config.train:
            is_judge = isinstance(one, TrainReward) and set(one.aspects) & set(params.aspects)
            rho = getattr(one, "length_penalty_rho", 0.0) if is_judge else 0.0
            if rho and params.rho not in ("fit", rho):
                valid = f"{rho:g}, that of train.{one.name}.length_penalty_rho; or fit"
                raise invalid(f"{field}.rho", params.rho, valid)


def _check_influence(config: Config, field: str, params: Any) -> None:
    """The derivative must be that of the very models the margin is of; another beta must be meant."""
    tangents = {direction: spec for spec in config.tangents for direction in spec.directions}
    for name in tangent_names(params.tangent):
        tangent = tangents.get(name)
        if tangent is None:
            continue
        for key, given, wanted in (
            ("policy", params.policy, tangent.model),
            ("reference", params.reference, tangent.reference),
        ):
            if given != wanted:
                raise invalid(f"{field}.{key}", given, f"{wanted!r}, the tangent's")
        if tangent.beta != params.beta and not params.any_beta:
            raise invalid(f"{field}.beta", params.beta, f"{tangent.beta:g}, the tangent's; or any_beta: true")


def _check_divergence(config: Config, spec: Train) -> None:
    """The loss adds the PD of a metric over the very aspects it counts and weighs."""
    field = f"train.{spec.name}"
    found = {one.name: one for one in config.metrics if one.metric == "preference_divergence"}
    if spec.divergence not in found:
        raise invalid(f"{field}.divergence", spec.divergence, found or "none: no metric is a preference_divergence")
    params, metric = _parsed(found[spec.divergence]), f"metrics.{spec.divergence}.params"
    if params.own_aspect is None:
        raise invalid(f"{metric}.own_aspect", None, "a column: DFPO's divergence leaves the labelled aspect out")
    if spec.num_aspects is not None:
        if spec.num_aspects != len(params.aspects):
            raise invalid(f"{field}.num_aspects", spec.num_aspects, f"{len(params.aspects)}, as in {metric}")
        if params.weights is not None:
            raise invalid(f"{field}.loss", spec.loss, f"weighted_dfpo, as {metric}.weights are given")
    if spec.aspect_weights is not None:
        theirs = dict(zip(params.aspects, params.weights or [1.0] * len(params.aspects)))
        ours, first = spec.aspect_weights, params.aspects[0]
        if set(ours) != set(theirs) or not all(
            math.isclose(ours[name] * theirs[first], theirs[name] * ours[first], rel_tol=1e-9) for name in theirs
        ):
            raise invalid(f"{field}.aspect_weights", ours, f"{theirs}, as in {metric}, in any unit")


def _check_training(config: Config, spec: Training) -> None:
    field = f"train.{spec.name}"
    _require_single(config, f"{field}.model", spec.model)
    if spec.cross_fit is not None or isinstance(spec, TrainReward):
        _require_untrained(config, f"{field}.model", spec.model)
    if isinstance(spec, Train):
        _require_model(config, f"{field}.model", spec.model, "policy")
        if spec.reference:
            _require_reference(config, f"{field}.reference", spec.reference)
            _require_single(config, f"{field}.reference", spec.reference)
        if spec.divergence:
            _check_divergence(config, spec)
        if spec.order == "score" and spec.selection in PARTS:
            raise invalid(f"{field}.order", "score", "shuffled or given: only a selection has scores")
        if spec.lora is not None and importlib.util.find_spec("peft") is None:
            raise UserError(f"{field}.lora: needs the extra `peft`: pip install 'prefsel[peft]'")
    else:
        known = model_kinds(config)
        if spec.model not in known:
            raise invalid(f"{field}.model", spec.model, known or "none: `models` is empty")
        if spec.aspects and not spec.cross_fit and any(source.options.aspects == "all" for source in config.sources):
            raise UserError(
                f"{field}.cross_fit: needed, because a source has options.aspects: all; its prompts are labelled with "
                "several aspects, so every reward model would have seen every prompt"
            )
    valid = [*PARTS, *(name for selection in config.selections for name in selection_names(selection))]
    if spec.selection not in valid:
        raise invalid(f"{field}.selection", spec.selection, valid)
    if spec.selection == "validation" and not _has_validation(config):
        raise UserError(f"{field}.selection: no pair is set aside; set split.validation, or a source's role validation")
    refuse_owned(spec.deepspeed)
