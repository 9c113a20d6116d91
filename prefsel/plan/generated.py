"""The nodes of a corpus that a model makes: prompts, the groups of its answers, pairs of them."""

from __future__ import annotations

from typing import Any

from prefsel.errors import UserError
from prefsel.plan.made import EvolvedPrompts, Made
from prefsel.plan.models import find_model, model_nodes
from prefsel.plan.node import Need, Node, by_columns, by_fingerprint, by_path
from prefsel.plan.plan import Plan
from prefsel.selfplay.strategies import load_strategies
from prefsel.workspace.catalog import Catalog, FileRecord, SourceRecord
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.recipes import hash_hex, recipe


def _made(plan: Plan) -> Made:
    assert plan.made is not None, "prompts, groups and pairs are nodes of a corpus that is made"
    return plan.made


def prompts_node(plan: Plan, name: str) -> Node:
    """Which prompts are answered, one row each."""
    spec = _made(plan).prompts
    if isinstance(spec, EvolvedPrompts):
        return _evolved_node(plan, name, spec)

    def write_recipe(node: Node) -> dict[str, Any]:
        settings = {key: getattr(spec, key) for key in ("part", "count", "seed", "skip", "per_shard")}
        return recipe("prompts", settings | _known_prompts(plan.root))

    return Node("prompts", name, spec, (), write_recipe, "prompts")


def _known_prompts(root: Plan) -> dict[str, Any]:
    """What decides which prompts there are, and which of them are set aside."""
    sources = root.catalog.sources
    return {
        "split": root.config.split.model_dump(),
        "roles": {source.name: source.role for source in sources},
        "shards": hash_hex(*(f"{s.name}/{shard}" for s in sources for file in s.files for shard in file.shards)),
    }


def prompts_before(plan: Plan) -> list[str]:
    """Folders of the prompts that were made in rounds before this corpus, and that it must not make again."""
    found, one = [], plan.outer
    while one is not None and one.made is not None:
        if isinstance(one.made.prompts, EvolvedPrompts):
            found.append(one.node("prompts", one.made.prompts.name).path)
        one = one.outer
    return found


def _evolved_node(plan: Plan, name: str, spec: EvolvedPrompts) -> Node:
    """Prompts made of others: they depend on the policy, on which prompts were chosen, and on all that were seen."""
    made = _made(plan)
    chosen = spec.seeds.node("selection", spec.selection)
    needs = (by_fingerprint(chosen, "selection"), *(Need(node) for node in model_nodes(plan, made.policy)))

    def write_recipe(node: Node) -> dict[str, Any]:
        policy = find_model(plan, made.policy)
        settings: dict[str, Any] = {"evolve": spec.evolve.model_dump(exclude={"share", "strategies"})}
        # Files of strategies are told by what they say.
        settings["strategies"] = [one.model_dump() for one in load_strategies(spec.evolve.strategies)]
        settings |= {"per_shard": spec.per_shard, "seed": made.generation.seed, "before": prompts_before(plan)}
        settings |= {f"policy.{key}": value for key, value in policy.settings.items()} | _known_prompts(plan.root)
        models = {"policy": policy.identity}
        for judge in spec.judges:
            found = find_model(plan, judge)
            models[f"judge {judge}"] = found.identity
            settings |= {f"{judge}.{key}": value for key, value in found.settings.items()}
        return recipe("prompts", settings, models=models, upstream=node.upstream)

    return Node("prompts", name, spec, needs, write_recipe, "prompts")


def groups_node(plan: Plan, name: str) -> Node:
    """The answers of a policy: like columns they depend on the model and the sampling, never on which prompts."""
    made = _made(plan)
    if made.beside and name == made.answers:
        return _joined_node(plan, name)
    needs = [Need(plan.node("prompts", made.prompts.name)), *(Need(node) for node in model_nodes(plan, name))]

    def write_recipe(node: Node) -> dict[str, Any]:
        policy = find_model(plan, name)
        settings = made.generation.recipe_settings() | {f"policy.{key}": v for key, v in policy.settings.items()}
        return recipe("generate", settings, models={"policy": policy.identity})

    return Node("groups", name, made, tuple(needs), write_recipe, "groups")


def _joined_node(plan: Plan, name: str) -> Node:
    """The answers of several models to the same prompts, side by side in their groups."""
    made = _made(plan)
    needs = [by_path(plan.node("groups", one), f"answers {one}") for one in (made.policy, *made.beside)]
    return Node(
        "groups", name, made, tuple(needs), lambda node: recipe("generate", {}, upstream=node.upstream), "groups"
    )


def pairs_node(plan: Plan, name: str) -> Node:
    """Pairs of answers, labelled by the judges."""
    made = _made(plan)
    judged = [by_columns(plan.node("columns", label)) for label in made.judges]

    def write_recipe(node: Node) -> dict[str, Any]:
        settings = {"pairing": made.pairing.model_dump(), "rewards": list(made.rewards)}
        return recipe("pairs", settings, upstream=node.upstream)

    return Node("pairs", name, made, (Need(plan.node("groups", made.answers)), *judged), write_recipe, "pairs")


def generated_catalog(plan: Plan) -> Catalog:
    """The catalog of a corpus that a model makes: the shards of its prompts, answered.

    Raises:
        UserError: its prompts are not chosen yet.
    """
    made = _made(plan)
    prompts = plan.node("prompts", made.prompts.name).path
    summary = load_summary(plan.storage, prompts)
    if summary is None:
        raise UserError(f"{made.name}: its prompts are not chosen yet; run the whole pipeline (`prefsel run`) first")
    source = plan.node("groups", made.answers).path.removeprefix("groups/")
    pairs = f"{plan.node('pairs', made.pairing.kind).path.removeprefix('pairs/')}/{source}" if made.pairing else ""
    shards = [name for name, _ in summary.details["shards"]]
    file = FileRecord(prompts, summary.details["content"], shards, {}, {}, format="generated")
    return Catalog([SourceRecord(source, "train", [file], pairs)])
