"""The configuration of a run: frozen records, every key documented, nothing unknown accepted.

Rules and metric parameters stand here as plain tables; their own files (`select/rules.py`, `metrics/*.py`) define and
check them, see `pipeline.check`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from prefsel.config.losses import LOSSES, loss_named, losses_with, used_options

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Dtype = Literal["fp32", "bf16", "fp16"]


class Record(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# ------------------------------------------------------------------------------------------------------- ingest


class FormatOptions(Record):
    """How rows with several completions become pairs."""

    aspects: Literal["assign", "all"] = "assign"
    """`assign`: one aspect per prompt, by hash, so that proxies trained on one aspect never saw the others' texts."""
    label: Literal["aspect", "overall", "mean"] = "aspect"
    """Which rating labels a pair: the aspect's own, the overall score, or the mean over aspects."""
    relabel: bool = False
    """With `label: overall` or `mean`: keep the pairs that an aspect labels and only turn them by the other rating (the
    baselines OVA and AVG), instead of mining every two completions by it."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """For K completions with scalar rewards: one pair (best against worst) or every pair with unequal rewards."""

    @model_validator(mode="after")
    def _turned_by_another(self) -> FormatOptions:
        if self.relabel and self.label == "aspect":
            raise ValueError("relabel: got True with label 'aspect'; valid: label overall or mean")
        return self


class Source(Record):
    """One named part of the corpus."""

    name: Name
    paths: list[str] = Field(min_length=1)
    """Files, folders, globs or URIs (`s3://`, `gs://`, `hf://datasets/…`), or `datasets:NAME[:CONFIG]/SPLIT`."""
    format: str = "auto"
    """A format of `ingest/formats.py`, or `auto`: detected from the first rows."""
    options: FormatOptions = FormatOptions()
    role: Literal["train", "validation", "holdout", "exclude"] = "train"
    """`holdout`: evaluated on, never selected or trained on. `validation`: what influence is measured against (see
    `Split.validation`), refused when it shares a prompt with what is selected
    from. `exclude`: used nowhere."""


class Ingest(Record):
    """Limits of ingest."""

    rows_per_shard: int = Field(4096, ge=1)
    """Input rows in one shard, the unit of work, retry and resume."""
    max_row_mib: float = Field(16.0, gt=0)
    max_quarantine_fraction: float = Field(0.05, ge=0, le=1)
    """The run fails when more of the rows are quarantined."""


class Split(Record):
    """Fractions of the prompts, by hash of prompt_id, that are kept out of selection."""

    holdout: Fraction = 0.0
    """Evaluated on, never selected, never in a moment, never trained on."""
    proxy: Fraction = 0.0
    """Trains the models made here (`scratch_*`), and is therefore never scored for selection."""
    validation: Fraction = 0.0
    """What selectors aim at: gives tangents their gradient and θ_val its training. Never selected, and never what a
    training is evaluated on, so that the evaluation stays untouched by the selection."""

    @model_validator(mode="after")
    def _something_left(self) -> Split:
        if (total := self.holdout + self.proxy + self.validation) >= 1:
            raise ValueError(f"holdout + proxy + validation: got {total}; must stay below 1")
        return self


# ------------------------------------------------------------------------------------------------------- models


class PretrainedModel(Record):
    """A model from a directory or a hub."""

    kind: Literal["pretrained"] = "pretrained"
    name: Name
    path: str
    """Local directory, or hub id."""
    revision: str | None = None
    dtype: Dtype = "bf16"
    max_length: int | None = Field(None, ge=8)
    """Longest prompt + response in tokens; default: what the model declares."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a longer one: dropped as `too_long`, cut on the right, or its prompt cut on the left."""
    template: str = "auto"
    """`auto` (the tokenizer's chat template), `plain`, `hh`, or a Jinja template or file."""
    trust_remote_code: bool = False
    """Needs the exact revision."""
    gpus_per_replica: int = Field(1, ge=1)
    """GPUs one copy is spread over."""


