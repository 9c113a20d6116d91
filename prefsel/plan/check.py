"""Everything that can be known to be wrong before anything is started: names, combinations, files, parameters.

A record checks what it asks of its neighbours (`config/*.py`); here stands what needs metrics, rules, files or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from prefsel.config import PARTS, Config, MetricSpec, PretrainedModel, Selection, SelfPlay
from prefsel.config.lookup import find
from prefsel.config.pairing import ByGenerator
from prefsel.errors import UserError, invalid
from prefsel.ingest.formats import FORMATS
from prefsel.ingest.readers import list_files
from prefsel.metrics import METRICS
from prefsel.metrics.influence import tangent_names
from prefsel.metrics.table import find_metric
from prefsel.plan.columns import carried_names, scorers_by_column, scorers_for
from prefsel.plan.evaluated import reward_columns
from prefsel.plan.models import find_model, head_names, model_spec, scoring_settings
from prefsel.plan.nodes import all_nodes, make_plan
from prefsel.plan.plan import Plan
from prefsel.plan.resources import check_resources, cluster_address, given_resources
from prefsel.plan.rounds import last_node, round_plans
from prefsel.plan.scores import metric_columns, metric_specs
from prefsel.rules import SCORED_STRATA, flips_labels, parse_rule, require_budgets, rule_columns, rule_strata
from prefsel.score.function import pairwise_judge, reward_judge
from prefsel.score.kinds import loader_of
from prefsel.select.compose import compile_rule
from prefsel.train.deepspeed_config import refuse_owned
from prefsel.workspace.storage import Storage


def check(config: Config, storage: Storage) -> Plan:
    """Refuse a configuration that cannot work; returns its plan.

    Raises:
        UserError: names the field, the value and the valid ones.
    """
    plan = check_without_models(config, storage)
    _check_models(plan)
    _check_heads(plan)
    for tangent in config.tangents:
        _check_same_tokens(plan, tangent)
    _check_columns(plan)
    all_nodes(plan)
    rewards = [] if config.evaluate is None else [column.removeprefix("rm_") for column in reward_columns(plan)]
    for arm in config.selfplay:
        check_rounds(plan, arm)
        if arm.stop is not None and arm.stop.judge not in rewards:
            valid = rewards or "none: `evaluate.judges` is empty"
            raise invalid(f"selfplay.{arm.name}.stop.judge", arm.stop.judge, valid)
    return plan


def check_without_models(config: Config, storage: Storage) -> Plan:
    """Refuse what shows without a look at any model; imports neither torch nor Ray, so that an answer comes at once.

    Raises:
        UserError: as `check`.
    """
    plan = make_plan(config, storage)
    check_names(plan)
    for source in config.sources:
        _check_paths(f"sources.{source.name}.paths", source.paths)
    _check_paths("exclude_prompts", config.exclude_prompts)
    storage.require_folder()
    if not cluster_address(config.ray):
        check_resources(config, given_resources(config.ray))
    return plan


def _check_paths(field: str, paths: Iterable[str]) -> None:
    for path in paths:
        try:
            list_files(path)
        except UserError as error:
            raise UserError(f"{field}: {error}") from None


def check_names(plan: Plan) -> None:
    """Refuse what the configuration's text alone shows to be wrong: names, formats, rules, parameters.

    Raises:
        UserError: names the field, the value and the valid ones.
    """
    config = plan.config
    _check_unique_names(config)
    _require_unique("scorers", [scorer.label for scorer in plan.scorers])
    made_here = next((spec.name for spec in config.models if spec.is_made_here), None)
    if made_here and not config.split.proxy:
        raise invalid("split.proxy", config.split.proxy, f"above 0: model {made_here!r} is trained on that part")
    for scorer in plan.scorers:
        if scorer.runs_models:
            loader_of(scorer.label, scorer)
        if scorer.function_path:
            _check_function(f"scorers.{scorer.label}.function", reward_judge, scorer.function_path)
    # Scorers first: a training refers to a scorer's model, and a slip is to be told where it stands.
    for record in (*config.scorers, *config.train, *config.tangents, *config.generate, *config.selfplay):
        record.check(config)
    if config.evaluate is not None:
        _check_evaluation(config)
    for arm in config.selfplay:
        if arm.stop is not None and config.evaluate is None:
            raise UserError(
                f"selfplay.{arm.name}.stop: needs rewards of the models' answers; give `evaluate` with judges"
            )
    for spec in config.train:
        refuse_owned(spec.deepspeed)
        if spec.divergence:
            _check_divergence(config, spec)
        if spec.weight:
            _check_weight(config, spec)
        _check_labels(config, spec)
    for metric in config.metrics:
        _check_metric(config, metric)
    is_known = not _asks_models_for_heads(plan)
    if is_known:
        _check_columns(plan)
    _check_rules(plan)
    if is_known:
        all_nodes(plan)


def _check_evaluation(config: Config) -> None:
    """An evaluation that can be made, by judges that can be loaded."""
    options = config.evaluate
    assert options is not None, "asked where there is one"
    options.check(config)
    for judge in options.judges:
        loader_of(judge.label, judge)
        if judge.function_path:
            _check_function("evaluate.judges.function", reward_judge, judge.function_path)
    for one in options.pairwise:
        _check_function("evaluate.pairwise.function", pairwise_judge, one.function)


def _check_function(field: str, load: Callable[[str], Any], path: str) -> None:
    """A function of the user's that can be imported here."""
    try:
        load(path)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


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


