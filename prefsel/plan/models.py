"""The models that a configuration names: where they lie, what they are, and the settings that change their numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefsel.config import TrainedModel
from prefsel.config.lookup import find
from prefsel.errors import UserError, invalid
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.workspace.folders import folder_content


@dataclass(frozen=True)
class ModelRef:
    """A model of the configuration, found."""

    name: str
    path: str
    """Directory in the workspace (`made_here`), local directory, or hub id."""
    identity: str
    """Hash of its weights and what belongs to them, or the commit of a hub model."""
    made_here: bool
    settings: dict[str, Any]
    """dtype, max_length, truncation, template: what changes numbers; see `scoring_settings`."""
    revision: str | None = None
    """What is loaded: the commit of a hub model; of an adapter also its base and that one's commit."""
    trust_remote_code: bool = False
    """Whether the code of its repository may run."""
    gpus_per_replica: int = 1
    """GPUs one copy is spread over."""


def model_spec(plan: Plan, name: str) -> Any:
    """The entry of `models` or `train` that makes model `name`.

    Raises:
        UserError: no such model.
    """
    records = [*plan.config.models, *plan.config.train]
    spec = find(records, name)
    if spec is None:
        raise invalid("model", name, [one.name for one in records] or "none: `models` is empty")
    return spec


def starting_model(plan: Plan, name: str) -> Any:
    """The entry of `models` that model `name` is, or that its training, and whatever that started from, began with."""
    spec = model_spec(plan, name)
    while spec.kind in ("dpo", "reward"):
        spec = model_spec(plan, spec.model)
    return spec


def trained_models(spec: Any, aspect: str | None = None) -> list[TrainedModel]:
    """The models of a training, or those of one aspect."""
    return [one for one in spec.trained_models if aspect is None or one.aspect == aspect]


def model_nodes(plan: Plan, name: str, aspect: str | None = None) -> list[Node]:
    """What makes model `name`: nothing for a pretrained one, several nodes for a training with folds or aspects."""
    spec = model_spec(plan, name)
    if spec.kind in ("dpo", "reward"):
        return [plan.node("model", one.label) for one in trained_models(spec, aspect)]
    return [plan.node("scratch", name)] if spec.is_made_here else []


def find_models(plan: Plan, name: str, aspect: str | None = None) -> dict[TrainedModel, ModelRef]:
    """The models that `name` stands for: one, or those of a training's folds and aspects (only `aspect`, if given).

    Raises:
        UserError: no such model, or one that is not made yet or whose directory is incomplete.
    """
    spec, settings = model_spec(plan, name), scoring_settings(plan, name)
    if not spec.is_made_here:
        return {TrainedModel(name): _pretrained(spec, settings)}
    nodes = model_nodes(plan, name, aspect)
    return {node.member or TrainedModel(name): _made(plan, node, settings) for node in nodes}


def find_model(plan: Plan, name: str) -> ModelRef:
    """Model `name`; errors as `find_models`, or when it stands for several models."""
    found = find_models(plan, name)
    if len(found) > 1:
        raise UserError(f"model: {name!r} is {len(found)} models, per fold or aspect; only a scorer can use them")
    return next(iter(found.values()))


def _made(plan: Plan, node: Node, settings: dict[str, Any]) -> ModelRef:
    content = folder_content(plan.storage, node.path)
    if content is None:
        raise UserError(f"models.{node.name}: not made yet; run the whole pipeline (`prefsel run`) first")
    # Weights that a model's own code computes with are exported beside that code.
    trusts_code = starting_model(plan, node.name if node.member is None else node.member.training).trust_remote_code
    return ModelRef(node.name, node.path, content, True, settings, trust_remote_code=trusts_code)


def _pretrained(spec: Any, settings: dict[str, Any]) -> ModelRef:
    from prefsel.models.directory import model_identity, pinned_revision

    identity = model_identity(spec.path, revision=spec.revision)
    is_local = Path(spec.path).is_dir()
    return ModelRef(
        name=spec.name,
        # The commit that the identity names is the one that workers load, whatever the hub says by then.
        path=str(Path(spec.path).absolute()) if is_local else spec.path,
        identity=identity,
        made_here=False,
        settings=settings,
        revision=pinned_revision(spec.path, spec.revision),
        trust_remote_code=spec.trust_remote_code,
        gpus_per_replica=spec.gpus_per_replica,
    )


def scoring_settings(plan: Plan, name: str) -> dict[str, Any]:
    """What changes a model's numbers; of a trained model that of its base.

    dtype, max_length, truncation and template; and of models whose padded numbers changed once, `padded_version`.

    Raises:
        UserError: no such model, or a `max_length` that it does not have.
    """
    spec = starting_model(plan, name)
    settings: dict[str, Any] = spec.model_dump(include={"dtype", "max_length", "truncation", "template"})
    if os.path.isfile(spec.template):  # its text decides, and workers have other working directories
        settings["template"] = Path(spec.template).read_text(encoding="utf-8")
    if not spec.is_made_here:
        from prefsel.models.declared import max_positions, padded_version_of
        from prefsel.models.directory import pinned_revision
        from prefsel.models.loading import context_length

        revision = pinned_revision(spec.path, spec.revision)
        declared = max_positions(spec.path, revision, spec.trust_remote_code)
        if spec.max_length is None:
            settings["max_length"] = context_length(spec.path, revision, spec.trust_remote_code)
        elif declared and spec.max_length > declared:
            valid = f"at most the model's {declared} positions"
            raise invalid(f"models.{spec.name}.max_length", spec.max_length, valid)
        limit = settings["max_length"]
        version = padded_version_of(spec.path, revision, spec.trust_remote_code, max_length=limit)
        if version is not None:
            settings["padded_version"] = version
    return settings


def head_names(plan: Plan, name: str) -> list[str]:
    """Names of a reward model's outputs."""
    spec = model_spec(plan, name)
    if not spec.is_made_here:
        from prefsel.models import declared

        return declared.head_names(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    return getattr(spec, "heads", []) or [name]