class ScratchTokenizer(Record):
    """A tokenizer trained on the corpus text."""

    kind: Literal["bpe", "word"] = "bpe"
    vocab_size: int = Field(2048, ge=64)


class ScratchModel(Record):
    """A small model made on the spot from the `proxy` part of the corpus: for trials without weights at hand."""

    name: Name
    hidden_size: int = Field(64, ge=8)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    steps: int = Field(150, ge=1)
    batch_tokens: int = Field(4096, ge=64)
    lr: float = Field(3e-3, gt=0)
    max_length: int = Field(512, ge=8)
    truncation: Literal["drop", "right", "left"] = "drop"
    seed: int = 0
    tokenizer: ScratchTokenizer = ScratchTokenizer()
    dtype: Dtype = "fp32"
    template: str = "auto"


class ScratchPolicy(ScratchModel):
    """A causal language model, tuned on the chosen completions of the `proxy` prompts."""

    kind: Literal["scratch_policy"]


class ScratchReward(ScratchModel):
    """A Bradley–Terry reward model, trained on the pairs of the `proxy` prompts."""

    kind: Literal["scratch_reward"]
    heads: list[Name] = []
    """One head per aspect named here, each trained on the pairs of that aspect; none named: one head, all pairs."""


Model = Annotated[PretrainedModel | ScratchPolicy | ScratchReward, Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------------ scoring


class Pool(Record):
    """How many copies of a model score at once."""

    size: int | None = Field(None, ge=1)
    """A fixed number of actors; default: what the cluster holds, at most one per shard."""
    min_size: int | None = Field(None, ge=1)
    max_size: int | None = Field(None, ge=1)
    """Autoscaled between `min_size` and `max_size`."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs per actor; default: `gpus_per_replica` when the cluster has GPUs, else 0."""
    num_cpus: float = Field(1.0, gt=0)
    share: Literal["auto", "never"] = "auto"
    """`auto`: log-probs of several models that need the same tokens are computed in one pass over the shards, where all
    of them fit into an actor's memory. `never`: one model after another. The numbers are the same."""

    @model_validator(mode="after")
    def _fixed_or_scaled(self) -> Pool:
        if self.size is not None and (self.min_size is not None or self.max_size is not None):
            raise ValueError("pool: give either size, or min_size and max_size")
        if (self.min_size is None) != (self.max_size is None):
            raise ValueError("pool: min_size and max_size go together")
        if self.min_size is not None and self.max_size is not None and self.min_size > self.max_size:
            raise ValueError(f"pool: min_size {self.min_size} is above max_size {self.max_size}")
        return self


class PooledScorer(Record):
    """What the scorers that run on actors share."""

    pool: Pool = Pool()
    token_budget: int | None = Field(None, ge=64)
    """Tokens of one packed row; default: 8 192 on a CPU, probed by each actor on a GPU."""
    max_poison_fraction: float = Field(0.0, ge=0, le=1)
    """The run fails when more of the completions got NaN or infinity from the model."""


class ModelScorer(PooledScorer):
    """What the scorers named after a model share."""

    model: str
    """Name of an entry of `models` or of `train`; also names the columns."""
    compile: bool = False
    """Compile the decoder layers with torch: some percent faster after seconds to minutes at the start, and numbers
    that differ by rounding, as they do between token budgets."""


class CausalLogps(ModelScorer):
    """`logps_<model>` (nats, summed over the response) and `num_tokens_<model>`."""

    kind: Literal["causal_logps"]
    unconditional: bool = False
    """Score the responses without their prompts: `logps_<model>_uncond` and `num_tokens_<model>_uncond`."""


class RewardModel(ModelScorer):
    """`rm_<model>`; `rm_<head>` for each of several heads; `rm_<aspect>` for each model of a training with aspects."""

    kind: Literal["reward_model"]
    heads: list[Name] | None = None
    """Names of the heads, in the order of the model's labels; default: those of the model's own `id2label`."""
    aspect: Name | None = None
    """Of a training with aspects: score with this one's model only; default: with each, one column set per aspect."""


class GeneratedReward(ModelScorer):
    """`rm_<model>_generated`, or `rm_<head>_generated`: the reward of one response that a policy gives to the prompt.

    The number is the same for all of the prompt's completions; null where the response is empty or too long.
    """

    kind: Literal["generated_reward"]
    head: Name | None = None
    """Of a model with several heads, the one that judges."""
    policy: str
    """Name of the model that responds."""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    seed: int = 0


class DirectionalLogps(PooledScorer):
    """`dlogps_<tangent>`: derivative of every completion's log-prob along a tangent, at the tangent's own model.

    A tangent with strata gives one column each, `dlogps_<tangent>-<stratum>`, in one pass over the model.
    """

    kind: Literal["directional_logps"]
    tangent: Name
    method: Literal["exact", "finite_difference"] = "exact"
    """`exact`: forward mode, about three forwards per stratum. `finite_difference`: one forward per stratum and one
    more, in fp32; its error against the exact derivative is measured on the first groups of every shard."""
    step: float = Field(3e-5, gt=0)
    """Of the finite difference: length of the step, relative to the norm of the weights."""


class PairGradients(PooledScorer):
    """What LESS needs of every eligible pair, from its own gradient: `gamma_dot_<tangent>`, the inner product of its
    Adam feature with the unit validation gradient, and `gamma_norm_<tangent>`, the feature's norm. The tangent must be
    the plain gradient, and its model a training with `keep_optimizer_state`."""

    kind: Literal["pair_gradients"]
    tangent: Name


class Imported(Record):
    """Numbers that came with the data, kept as a column."""

    kind: Literal["imported"]
    name: Name
    """`rm_<name>` for `as: rm`; a label only for `as: ratings`."""
    field: str | Annotated[list[str], Field(min_length=1)] = "score"
    """What the number is called in the data: `score` for score_chosen/score_rejected, an aspect, `<x>` for
    `<x>_chosen`/`<x>_rejected`; a list of aspects gives one `ratings_<aspect>` column each."""
    as_: Literal["rm", "ratings"] = Field("rm", alias="as")


Scorer = Annotated[
    CausalLogps | RewardModel | GeneratedReward | DirectionalLogps | PairGradients | Imported,
    Field(discriminator="kind"),
]

# ----------------------------------------------------------------------------------------------------- influence


class Tangent(Record):
    """A direction in the space of a model's weights: the mean DPO gradient of the validation pairs, or what a diagonal
    makes of it. Along it `directional_logps` gives the influence of every pair."""

    name: Name
    model: str
    """The warm-up θ: an entry of `models` or of `train`."""
    reference: str
    """The model whose stored log-probs are the reference."""
    beta: float = Field(0.1, gt=0)
    """Of the validation loss. The influence of a pair is exact for this beta; a metric that has another is refused."""
    preconditioner: Literal["none", "adam", "fisher"] = "none"
    """Divide by `sqrt(second moment) + damping`: that of the warm-up's Adam (which must be a training with
    `keep_optimizer_state`), or the mean squared validation gradient over pairs (empirical Fisher)."""
    damping: float = Field(1e-8, gt=0)
    """OPEN: no source gives one; relative to the largest root of the second moment it should stay small."""
    by: Literal["aspect", "source"] | None = None
    """One direction per stratum of the validation pairs."""
    values: list[str] = []
    """The strata: values of `by`."""
    max_pairs: int | None = Field(None, ge=1)
    """Use at most this many validation pairs, the first by hash of their pair_id."""
    dtype: Dtype = "fp32"

    @model_validator(mode="after")
    def _strata_named(self) -> Tangent:
        if bool(self.by) != bool(self.values):
            raise ValueError("by and values go together: the strata must be known before the data is read")
        return self

    @property
    def directions(self) -> list[str]:
        """Names of the directions, which name columns: the tangent's own, or `<name>-<stratum>`."""
        return [f"{self.name}-{value}" for value in self.values] or [self.name]


# --------------------------------------------------------------------------------------- metrics and selections


class MetricSpec(Record):
    """A pair score, stored as `score_<name>`."""

    name: Name
    metric: str
    """A metric of `prefsel.metrics.METRICS`."""
    params: dict[str, Any] = {}


class Selection(Record):
    """A subset, kept by one rule."""

    name: Name
    rule: dict[str, Any]
    """See `select/rules.py`; a leaf's `score` is `score_<metric name>`."""
    controls: list[Literal["random", "reverse"]] = []
    """Also emit `<name>-random` (same budget) and `<name>-reverse`."""
    dataset: Literal["always", "auto", "never"] = "always"
    """Whether the kept rows are written out; a training reads through the selection where they are not.

    `auto`: not where the trainings on it read it once in all; every worker of a training reads once, for all epochs.
    """


class Duplicates(Record):
    """The same pair, or its opposite, in several places of the corpus."""

    contradictions: Literal["drop", "keep"] = "drop"


# ----------------------------------------------------------------------------------------------------- training


class Lora(Record):
    """Low-rank adapters instead of full weights (extra `peft`); the adapter and the merged model are both exported."""

    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / r."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class Optimization(Record):
    """What decides a trajectory of AdamW. Batches count pairs, memory counts tokens; no number of workers enters."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Weights, activations and communication; bf16 keeps fp32 master weights."""
    num_epochs: int = Field(1, ge=1)
    """Passes over the pairs."""
    max_steps: int | None = Field(None, ge=1)
    """Take exactly this many optimizer steps, whatever `num_epochs` says; the schedule ends there too."""
    global_batch_pairs: int = Field(32, ge=1)
    """Pairs per optimizer step, over all workers; the last batch of an epoch may hold fewer and is averaged exactly."""
    micro_batch_pairs: int = Field(8, ge=1)
    """At most this many pairs per forward and backward pass of one worker."""
    token_budget: int = Field(8192, ge=64)
    """At most this many packed tokens per forward and backward pass (a longer pair goes alone)."""
    order: Literal["shuffled", "given"] = "shuffled"
    """A new seeded permutation every epoch, or the order of the table (easy to hard)."""
    seed: int = Field(0, ge=0)
    """Decides the order of the pairs and, with LoRA, the initial adapter."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the steps with a linearly rising learning rate."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW's denominator offset."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm here; 0 switches clipping off."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards: nothing, optimizer states, gradients too, weights too."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """What lives in CPU memory between steps; weights need stage 3."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: one more forward, far less memory."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own options, merged over ours; keys that another option decides are refused."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Evaluate on the held-out pairs this often, besides the start and the end."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Save a resumable checkpoint this often; None saves none."""
    keep_checkpoints: int = Field(2, ge=1)
    """Local checkpoints kept, the newest ones."""

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
    if name not in LOSSES:
        raise ValueError(f"valid: {', '.join(LOSSES)}")
    return name


def _loss_names(schema: dict[str, Any]) -> None:
    """The names there are when the schema is asked for."""
    schema["enum"] = list(LOSSES)


class DpoOptions(Optimization):
    """What decides a training on preference pairs with stored reference log-probs (`simpo` needs none)."""

    loss: Annotated[str, AfterValidator(_known_loss), Field(json_schema_extra=_loss_names)] = "dpo"
    """A name of `prefsel.config.losses.LOSSES`; the equations stand in `prefsel.train.losses`."""
    loss_params: dict[str, float | str] = {}
    """Parameters of a loss that have no option of their own here: the `params` of its line in `LOSSES`."""
    beta: float = Field(0.1, gt=0)
    """Inverse temperature of the implicit reward; of IPO it is the paper's τ. The length-normalised losses compare
    log-probs per token and need a larger one."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels: with `dpo` conservative DPO, with `robust_dpo` (which needs it above 0) the loss
    that is unbiased under such flips."""
    ipo_reduction: Literal["sum", "mean"] = "sum"
    """Log-probs that IPO compares: summed, as in the paper's equation, or per token, as in TRL; another scale of β."""
    simpo_gamma: float | None = Field(None, ge=0)
    """Target reward margin γ of SimPO. The authors' scripts give γ / β as `gamma_beta_ratio`."""
    num_aspects: int | None = Field(None, ge=1)
    """κ of DFPO: the aspects of the corpus, a pair's own one included."""
    aspect_weights: dict[Name, Annotated[float, Field(gt=0)]] | None = None
    """Weight of every aspect in the weighted extension of DFPO, the same as in the `divergence` metric; only their
    ratios matter."""
    divergence: str | None = None
    """Name of a metric of this configuration whose score is −PD; it becomes `preference_divergence` of every pair."""
    order: Literal["shuffled", "given", "score"] = "shuffled"  # type: ignore[assignment]  # one more than other trainings
    """A new seeded permutation every epoch; the order of the table; or the descending `score` of the selection that is
    trained on (easy to hard), ties by pair_id."""
    lora: Lora | None = None
    """Train adapters instead of all weights."""
    reference_check_pairs: int = Field(16, ge=0)
    """Pairs whose reference log-probs are recomputed before training and must agree with the stored ones."""
    keep_optimizer_state: bool = False
    """Also keep Adam's moments (fp32, as large as two models): what preconditioned tangents and LESS need."""

    @model_validator(mode="after")
    def _options_of_the_loss(self) -> DpoOptions:
        loss = loss_named(self.loss)
        named = {option for one in LOSSES.values() for option in used_options(one)}
        for name in (field for field in type(self).model_fields if field in named):
            value = getattr(self, name)
            if name in used_options(loss) and value is None:
                raise ValueError(f"{name}: got None; loss {self.loss!r} needs it")
            if name not in used_options(loss) and value != type(self).model_fields[name].default:
                valid = ", ".join(losses_with(name))
                raise ValueError(f"{name}: got {value!r} with loss {self.loss!r}; only used by {valid}")
        if unknown := sorted(set(self.loss_params) - set(loss.params)):
            valid = ", ".join(loss.params) or "none"
            raise ValueError(f"loss_params: got {', '.join(unknown)} with loss {self.loss!r}; valid: {valid}")
        if self.loss == "robust_dpo" and self.label_smoothing == 0:
            raise ValueError("label_smoothing: got 0.0 with loss 'robust_dpo'; valid: above 0, below 0.5 (0 is dpo)")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_params(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A loss without parameters of its own is written, and so named, as if there were no such option."""
        written: dict[str, Any] = dump(self)
        if not self.loss_params:
            written.pop("loss_params", None)
        return written

    @model_validator(mode="after")
    def _state_of_all_weights(self) -> DpoOptions:
        if self.keep_optimizer_state and self.lora is not None:
            raise ValueError("keep_optimizer_state: got True with lora; it is kept for all weights, not for adapters")
        return self


class Placement(Record):
    """Where a training runs."""

    workers: int = Field(1, ge=1)
    gpus_per_worker: float | None = Field(None, ge=0)
    """Default: one when the cluster has GPUs."""
    cpus_per_worker: float = Field(1.0, gt=0)
    max_failures: int = Field(0, ge=0)
    """Worker failures that Ray Train repairs by restarting from the last checkpoint."""


class CrossFit(Record):
    """One model per fold, trained on the prompts of the other folds; every prompt is scored by the one that never saw
    it. Scorers name the training, the fold of a prompt follows from its prompt_id."""

    folds: int = Field(2, ge=2, le=64)
    seed: int = 0
    """Another seed deals the prompts to the folds anew."""


class Train(DpoOptions, Placement):
    """A training of a policy. Its name is a model's name: scorers, tangents and other trainings may use it."""

    kind: Literal["dpo"] = "dpo"
    name: Name
    selection: str
    """A selection or a control (`<name>-random`); or `all` eligible pairs, or the `validation` pairs."""
    model: str
    """The model that is trained further: an entry of `models`, or of `train` to continue from."""
    reference: str | None = None
    """Name of the model whose stored log-probs are the reference; it is not loaded. Only `simpo` goes without."""
    cross_fit: CrossFit | None = None
    """Train one model per fold instead of one on everything."""
    max_eval_pairs: int = Field(512, ge=0)
    """Held-out pairs evaluated on, the first by hash of their pair_id."""

    @model_validator(mode="after")
    def _has_reference(self) -> Train:
        if (self.reference is None) == loss_named(self.loss).uses_reference:
            needed = "required" if self.reference is None else "not used"
            raise ValueError(f"reference: {needed} with loss {self.loss!r}")
        return self


class RewardOptions(Optimization):
    """What decides a Bradley–Terry reward model (METHODS §1)."""

    length_balance_tau: float | None = Field(1.0, gt=0)
    """Sample pairs with the longer completion chosen with frequency e^(f⁺/τ) / (e^(f⁺/τ) + e^(f⁻/τ)), f⁺ their share:
    a large τ is 50/50. None: sample as they come. OPEN: no source gives the paper's value."""
    length_penalty_rho: float = Field(0.0, allow_inf_nan=False)
    """ρ in −log σ(Δr − ρ Δlen). OPEN. A reward model that can express length only shifts by it; the metric's
    `rho: fit` is the way to take length out after the fact."""
    length_unit: Literal["tokens", "characters"] = "tokens"
    """Of Δlen. OPEN."""
    holdout: Fraction = 0.1
    """Of the training prompts, by hash: accuracy and calibration are measured on them."""

    @model_validator(mode="after")
    def _one_order(self) -> RewardOptions:
        if self.order == "given" and self.length_balance_tau is not None:
            raise ValueError("order: got 'given', which a balanced sample has not; set length_balance_tau: null")
        return self


class TrainReward(RewardOptions, Placement):
    """A training of reward models: one per aspect, or one on all pairs."""

    kind: Literal["reward"]
    name: Name
    selection: Literal["all", "validation"] = "all"
    """Which pairs: all eligible ones, or the validation pairs."""
    model: str
    """Where the weights start: an entry of `models`, causal or classifier."""
    aspects: list[Name] = []
    """One model for each, trained on the pairs labelled with it; it scores the others' prompts as `rm_<aspect>`."""
    cross_fit: CrossFit | None = None
    """One model per aspect and fold, so that every prompt can be scored. Needed without `aspects`, and where one prompt
    is labelled with several aspects."""
    max_pairs: int | None = Field(None, ge=1)
    """Train on at most this many pairs, the first by hash of their pair_id."""


def _training_kind(value: Any) -> str:
    kind = value.get("kind", "dpo") if isinstance(value, dict) else getattr(value, "kind", "dpo")
    return kind if isinstance(kind, str) else "dpo"


Training = Annotated[
    Annotated[Train, Tag("dpo")] | Annotated[TrainReward, Tag("reward")], Discriminator(_training_kind)
]

PARTS = ("all", "validation")
"""Names a training may give instead of a selection."""


# ------------------------------------------------------------------------------------------------------- report


class Report(Record):
    """The page a run leaves."""

    examples: int = Field(6, ge=0)
    """Pairs shown of each kind (kept, dropped); 0 for corpora whose text must not be copied."""


class Ray(Record):
    """Where the work runs. Without an address (and outside a Ray job) a Ray of this process is started.

    The sizes are those of a Ray started here; a cluster that is joined keeps its own.
    """

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1)
    num_gpus: int | None = Field(None, ge=0)
    object_store_gib: float = Field(1.0, gt=0)


class Config(Record):
    """A whole run."""

    name: Name
    sources: list[Source] = Field(min_length=1)
    exclude_prompts: list[str] = []
    """Files of prompts (evaluation sets) that must not be selected or trained on, in any format of ingest."""
    ingest: Ingest = Ingest()
    split: Split = Split()
    models: list[Model] = []
    scorers: list[Scorer] = []
    tangents: list[Tangent] = []
    metrics: list[MetricSpec] = []
    duplicates: Duplicates = Duplicates()
    selections: list[Selection] = []
    train: list[Training] = []
    report: Report = Report()
    ray: Ray = Ray()
