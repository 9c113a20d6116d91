"""Trainings: of policies on preference pairs, of reward models; each is a model that may be named like any other."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from prefsel.config.lookup import (
    Lookup,
    require_model,
    require_reference,
    require_single,
    require_untrained,
    require_validation,
)
from prefsel.config.losses import LOSSES, cannot_exchange, loss_named, losses_with, used_options
from prefsel.config.options import Fraction, Name, Options, default_kind
from prefsel.errors import UserError, invalid
from prefsel.plugins.registry import require_one

PARTS = ("all", "validation")
"""Names a training may give instead of a selection."""


class Lora(Options):
    """Low-rank adapters instead of full weights (extra `peft`); the adapter and the merged model are both exported."""

    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the update, which is multiplied by alpha / r."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` means all of them but the head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class Optimization(Options):
    """What decides a trajectory of AdamW. Batches count pairs, memory counts tokens; no number of workers enters."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW. It has no default, because none suits every model."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Number format of weights, activations and communication; with `bf16` the optimizer keeps fp32 master weights."""
    num_epochs: int = Field(1, ge=1)
    """Passes over the pairs; not used when `max_steps` is given."""
    max_steps: int | None = Field(None, ge=1)
    """Take exactly this many optimizer steps, whatever `num_epochs` says; the schedule ends there too. Null means as
    many as the epochs have."""
    global_batch_pairs: int = Field(32, ge=1)
    """Pairs per optimizer step, over all workers. The last batch of an epoch may hold fewer and is averaged exactly."""
    micro_batch_pairs: int = Field(8, ge=1)
    """At most this many pairs per forward and backward pass of one worker. It changes memory and speed, and the weights
    by no more than rounding."""
    token_budget: int = Field(8192, ge=64)
    """At most this many packed tokens per forward and backward pass; a longer pair goes alone. It changes memory and
    speed, and the weights by no more than rounding."""
    order: Literal["shuffled", "given"] = "shuffled"
    """`shuffled` draws a new seeded permutation every epoch; `given` keeps the order of the table, for example easy to
    hard."""
    seed: int = Field(0, ge=0)
    """Decides the order of the pairs and, with LoRA, the initial adapter."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where the cosine that follows the warm-up ends, as a share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW, on matrices only: norms and biases are spared, as by transformers' trainer."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    adam_eps: float = Field(1e-8, gt=0)
    """Offset of AdamW's denominator."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0 switches clipping off."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the workers: 0 nothing, 1 the optimizer states, 2 the gradients too, 3 the weights
    too."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """What lives in CPU memory between steps: nothing, the `optimizer` states (stage 1 to 3), or
    `optimizer_and_weights` (stage 3 only)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: one more forward per step, for far less memory."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own options, merged over ours. Keys that another option decides are refused, because two sources for
    one number would make the trajectory differ from what stands here."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Evaluate on the held-out pairs after every so many steps; null means at the start and the end only."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Save a checkpoint to resume from after every so many steps; null saves none, and a killed training starts
    over."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints are kept, the newest ones."""

    @model_validator(mode="after")
    def _offload_fits(self) -> Optimization:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload: got {self.offload!r} with zero_stage 0; valid: none, or zero_stage 1 to 3")
        if self.offload == "optimizer_and_weights" and self.zero_stage != 3:
            raise ValueError(
                f"offload: got {self.offload!r} with zero_stage {self.zero_stage}; weights need zero_stage 3"
            )
        return self


