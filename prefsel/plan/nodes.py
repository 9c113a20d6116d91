"""How the nodes of each kind follow from the configuration: what they need, and their recipes.

    eligible ─┬─▶ scratch ─▶ columns ─▶ scores ─▶ selection ─▶ dataset
              └───────────────▲  ▲                    │
                   tangent ───┘  └───── model ◀───────┘

A training is a model, models make columns, columns make scores, scores make selections, and selections are trained on:
so there is no fixed line of stages, only what each node names in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefsel.config import PARTS, Config, Split, TrainedModel
from prefsel.config.lookup import find
from prefsel.errors import invalid
from prefsel.plan.columns import column_nodes, dataset_scorers, length_column, reference_scorer, scorers_for
from prefsel.plan.evaluated import evaluation_node
from prefsel.plan.generated import generated_catalog, groups_node, pairs_node, prompts_node
from prefsel.plan.made import Made
from prefsel.plan.models import find_model, find_models, model_nodes, model_spec
from prefsel.plan.node import Kind, Need, Node, by_columns, by_fingerprint, by_part, by_path
from prefsel.plan.pinned import Former, pin
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.scores import control_metrics, metric_columns, metric_specs
from prefsel.plugins.registry import code_of
from prefsel.rules import LEAVES, arithmetic_of, random_rule, reversed_rule, rule_scores
from prefsel.score.function import reward_judge
from prefsel.workspace.folders import folder_content
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.recipes import hash_hex, recipe
from prefsel.workspace.storage import Storage

NON_TRAJECTORY_KEYS = {
    *("name", "selection", "workers", "gpus_per_worker", "cpus_per_worker", "max_failures", "max_eval_pairs"),
    *("kind", "aspects", "cross_fit", "keep_optimizer_state", "divergence", "mixed_with", "weight"),
    *("eval_every_steps", "checkpoint_every_steps", "keep_checkpoints", "reference_check_pairs"),
    *("micro_batch_pairs", "token_budget"),
}
"""Keys of a training that move no weight by more than rounding, or that stand in its recipe in another form."""


def make_plan(config: Config, storage: Storage, former: Former | None = None) -> Plan:
    """The plan of a configuration in a workspace.

    Args:
        config: The configuration.
        storage: The workspace.
        former: What an earlier run made and this one goes by.
    """
    if former is None:
        return Plan(config, storage, BUILDERS)

    def keep(node: Node) -> Node:
        fingerprint = former.kept.get((node.kind, node.name))
        return node if fingerprint is None else pin(node, fingerprint)

    return Plan(config, storage, BUILDERS, pinned=keep, former_shards=former.shards)


def made_plan(outer: Plan, config: Config, made: Made) -> Plan:
    """The plan of a corpus that a model of `outer` makes.

    Args:
        outer: Whose models, and the models of whose own outer plans, may be named.
        config: What is done with the corpus.
        made: How it is made.
    """
    return Plan(config, outer.storage, BUILDERS, outer=outer, made=made, catalog_of=generated_catalog)


def all_nodes(plan: Plan) -> list[Node]:
    """Everything that the configuration asks for, and what that needs, every node after what it needs.

    Raises:
        UserError: something names what the configuration does not have, or needs itself.
    """
    config = plan.config
    names: list[tuple[Kind, str]] = [("eligible", "all")]
    names += [("scratch", spec.name) for spec in config.models if spec.is_made_here]
    names += [("columns", scorer.label) for scorer in plan.scorers]
    names += [("tangent", spec.name) for spec in config.tangents]
    names += [("scores", name) for name in metric_specs(plan)]
    names += [("selection", name) for spec in config.selections for name in spec.names]
    names += [("model", member.label) for spec in config.train for member in spec.trained_models]
    if any(spec.role == "policy" for spec in config.train):
        names.append(("dataset", "holdout"))
    return in_order(plan.node(kind, name) for kind, name in names)


# ------------------------------------------------------------------------------------------------------- the corpus


def _eligible(plan: Plan, name: str) -> Node:
    """Who may be selected: splits, exclusions, duplicates; one row per pair."""

    def write_recipe(node: Node) -> dict[str, Any]:
        sources = plan.catalog.sources
        excluded = [shard for s in sources if s.role == "exclude" for file in s.files for shard in file.shards]
        settings = {
            "split": node.spec.model_dump(),
            "roles": {source.name: source.role for source in sources},
            "excluded": excluded,
            # Of a pair that stands in several places the first in corpus order is kept.
            "order": hash_hex(*(shard.key for shard in plan.catalog.shards)),
            "contradictions": plan.config.duplicates.contradictions,
        }
        return recipe("eligible", settings, corpus=plan.corpus)

    # Of prompts that a model answers the part is chosen before.
    split = plan.config.split if plan.made is None else Split()
    labelled = plan.made.pairing.kind if plan.made and plan.made.pairing else None
    needs = (Need(plan.node("pairs", labelled)),) if labelled else ()
    called = plan.made.name if plan.made else name
    return Node("eligible", called, split, needs, write_recipe, "eligible")


def _scratch(plan: Plan, name: str) -> Node:
    """A small model made from the proxy part of the corpus."""
    spec = model_spec(plan, name)
    settings = spec.model_dump(exclude={"dtype", "template", "truncation"})
    needs = (by_fingerprint(plan.node("eligible", "all"), "eligible"),)
    return Node(
        "scratch",
        name,
        spec,
        needs,
        lambda node: recipe("scratch", settings, upstream=node.upstream, corpus=plan.corpus),
        "models",
    )


# ------------------------------------------------------------------------------------------------ columns, tangents


def _columns(plan: Plan, label: str) -> Node:
    """The columns of a scorer: they depend on models and settings, never on the corpus."""
    scorer = next((one for one in plan.scorers if one.label == label), None)
    if scorer is None:
        raise invalid("scorer", label, [one.label for one in plan.scorers] or "none: `scorers` is empty")
    models: list[str] = scorer.models(plan.config)
    needs = [Need(node) for name in models for node in model_nodes(plan, name, scorer.own_aspect)]
    if plan.made is not None:
        needs.append(Need(plan.node("groups", plan.made.answers)))
    tangent = plan.node("tangent", scorer.tangent_name) if scorer.tangent_name else None
    if tangent is not None:
        needs.append(Need(tangent))
        if scorer.unit == "pairs":
            needs.append(by_path(_reference(plan, tangent.spec.reference), "reference"))
            needs.append(by_fingerprint(plan.node("eligible", "all"), "eligible"))

    def write_recipe(node: Node) -> dict[str, Any]:
        settings = scorer.recipe_settings() | code_of("scorers", scorer.kind)
        if scorer.function_path:
            settings["code"] = reward_judge(scorer.function_path).identity
        if not scorer.runs_models:
            return recipe("score", settings)
        identities = {}
        for name in models:
            for ref in find_models(plan, name, scorer.own_aspect).values():
                identities[ref.name] = ref.identity
                settings |= {f"{name}.{key}": value for key, value in ref.settings.items()}
            training = find(plan.config.train, name)
            if training is not None and training.cross_fit:
                settings["cross_fit"] = training.cross_fit.model_dump()
        if tangent is not None:
            identities[tangent.name] = folder_content(plan.storage, tangent.path) or tangent.fingerprint
        return recipe("score", settings, models=identities, upstream=node.upstream)

    folder = "pair_columns" if scorer.unit == "pairs" else "columns"
    return Node("columns", label, scorer, tuple(needs), write_recipe, folder)


def _reference(plan: Plan, model: str) -> Node:
    return plan.node("columns", reference_scorer(plan, model).label)


def _tangent(plan: Plan, name: str) -> Node:
    """A tangent: its settings, its model, the validation pairs with their reference log-probs."""
    spec = find(plan.config.tangents, name)
    if spec is None:
        known = [one.name for one in plan.config.tangents]
        raise invalid("scorers.tangent", name, known or "none: `tangents` is empty")
    needs = [Need(node) for node in model_nodes(plan, spec.model)]
    needs.append(by_path(_reference(plan, spec.reference), "reference"))
    needs.append(by_part(plan.node("eligible", "all"), "validation", "pairs"))

    def write_recipe(node: Node) -> dict[str, Any]:
        model = find_model(plan, spec.model)
        unused = {"name", *(["damping"] if spec.preconditioner == "none" else [])}
        settings = {"tangent": spec.model_dump(exclude=unused), "model": model.settings}
        models = {"model": model.identity}
        return recipe("tangent", settings, models=models, upstream=node.upstream, corpus=plan.corpus)

    return Node("tangent", name, spec, tuple(needs), write_recipe, "tangents")


# ------------------------------------------------------------------------------------------------ scores, selections


def _scores(plan: Plan, name: str) -> Node:
    """The scores of a metric; lengths, which scores are set against, are part of the recipe."""
    scorers = scorers_for(plan, metric_columns(plan, name), field=f"metrics.{name}")
    spec, base = metric_specs(plan)[name], control_metrics(plan).get(name)
    needs = [by_columns(node, ",".join(columns)) for node, columns in column_nodes(plan, scorers).items()]
    needs.append(by_fingerprint(plan.node("eligible", "all"), "eligible"))
    if base is not None:
        needs.append(by_fingerprint(plan.node("scores", base), "population"))

    def write_recipe(node: Node) -> dict[str, Any]:
        upstream = node.upstream | {"lengths": length_column(plan) or ""}
        settings = {"metric": spec.metric, "params": spec.params} | code_of("metrics", spec.metric)
        return recipe("metric", settings, upstream=upstream, corpus=plan.corpus)

    return Node("scores", name, spec, tuple(needs), write_recipe, "scores")


def selection_rule(plan: Plan, node: Node) -> dict[str, Any]:
    """The rule of a selection, or of a control: as many pairs at random, or its reverse. Its selection must be made."""
    rule: dict[str, Any] = node.spec.rule
    if node.member is None:
        return dict(rule)
    if node.name.endswith("-reverse"):
        return reversed_rule(rule)
    base = load_summary(plan.storage, plan.node("selection", node.member).path)
    assert base is not None, f"selection {node.member} comes before its controls"
    return random_rule(rule, base.rows_out)


def _selection(plan: Plan, name: str) -> Node:
    """A subset that a rule makes of the scores it reads; or a control, which is made after its selection."""
    spec = next((one for one in plan.config.selections if name in one.names), None)
    if spec is None:
        raise invalid("train.selection", name, [*PARTS, *(one for s in plan.config.selections for one in s.names)])
    is_drawn = name == f"{spec.name}-random" and spec.rule.get("kind") in LEAVES
    scores = [f"random-{metric}" if is_drawn else metric for metric in rule_scores(spec.rule)]
    needs = [by_fingerprint(plan.node("scores", metric), metric) for metric in scores]
    if name != spec.name:
        needs.append(Need(plan.node("selection", spec.name)))
    if writes_dataset(plan, name):  # in the same pass
        needs += [Need(node) for node in column_nodes(plan, dataset_scorers(plan, name))]

    def write_recipe(node: Node) -> dict[str, Any]:
        rule = selection_rule(plan, node)
        settings = {"rule": rule} | arithmetic_of(rule)
        return recipe("selection", settings, upstream=node.upstream, corpus=plan.corpus)

    return Node(
        "selection", name, spec, tuple(needs), write_recipe, "selections", None if name == spec.name else spec.name
    )


def writes_dataset(plan: Plan, name: str) -> bool:
    """Whether the rows of a selection, or of a control, are written out.

    Reading through it costs the text of what is not kept each time, and no writing: half as much for one reading, the
    same for two (`benchmarks/read_through.py`).
    """
    selection = next(one for one in plan.config.selections if name in one.names)
    if selection.dataset != "auto":
        return selection.dataset == "always"
    trained = [spec for spec in plan.config.train if spec.selection == name]
    return sum(spec.workers * len(spec.trained_models) for spec in trained) != 1


def _dataset(plan: Plan, name: str) -> Node:
    """The rows of a selection, or the held-out pairs, with the columns of `dataset_scorers`."""
    rows = plan.node("eligible", "all") if name == "holdout" else plan.node("selection", name)
    columns = [by_columns(plan.node("columns", scorer.label)) for scorer in dataset_scorers(plan, name)]
    lengths = [Need(node) for node in column_nodes(plan, [])]
    return Node(
        "dataset",
        name,
        rows.spec,
        (by_path(rows, "selection"), *columns, *lengths),
        lambda node: recipe("dataset", {}, upstream=node.upstream, corpus=plan.corpus),
        "datasets",
    )


# --------------------------------------------------------------------------------------------------------- trainings


def _model(plan: Plan, label: str) -> Node:
    """A trained model: its options, where its weights start, what it is trained on."""
    members: dict[str, tuple[Any, TrainedModel]] = {
        one.label: (spec, one) for spec in plan.config.train for one in spec.trained_models
    }
    if label not in members:
        raise invalid("train", label, members or "none: `train` is empty")
    spec, member = members[label]
    needs = [Need(node) for node in model_nodes(plan, spec.model)]
    if spec.reference:
        needs.append(by_path(_reference(plan, spec.reference), "reference"))
    if spec.selection in PARTS:
        needs.append(by_part(plan.node("eligible", "all"), spec.selection, "selection"))
    else:
        needs.append(by_path(plan.node("selection", spec.selection), "selection"))
    if spec.mixed_with:
        needs.append(by_path(plan.root.node("selection", spec.mixed_with), "mixed_with"))
    if spec.divergence:
        needs.append(by_fingerprint(plan.node("scores", spec.divergence), "divergence"))
    if spec.weight:
        needs.append(by_fingerprint(plan.node("scores", spec.weight), "weight"))

    def write_recipe(node: Node) -> dict[str, Any]:
        base = find_model(plan, spec.model)
        settings: dict[str, Any] = {"train": spec.model_dump(exclude=NON_TRAJECTORY_KEYS), "model": base.settings}
        models = {"model": base.identity}
        if member.aspect is not None:
            settings["aspect"] = member.aspect
        if spec.cross_fit is not None:
            settings["fold"] = [member.fold, spec.cross_fit.model_dump()]
        if spec.role == "policy":
            settings |= code_of("losses", spec.loss)
        if spec.reference:
            reference = find_model(plan, spec.reference)
            settings["reference"] = reference.settings
            models["reference"] = reference.identity
        if spec.weight_decay:  # of every weight in an earlier version
            settings["decayed"] = "matrices"
        if spec.keep_optimizer_state:
            settings["keep_optimizer_state"] = True
        return recipe("model", settings, models=models, upstream=node.upstream, corpus=plan.corpus)

    return Node("model", label, spec, tuple(needs), write_recipe, "models", member)


BUILDERS: dict[Kind, Callable[[Plan, str], Node]] = {
    "prompts": prompts_node,
    "groups": groups_node,
    "pairs": pairs_node,
    "evaluation": evaluation_node,
    "eligible": _eligible,
    "scratch": _scratch,
    "columns": _columns,
    "tangent": _tangent,
    "scores": _scores,
    "selection": _selection,
    "dataset": _dataset,
    "model": _model,
}