def _require_unique(field: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{field}: the name {name!r} stands twice; names must differ")
        seen.add(name)


def _check_unique_names(config: Config) -> None:
    for field in ("sources", "tangents", "metrics", "selections"):
        _require_unique(field, [record.name for record in getattr(config, field)])
    trained = [spec.name for spec in (*config.models, *config.train)]
    _require_unique("models, train and rounds", [*trained, *config.round_models])
    _require_unique("selfplay", [arm.name for arm in config.selfplay])
    _require_unique("generate", [spec.name for spec in config.generate])
    _require_unique("selections", [name for selection in config.selections for name in selection.names])
    for selection in config.selections:
        if selection.name in (*PARTS, "holdout"):
            raise invalid("selections.name", selection.name, "another name: this one is a part of the corpus")
    for source in config.sources:
        if source.format != "auto" and source.format not in FORMATS:
            raise invalid(f"sources.{source.name}.format", source.format, ["auto", *FORMATS])
        if source.format != "auto":
            FORMATS[source.format]  # one from a plugin is imported, and refused if it is none


def _check_models(plan: Plan) -> None:
    """Every model is there, and those that read messages have a template to read them with."""
    for spec in plan.config.models:
        if isinstance(spec, PretrainedModel):
            from prefsel.models.chat import Encoder
            from prefsel.models.declared import vocabulary_size
            from prefsel.models.directory import check_directory
            from prefsel.models.loading import check_vocabulary, load_tokenizer

            check_directory(spec.path, spec.revision)
            more: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
            rows = vocabulary_size(spec.path, **more)  # first: a broken configuration is no fault of the tokenizer
            tokenizer = load_tokenizer(spec.path, **more)
            if rows is not None:
                check_vocabulary(tokenizer, path=spec.path, rows=rows)
            settings = find_model(plan, spec.name).settings
            if _is_to_score(plan, spec.name):
                try:
                    Encoder(tokenizer, settings["template"], settings["max_length"], settings["truncation"])
                except UserError as error:
                    raise UserError(f"models.{spec.name}: {error}") from None


def check_rounds(plan: Plan, arm: SelfPlay) -> None:
    """Rewards, metrics and parameters of rounds: of the first one, and of one that answers with a trained model."""
    outer = plan
    # Columns are found by these: a judge that is called like a policy would hide its log-probs.
    judges = [one.label for judge in arm.judges for one in judge.expanded(plan.config)]
    policies = dict.fromkeys([arm.policy, *(arm.model_of(number + 1) for number in range(arm.rounds))])
    _require_unique(f"selfplay.{arm.name}: judges and policies", [*judges, *policies])
    check_generators(plan, arm)
    try:
        for number in range(1, min(arm.rounds, 2) + 1):
            plans = round_plans(outer, arm, number)
            for one in plans:
                _check_columns(one)
                last_node(one)
            outer = plans[-1]
    except UserError as error:
        raise UserError(f"selfplay.{arm.name}: {error}") from None


def check_generators(plan: Plan, arm: SelfPlay) -> None:
    """The strong and the weak model of pairs by generator: with the same weights they would give the same answers."""
    if not isinstance(arm.pairs, ByGenerator):
        return
    strong, weak = (arm.policy if one == "$policy" else one for one in (arm.pairs.strong, arm.pairs.weak))
    specs = [model_spec(plan, one) for one in (strong, weak)]
    places = [(getattr(one, "path", one.name), getattr(one, "revision", None)) for one in specs]
    if places[0] == places[1]:
        why = f"a model with other weights than {strong!r}, which are those of {places[0][0]}"
        raise invalid(f"selfplay.{arm.name}.pairs.weak", weak, why)


def _is_to_score(plan: Plan, model: str) -> bool:
    """Whether a pretrained model is to score by itself, and has not begun: what is there needs no template any more."""
    labels = [scorer.label for scorer in plan.scorers if scorer.models(plan.config) == [model]]
    tangents = {scorer.label for scorer in plan.scorers if scorer.tangent_name}
    return any(not plan.storage.folders(plan.node("columns", one).path) for one in labels if one not in tangents)


def _check_heads(plan: Plan) -> None:
    """A name for every output of a reward model that is not trained here."""
    pretrained = {spec.name for spec in plan.config.models if isinstance(spec, PretrainedModel)}
    for scorer in plan.scorers:
        heads = getattr(scorer, "heads", None)
        if heads and scorer.model in pretrained and len(heads) != (outputs := len(head_names(plan, scorer.model))):
            valid = f"{outputs} names, one per output of model {scorer.model!r}"
            raise invalid(f"scorers.{scorer.label}.heads", heads, valid)


def _check_same_tokens(plan: Plan, tangent: Any) -> None:
    """The tangent's model and its reference must be given the same tokens."""
    ours, theirs = scoring_settings(plan, tangent.model), scoring_settings(plan, tangent.reference)
    for key in ("template", "max_length", "truncation"):
        if ours[key] != theirs[key]:
            field = f"tangents.{tangent.name}.reference"
            raise invalid(field, tangent.reference, f"a model with the same {key} as {tangent.model!r}")


def _asks_models_for_heads(plan: Plan) -> bool:
    """Whether what a reward model's columns are called stands in its own files."""
    pretrained = {spec.name for spec in plan.config.models if not spec.is_made_here}
    rewards = [scorer for scorer in plan.scorers if getattr(scorer, "heads", 0) is None]
    return any(scorer.model in pretrained for scorer in rewards)


def _check_columns(plan: Plan) -> None:
    """Every column is made by one scorer, and those that a metric reads by some."""
    scorers_by_column(plan)
    for name in metric_specs(plan):
        scorers_for(plan, metric_columns(plan, name), field=f"metrics.{name}")


def _check_rules(plan: Plan) -> None:
    for selection in plan.config.selections:
        try:
            parse_rule(selection.rule)
            for column in rule_columns(selection.rule):
                if not column.startswith("score_"):
                    raise invalid("rule.score", column, [f"score_{name}" for name in metric_specs(plan)])
                metric_columns(plan, column.removeprefix("score_"))
            known = [*SCORED_STRATA, "length_bin", *carried_names(plan)]
            for name in rule_strata(selection.rule):
                if name not in known:
                    raise invalid("rule.by", name, f"{', '.join(known)}; or a field that sources[].carry names")
        except UserError as error:
            raise UserError(f"selections.{selection.name}: {error}") from None
        _check_derived_names(plan.config, selection)


def _check_derived_names(config: Config, selection: Selection) -> None:
    """Refuse a metric called like a score that a compound rule makes: one of the two would be shown for both."""
    labels = [step.label for step in compile_rule(parse_rule(selection.rule)).derived]
    taken = {f"{name}.{label}" for name in selection.names for label in [*labels, "random"] if labels}
    for metric in config.metrics:
        if metric.name in taken:
            raise invalid("metrics.name", metric.name, f"another name: selection {selection.name} makes such a score")


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
    """A metric that there is, and parameters that agree with what makes the columns."""
    if spec.metric not in METRICS:
        raise invalid(f"metrics.{spec.name}.metric", spec.metric, METRICS)
    if spec.name.removeprefix("random-") in {one.name for one in config.metrics} - {spec.name}:
        raise invalid("metrics.name", spec.name, "another name: controls are called random-<metric>")
    params, field = _parsed(spec), f"metrics.{spec.name}.params"
    if spec.metric == "influence":
        _check_influence(config, field, params)
    elif spec.metric == "selective_dpo":
        for policy in params.policies or ():
            training = find(config.train, policy)
            if training is not None and not training.cross_fit:
                raise UserError(f"{field}.policies: {policy!r} has seen these pairs; set train.{policy}.cross_fit")
    elif spec.metric == "preference_divergence" and params.source == "rm":
        for one in config.train:
            is_judge = set(one.aspects) & set(params.aspects)
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


def _check_weight(config: Config, spec: Any) -> None:
    """The weights are those of a metric."""
    field, names = f"train.{spec.name}.weight", [one.name for one in config.metrics]
    if spec.weight not in names:
        raise invalid(field, spec.weight, names or "none: `metrics` is empty")


def _check_labels(config: Config, spec: Any) -> None:
    """What is known of pairs as they are labelled says nothing of pairs whose label a rule turns."""
    rules = {one.name: one.rule for one in config.selections}
    used = [name for name in ("weight", "divergence") if getattr(spec, name)]
    if used and flips_labels(rules.get(spec.selection, {})):
        raise invalid(
            f"train.{spec.name}.{used[0]}", getattr(spec, used[0]), f"none: selection {spec.selection!r} turns labels"
        )


def _check_divergence(config: Config, spec: Any) -> None:
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