def _known_loss(name: str) -> str:
    require_one("losses", name, is_builtin=name in LOSSES.builtin)
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        raise ValueError((f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(LOSSES)}")
    return name


def _loss_names(schema: dict[str, Any]) -> None:
    """The names of this package; a plugin may add others."""
    schema.pop("type", None)
    schema["anyOf"] = [{"enum": [*LOSSES.builtin]}, {"type": "string"}]


class DpoOptions(Optimization):
    """What decides a training on preference pairs with stored reference log-probs (`simpo` needs none)."""

    loss: Annotated[str, AfterValidator(_known_loss), Field(json_schema_extra=_loss_names)] = "dpo"
    """Which preference loss is minimised; the equations stand in `prefsel/train/losses.py`."""
    loss_params: dict[str, float | str] = {}
    """Parameters of a loss that have no option of their own here: the `params` of its line in `LOSSES`."""
    beta: float = Field(0.1, gt=0)
    """Inverse temperature β of the implicit reward; of IPO it is the paper's τ. The length-normalised losses compare
    log-probs per token and need a larger one."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels: with `dpo` it makes conservative DPO, with `robust_dpo`, which needs it above 0,
    the loss that is unbiased under such flips."""
    ipo_reduction: Literal["sum", "mean"] = "sum"
    """Which log-probs IPO compares: summed, as in the paper's equation, or the mean per token, as in TRL, which is
    another scale of β."""
    simpo_gamma: float | None = Field(None, ge=0)
    """Target reward margin γ of SimPO, which needs it. The authors' scripts give γ / β as `gamma_beta_ratio`."""
    num_aspects: int | None = Field(None, ge=1)
    """κ of DFPO, which needs it: the number of aspects of the corpus, a pair's own one included."""
    aspect_weights: dict[Name, Annotated[float, Field(gt=0)]] | None = None
    """Weight of every aspect in `weighted_dfpo`, which needs them: the same as in the `divergence` metric. Only their
    ratios matter."""
    divergence: str | None = None
    """Name of the metric of this configuration whose score is −PD, for `dfpo` and `weighted_dfpo`, which add PD to the
    margin of every pair."""
    weight: str | None = None
    """Name of the metric of this configuration whose score w is the weight of every pair; null weighs all alike. A pair
    without a score is left out and counted. Held-out pairs are evaluated without weights."""
    weighting: Literal["loss", "label"] = "loss"
    """What a weight does. `loss` multiplies the loss of its pair, w ℓ, for weights from 0. `label` takes w as the
    probability that the label is right, from 0 to 1, and trains on both ways round, w ℓ(+) + (1 − w) ℓ(−), ℓ(−) the
    loss with chosen and rejected exchanged (RE-PO, with the metric `reliability`). Either is divided by the number of
    pairs of the batch and not by the sum of weights, so that a weight of 1 everywhere changes nothing."""
    order: Literal["shuffled", "given", "score"] = "shuffled"  # type: ignore[assignment]  # one more than other trainings
    """`shuffled` draws a new seeded permutation every epoch; `given` keeps the order of the table; `score` goes by the
    descending score of the selection that is trained on (easy to hard), ties by pair_id."""
    lora: Lora | None = None
    """Train adapters instead of all weights; null trains all weights."""
    reference_check_pairs: int = Field(16, ge=0)
    """So many pairs have their reference log-probs recomputed before training, which must agree with the stored ones; 0
    skips the check."""
    keep_optimizer_state: bool = False
    """Also keep Adam's moments (fp32, as large as two models), which preconditioned tangents and LESS need."""

    @model_validator(mode="after")
    def _options_of_the_loss(self) -> DpoOptions:
        loss = loss_named(self.loss)
        known = {option for one in (*LOSSES.builtin.values(), loss) for option in used_options(one)}
        for name in sorted(known - used_options(loss)):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                valid = ", ".join(losses_with(name))
                raise ValueError(f"{name}: got {value!r} with loss {self.loss!r}; only used by {valid}")
        for name in sorted(used_options(loss)):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: got None; loss {self.loss!r} needs it")
        if unknown := sorted(set(self.loss_params) - set(loss.params)):
            valid = ", ".join(loss.params) or "none"
            raise ValueError(f"loss_params: got {', '.join(unknown)} with loss {self.loss!r}; valid: {valid}")
        if self.weight is None and self.weighting != "loss":
            raise ValueError(f"weighting: got {self.weighting!r} without weight; valid: the name of a metric as weight")
        if self.weighting == "label" and (fault := cannot_exchange(loss, self)):
            raise ValueError(f"weighting: got 'label' with loss {self.loss!r}, {fault}; valid: loss")
        if self.loss == "robust_dpo" and self.label_smoothing == 0:
            raise ValueError("label_smoothing: got 0.0 with loss 'robust_dpo'; valid: above 0, below 0.5 (0 is dpo)")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_params(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A loss without parameters of its own, or without weights, is written, and so named, as if there were no such
        option."""
        written: dict[str, Any] = dump(self)
        unused = [name for name in ("loss_params", "mixed_with") if not written.get(name)]
        for name in [*unused, *([] if self.weight else ["weight", "weighting"])]:
            written.pop(name, None)
        return written

    @model_validator(mode="after")
    def _state_of_all_weights(self) -> DpoOptions:
        if self.keep_optimizer_state and self.lora is not None:
            raise ValueError("keep_optimizer_state: got True with lora; it is kept for all weights, not for adapters")
        return self


@dataclass(frozen=True)
class TrainedModel:
    """One model of a training: its only one, that of an aspect, that of a fold."""

    training: str
    aspect: str | None = None
    fold: int | None = None
    """The fold it is not trained on, and whose prompts it scores."""

    @property
    def label(self) -> str:
        """What its folder is called after."""
        name = self.training if self.aspect is None else f"{self.training}-{self.aspect}"
        return name if self.fold is None else f"{name}.{self.fold}"


class Placement(Options):
    """Where a training runs."""

    workers: int = Field(1, ge=1)
    """Workers of Ray Train, each a process of its own. Their number moves no weight by more than rounding."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs that each worker reserves; null means one where the cluster has GPUs, and none elsewhere."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that each worker reserves."""
    max_failures: int = Field(0, ge=0)
    """How many failures of workers Ray Train repairs by starting again from the last checkpoint, before the run
    fails."""


class CrossFit(Options):
    """One model per fold, trained on the prompts of the other folds; every prompt is scored by the one that never saw
    it. Scorers name the training, the fold of a prompt follows from its prompt_id."""

    folds: int = Field(2, ge=2, le=64)
    """Number of folds, and of models."""
    seed: int = 0
    """Another seed deals the prompts to the folds anew."""


class TrainingRecord(Placement):
    """What trainings of every kind have in common. Their name is a model's name: scorers, tangents and other trainings
    may use it."""

    is_made_here: ClassVar[bool] = True
    gpus_per_replica: ClassVar[int] = 1
    role: ClassVar[str]
    """`policy` or `reward`: what the trained model can be used as."""
    stage: ClassVar[str]
    """What its reports are called."""
    options: ClassVar[type[Optimization]]
    """The part of it that the training loop reads."""

    name: Name
    """Name of the training. It is a model's name too: scorers, tangents and other trainings may use it."""
    selection: str
    """The pairs it is trained on."""
    model: str
    """The model that is trained further: an entry of `models` or of `train`."""
    cross_fit: CrossFit | None = None
    """Train one model per fold instead of one on everything."""

    if TYPE_CHECKING:  # a field of one kind, the same for all trainings of the other

        @property
        def reference(self) -> str | None:
            """Name of the model whose stored log-probs are the reference."""

        @property
        def divergence(self) -> str | None:
            """Name of the metric whose score is part of the loss."""

        @property
        def mixed_with(self) -> str | None:
            """A further selection that it is trained on."""

        @property
        def weight(self) -> str | None:
            """Name of the metric whose score weighs every pair."""

        @property
        def aspects(self) -> list[str]:
            """Aspects that it trains one model for, each."""

        @property
        def max_pairs(self) -> int | None:
            """Most pairs it is trained on."""

        @property
        def max_eval_pairs(self) -> int:
            """Most held-out pairs it is evaluated on."""

        @property
        def keep_optimizer_state(self) -> bool:
            """Whether Adam's moments stay with the weights."""

    @property
    def trained_models(self) -> list[TrainedModel]:
        """Every model that it makes: one per aspect and fold."""
        aspects: list[str | None] = [*self.aspects] or [None]
        folds: list[int | None] = [*range(self.cross_fit.folds)] if self.cross_fit else [None]
        return [TrainedModel(self.name, aspect, fold) for aspect in aspects for fold in folds]

    def check(self, config: Lookup) -> None:
        """Refuse what cannot be trained in this configuration.

        Raises:
            UserError: names the field, the value and the valid ones.
        """
        field = f"train.{self.name}"
        require_single(config, f"{field}.model", self.model)
        self.check_kind(config, field)
        valid = [*PARTS, *(name for selection in config.selections for name in selection.names)]
        if self.selection not in valid:
            raise invalid(f"{field}.selection", self.selection, valid)
        if self.selection == "validation":
            require_validation(config, f"{field}.selection")

    def check_kind(self, config: Lookup, field: str) -> None:
        """What only this kind of training asks of the configuration; errors as `check`."""
        raise NotImplementedError


class TrainDpo(DpoOptions, TrainingRecord):
    """A training of a policy on preference pairs."""

    role: ClassVar[str] = "policy"
    stage: ClassVar[str] = "train"
    options: ClassVar[type[Optimization]] = DpoOptions
    aspects: ClassVar[list[str]] = []
    max_pairs: ClassVar[None] = None

    kind: Literal["dpo"] = "dpo"
    """A training of a policy on preference pairs; the default kind."""
    selection: str
    """What is trained on: a selection or one of its controls (`<name>-random`), or `all` eligible pairs, or the
    `validation` pairs."""
    model: str
    """The model that is trained further: an entry of `models`, or of `train` to continue from."""
    reference: str | None = None
    """The model whose stored log-probs are the reference; a `causal_logps` scorer must make them, and the model itself
    is not loaded. Every loss needs one but `simpo`, which takes none."""
    cross_fit: CrossFit | None = None
    """Train one model per fold, each on the prompts of the other folds, instead of one model on everything."""
    max_eval_pairs: int = Field(512, ge=0)
    """At most this many held-out pairs are evaluated on, the first by hash of their pair_id."""
    mixed_with: str | None = None
    """A further selection of the corpus whose pairs are trained on besides; a pair of both counts once. Rounds of
    self-play set it to theirs."""

    @model_validator(mode="after")
    def _has_reference(self) -> TrainDpo:
        if (self.reference is None) == loss_named(self.loss).uses_reference:
            needed = "required" if self.reference is None else "not used"
            raise ValueError(f"reference: {needed} with loss {self.loss!r}")
        return self

    def check_kind(self, config: Lookup, field: str) -> None:
        """A policy to start from, a stored reference, and what its options need."""
        if self.cross_fit is not None:
            require_untrained(config, f"{field}.model", self.model)
        require_model(config, f"{field}.model", self.model, "policy")
        if self.reference:
            require_reference(config, f"{field}.reference", self.reference)
            require_single(config, f"{field}.reference", self.reference)
        if self.order == "score" and (self.selection in PARTS or self.mixed_with):
            raise invalid(f"{field}.order", "score", "shuffled or given: only a selection alone has scores")
        if self.mixed_with is not None:
            names = [name for selection in config.selections for name in selection.names]
            if self.mixed_with not in names:
                raise invalid(f"{field}.mixed_with", self.mixed_with, names or "none: `selections` is empty")
            if self.divergence or self.weight:
                raise invalid(f"{field}.mixed_with", self.mixed_with, "none with a divergence or a weight")
        if self.lora is not None and importlib.util.find_spec("peft") is None:
            raise UserError(f"{field}.lora: needs the extra `peft`: pip install 'prefsel[peft]'")


class RewardOptions(Optimization):
    """What decides a Bradley–Terry reward model."""

    length_balance_tau: float | None = Field(1.0, gt=0)
    """τ of length-balanced sampling: pairs with the longer completion chosen are drawn with frequency e^(f⁺/τ) /
    (e^(f⁺/τ) + e^(f⁻/τ)), f⁺ their share; a large τ means half and half, below about 0.5 the draw is further from one
    half than the data. Null draws pairs as they come. OPEN: no source gives the paper's value."""
    length_penalty_rho: float = Field(0.0, allow_inf_nan=False)
    """ρ in −log σ(Δr − ρ Δlen), the reward that one unit of length is worth; 0 is plain Bradley–Terry. OPEN. A reward
    model that can express length only shifts by it, so `rho: fit` of the metric is the way to take length out after the
    fact."""
    length_unit: Literal["tokens", "characters"] = "tokens"
    """What Δlen counts. OPEN: the paper does not say."""
    holdout: Fraction = 0.1
    """Share of the training prompts, by hash, that accuracy and calibration are measured on."""

    @model_validator(mode="after")
    def _one_order(self) -> RewardOptions:
        if self.order == "given" and self.length_balance_tau is not None:
            raise ValueError("order: got 'given', which a balanced sample has not; set length_balance_tau: null")
        return self


class TrainReward(RewardOptions, TrainingRecord):
    """A training of reward models: one per aspect, or one on all pairs."""

    role: ClassVar[str] = "reward"
    stage: ClassVar[str] = "reward"
    options: ClassVar[type[Optimization]] = RewardOptions
    reference: ClassVar[None] = None
    divergence: ClassVar[None] = None
    mixed_with: ClassVar[None] = None
    weight: ClassVar[None] = None
    max_eval_pairs: ClassVar[int] = 0
    keep_optimizer_state: ClassVar[bool] = False

    kind: Literal["reward"]
    """A training of Bradley–Terry reward models."""
    selection: Literal["all", "validation"] = "all"
    """What is trained on: `all` eligible pairs, or the `validation` pairs."""
    model: str
    """Where the weights start: an entry of `models`, causal or classifier."""
    aspects: list[Name] = []
    """One model for each aspect named here, trained on the pairs labelled with it; it scores the others' prompts as
    `rm_<aspect>`. Empty: one model, on all pairs."""
    cross_fit: CrossFit | None = None
    """One model per aspect and fold, so that every prompt can be scored by a model that never saw it. Needed without
    `aspects`, and where one prompt is labelled with several aspects."""
    max_pairs: int | None = Field(None, ge=1)
    """Train on at most this many pairs, the first by hash of their pair_id; null means all."""

    def check_kind(self, config: Lookup, field: str) -> None:
        """Weights to start from that have seen no label of what is scored."""
        require_untrained(config, f"{field}.model", self.model)
        known = [spec.name for spec in (*config.models, *config.train)]
        if self.model not in known:
            raise invalid(f"{field}.model", self.model, known or "none: `models` is empty")
        if self.aspects and not self.cross_fit and any(source.options.aspects == "all" for source in config.sources):
            raise UserError(
                f"{field}.cross_fit: needed, because a source has options.aspects: all; its prompts are labelled with "
                "several aspects, so every reward model would have seen every prompt"
            )


DEFAULT_TRAINING: Final = "dpo"
"""What an entry of `train` without a `kind` is."""

Training = Annotated[TrainDpo | TrainReward, Field(discriminator="kind"), default_kind(DEFAULT_TRAINING)]
"""An entry of `train`."""
