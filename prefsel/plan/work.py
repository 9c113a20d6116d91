"""The FLOPs, tokens and memory of every node that runs models, from a sample and the models' configurations.

    sample ─ each model's own encoder ─▶ tokens ─ F_min of its shape ─▶ Work: FLOPs with an interval, tokens, memory

FLOPs of a scorer are what its counter `flops_min` will sum up. Of a training they are the least for its pairs, one by
one: its counter adds that attention goes by blocks of 64 queries (1 % of a real model, up to a tenth of a tiny one),
and takes off what pairs of a batch share. What cannot be told says why in `missing`; the rest is told without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from prefsel.config import PARTS
from prefsel.config.lookup import find
from prefsel.errors import UserError
from prefsel.models.chat import EncodedGroup, Encoder, Unconditional
from prefsel.models.loading import load_tokenizer
from prefsel.models.packing import flops_min
from prefsel.plan.kept import kept_pairs
from prefsel.plan.models import model_nodes, model_spec, scoring_settings, starting_model
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.plan.sample import Sample
from prefsel.plan.sizes import Memory, ModelSize, model_size, scoring_memory, scratch_size, training_memory
from prefsel.plan.survey import NOTHING, Estimate
from prefsel.scratch.tokenizer import train_tokenizer
from prefsel.workspace.folders import SEAL, fetch_folder

ENCODED_TOGETHER = 256
WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


@dataclass(frozen=True)
class Work:
    """One node that runs models, or why it cannot be told what it takes."""

    node: str
    kind: str
    """`scoring` or `training`."""
    missing: str = ""
    flops: Estimate = NOTHING
    """Of a scorer with each token once (`flops_min`); of a training all that it computes."""
    passes: float = 1.0
    """Forward passes that a scorer takes for each token."""
    tokens: Estimate = NOTHING
    """Through the trunk, prompts once a group; of a training over all epochs."""
    items: Estimate = NOTHING
    """Completions, or pairs over all epochs."""
    memory: Memory | None = None
    dtype: str = ""
    gpus: int = 1
    """GPUs of a replica, or of all workers together."""
    most_gpus: int | None = None
    """That it can use at once; None: any number."""
    left: float = 1.0
    """The share that is not in the workspace yet."""
    note: str = ""

    @property
    def computed(self) -> Estimate:
        """FLOPs that are still to be computed."""
        return self.flops.times(self.passes * self.left)


@dataclass(frozen=True)
class Model:
    """A model as it can be looked at before it runs."""

    tokenizer: Any
    settings: dict[str, Any]
    size: ModelSize


@dataclass
class Works:
    """Works out what nodes take, each encoder's tokens once."""

    plan: Plan
    sample: Sample
    missing: dict[str, str] = field(default_factory=dict)
    """Node → why it is not known what it takes."""
    _tokens: dict[Any, list[EncodedGroup]] = field(default_factory=dict)
    _models: dict[tuple[str, str], Model] = field(default_factory=dict)

    def of(self, node: Node) -> Work | None:
        """The work of a node; None for one that runs no model."""
        found = self._of(node)
        if found is not None and found.missing:
            self.missing[found.node] = found.missing
        return found

    def _of(self, node: Node) -> Work | None:
        if node.kind == "columns" and node.spec.runs_models:
            return self._guarded(node, "scoring", self._scoring)
        if node.kind == "model":
            return self._guarded(node, "training", self._training)
        if node.kind in ("tangent", "evaluation", "groups"):
            missing = {
                "tangent": "its validation pairs are not part of the sample",
                "evaluation": "what a model will answer is not known",
                "groups": "what a model will answer is not known",
            }
            return Work(str(node), "scoring", missing[node.kind])
        return None

    @cached_property
    def eligible(self) -> Estimate:
        """Pairs that may be selected, duplicates not looked for."""
        return self.sample.counted("eligible_pairs")

    def pair_flops(self, model: str, role: str) -> Estimate:
        """F_min of all eligible pairs, each as a group of its own."""
        one = self.model(model, role)
        encoded = self.encoded(one)
        return self.sample.total(
            [flops_min([*_pairs_of(group, of)], one.size.shape) for group, of in zip(encoded, self.sample.every_group)]
        )

    def _guarded(self, node: Node, kind: str, work: Callable[[Node], Work]) -> Work:
        try:
            return work(node)
        except UserError as error:  # a model that is out of reach is no reason to keep the rest back
            return Work(str(node), kind, str(error))

    # ---------------------------------------------------------------------------------------------------- scoring

    def _scoring(self, node: Node) -> Work:
        scorer, config = node.spec, self.plan.config
        name, kind = str(node), scorer.kind
        if kind == "function":
            return Work(name, "scoring", "a function of the user's: what it takes is not known")
        passes = {"causal_logps": 1.0, "reward_model": 1.0, "divergence": 2.0, "pair_gradients": 1.0}
        if kind == "directional_logps":
            directions = len(scorer.directions(config))
            passes[kind] = 3.0 * directions if scorer.method == "exact" else 1.0 + directions
        if kind not in passes:
            return Work(name, "scoring", f"what a scorer of kind {kind} takes is not known before it has answered")
        role = "reward" if kind == "reward_model" else "policy"
        names = scorer.models(config)
        model = self.model(names[-1], role)
        encoded = self.encoded(model, is_unconditional=getattr(scorer, "unconditional", False))
        of = list(zip(encoded, self.sample.every_group))
        shape = model.size.shape
        if kind == "pair_gradients":
            flops = self.sample.total([3.0 * flops_min([*_pairs_of(group, one)], shape) for group, one in of])
            tokens = self.sample.total([sum(_tokens([pair]) for pair in _pairs_of(group, one)) for group, one in of])
            items = self.eligible
        else:
            flops = self.sample.total([flops_min([group], shape) for group in encoded])
            tokens = self.sample.total([_tokens([group]) for group in encoded])
            left_out = self.sample.total([sum(one != "ok" for one in group.status) for group in encoded])
            of_all = self.sample.counted("num_completions")
            items = Estimate(
                *(of_all.value - left_out.value, max(0.0, of_all.low - left_out.high), of_all.high - left_out.low)
            )
        sizes = [
            (self.model(one, role).size, scoring_settings(self.plan, one)["dtype"]) for one in dict.fromkeys(names)
        ]
        gpus = model_spec(self.plan, names[-1]).gpus_per_replica
        pool = scorer.pool
        most = pool.size or pool.max_size
        training = find(config.train, names[-1])
        leaves_out = training is not None and training.role == "reward" and not training.cross_fit
        note = (
            "an upper end: prompts that its model was trained on are left out"
            if leaves_out
            else self._scratch_note(names)
        )
        memory = scoring_memory(sizes, token_budget=scorer.token_budget, gpus=gpus)
        return Work(
            *(name, "scoring", "", flops, passes[kind], tokens, items, memory, model.settings["dtype"], gpus),
            most_gpus=most * gpus if most else None,
            note=note,
        )

    # --------------------------------------------------------------------------------------------------- training

    def _training(self, node: Node) -> Work:
        spec, member = node.spec, node.member
        if spec.selection == "validation":
            return Work(str(node), "training", "its validation pairs are not part of the sample")
        per_pair = self.pair_flops(spec.model, spec.role)
        pairs, note = self.pairs_of(spec)
        if member is not None and member.fold is not None:
            pairs = pairs.times(1 - 1 / spec.cross_fit.folds)
        if member is not None and member.aspect is not None:
            pairs, note = pairs.times(1 / len(spec.aspects)), "aspects counted as equally frequent"
        drawn = pairs.times(spec.num_epochs)
        if spec.max_steps:
            drawn = Estimate.exact(float(spec.max_steps * spec.global_batch_pairs))
        share = _over(drawn, self.eligible)
        tau = 4.0 if spec.gradient_checkpointing else 3.0
        flops = _product(per_pair, share).times(tau)
        model = self.model(spec.model, spec.role)
        tokens = self.sample.total(
            [
                sum(_tokens([pair]) for pair in _pairs_of(group, one))
                for group, one in zip(self.encoded(model), self.sample.every_group)
            ]
        )
        lora = getattr(spec, "lora", None)
        memory = training_memory(model.size, spec, workers=spec.workers, lora_rank=lora.r if lora else None)
        gpus = max(1, round(spec.workers * (1 if spec.gpus_per_worker is None else spec.gpus_per_worker)))
        return Work(
            *(str(node), "training", "", flops, 1.0, _product(tokens, share), drawn, memory, spec.dtype, gpus),
            most_gpus=gpus,
            note=note,
        )

    def pairs_of(self, spec: Any) -> tuple[Estimate, str]:
        """The pairs of one epoch of a training, and what is to be known about that number."""
        pairs, note = self.eligible, ""
        if spec.selection not in PARTS:
            selection = next(one for one in self.plan.config.selections if spec.selection in one.names)
            pairs, note = kept_pairs(selection.rule, self.eligible)
        if spec.role == "reward" and spec.holdout:
            pairs = pairs.times(1 - spec.holdout)
        if spec.max_pairs is not None:
            pairs = Estimate(*(min(one, float(spec.max_pairs)) for one in (pairs.value, pairs.low, pairs.high)))
        return pairs, note

    # ----------------------------------------------------------------------------------------------------- models

    def model(self, name: str, role: str) -> Model:
        """A model as the plan names it; of a training, what it started from.

        Raises:
            UserError: It cannot be had.
        """
        if (name, role) not in self._models:
            self._models[name, role] = self._found(name, role)
        return self._models[name, role]

    def _found(self, name: str, role: str) -> Model:
        spec = starting_model(self.plan, name)
        if spec.is_made_here:
            return self._scratch(spec)
        more = (spec.revision, spec.trust_remote_code)
        size = model_size(spec.path, *more, role)
        tokenizer = load_tokenizer(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        return Model(tokenizer, scoring_settings(self.plan, name), size)

    def _scratch(self, spec: Any) -> Model:
        """A model made on the spot: as it lies in the workspace, else with a tokenizer trained on the sample."""
        settings = scoring_settings(self.plan, spec.name)
        if (folder := made_folder(self.plan, spec.name)) is not None:
            tokenizer = load_tokenizer(folder)
        else:
            texts = (
                message["content"] or ""
                for group in self.sample.every_group
                for messages in (group.prompt, *group.completions)
                for message in messages
            )
            tokenizer = train_tokenizer(texts, kind=spec.tokenizer.kind, vocab_size=spec.tokenizer.vocab_size)
        return Model(tokenizer, settings, scratch_size(spec, len(tokenizer)))

    def _scratch_note(self, names: Sequence[str]) -> str:
        specs = [starting_model(self.plan, name) for name in names]
        if any(spec.is_made_here and made_folder(self.plan, spec.name) is None for spec in specs):
            return "with a tokenizer trained on the sample"
        return ""

    def encoded(self, model: Model, *, is_unconditional: bool = False) -> list[EncodedGroup]:
        """The sampled groups as tokens of a model."""
        settings = model.settings
        key = (
            id(model.tokenizer),
            settings["template"],
            settings["max_length"],
            settings["truncation"],
            is_unconditional,
        )
        if key not in self._tokens:
            encoder = Encoder(model.tokenizer, settings["template"], settings["max_length"], settings["truncation"])
            asked = Unconditional(encoder) if is_unconditional else encoder
            pairs = [(group.prompt, group.completions) for group in self.sample.every_group]
            starts = range(0, len(pairs), ENCODED_TOGETHER)
            self._tokens[key] = [
                one for at in starts for one in asked.encode_groups(pairs[at : at + ENCODED_TOGETHER], strict=False)
            ]
        return self._tokens[key]


def made_folder(plan: Plan, name: str, *, weights: bool = False) -> str | None:
    """Where a model made on the spot lies, if it is there; its weights only where they are asked for."""
    try:
        (node,) = model_nodes(plan, name)
        path = node.path
    except UserError:
        return None
    if not plan.storage.exists(f"{path}/{SEAL}"):
        return None
    return str(fetch_folder(plan.storage, path, *(() if weights else (WITHOUT_WEIGHTS,))))


def _tokens(groups: Sequence[EncodedGroup]) -> float:
    """Prompt tokens once, and the response tokens of every completion that is not left out."""
    total = 0
    for group in groups:
        lengths = [len(tokens) for tokens, status in zip(group.completion_tokens, group.status) if status == "ok"]
        if lengths:
            starts = [start for start, status in zip(group.prompt_starts, group.status) if status == "ok"]
            total += len(group.prompt_tokens) - min(starts, default=0) + sum(lengths)
    return float(total)


def _pairs_of(group: EncodedGroup, sampled: Any) -> Iterator[EncodedGroup]:
    """Each eligible pair as a group of two; one of which a side is left out is not trained on."""
    for sides in sampled.pairs:
        if all(group.status[side] == "ok" for side in sides):
            yield replace(
                group,
                completion_tokens=[group.completion_tokens[side] for side in sides],
                status=["ok", "ok"],
                prompt_starts=tuple(group.prompt_starts[side] for side in sides) if group.prompt_starts else (),
                same_as=(),
            )


def _over(part: Estimate, whole: Estimate) -> Estimate:
    """A share of an uncertain whole: of a ratio it is exact, of a count uncertain the other way round."""
    if not whole.value:
        return NOTHING
    low, high = (whole.high, whole.low) if part.is_exact else (whole.low, whole.high)
    return Estimate(part.value / whole.value, part.low / max(low, 1), part.high / max(high, 1))


def _product(total: Estimate, share: Estimate) -> Estimate:
    """A total times a share."""
    return Estimate(total.value * share.value, total.low * share.low, total.high * share.high)
