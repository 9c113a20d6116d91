"""The configuration of a run: frozen records, every key documented, nothing unknown accepted.

Rules and metric parameters stand here as plain tables; their own files (`select/rules.py`, `metrics/*.py`) define and
check them, see `pipeline.check`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Dtype = Literal["fp32", "bf16", "fp16"]


class Record(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------------------- ingest


class FormatOptions(Record):
    """How rows with several completions become pairs."""

    aspects: Literal["assign", "all"] = "assign"
    """Which aspects label pairs where completions are rated by several. `assign` takes one aspect per prompt, chosen by
    a hash of the prompt, so that a reward model trained on one aspect never saw the texts of another's. `all` mines
    every aspect from every prompt; reward models then need `cross_fit`."""
    label: Literal["aspect", "overall", "mean"] = "aspect"
    """Which rating decides a pair: `aspect` is the rating of the pair's own aspect, `overall` the overall score of the
    row, `mean` the mean over the aspects that both completions are rated on."""
    relabel: bool = False
    """With `label: overall` or `label: mean`: keep the pairs that an aspect labels and let the other rating only decide
    which side is chosen (the baselines OVA and AVG). Without it every two completions are mined by the other rating."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Which pairs are made of K completions with scalar rewards (format `scored`): `best_worst` gives one, the best
    against the worst; `all` gives every two completions with different rewards."""

    @model_validator(mode="after")
    def _turned_by_another(self) -> FormatOptions:
        if self.relabel and self.label == "aspect":
            raise ValueError("relabel: got True with label 'aspect'; valid: label overall or mean")
        return self


class Source(Record):
    """One named part of the corpus."""

    name: Name
    """Name of the source. It names folders of the workspace, and rules may use it as a stratum."""
    paths: list[str] = Field(min_length=1)
    """Where the rows are: files, folders, globs or URIs (`s3://`, `gs://`, `hf://datasets/…`), or
    `datasets:NAME[:CONFIG]/SPLIT`, which reads a data set of the Hugging Face hub. Relative paths start at the working
    directory."""
    format: str = "auto"
    """How a row is read: `auto` takes the format of the first row that looks like one; otherwise the name of a
    format."""
    options: FormatOptions = FormatOptions()
    """How a row with several completions becomes pairs."""
    role: Literal["train", "validation", "holdout", "exclude"] = "train"
    """What the source is for. `train`: selected from. `holdout`: trainings are evaluated on it; it is never selected or
    trained on. `validation`: what influence is measured against, see `split.validation`; it is refused when it shares a
    prompt with what is selected from. `exclude`: its prompts are used nowhere."""


class Ingest(Record):
    """Limits of ingest."""

    rows_per_shard: int = Field(4096, ge=1)
    """Input rows in one shard. A shard is the unit of work, of retry and of resume: smaller ones spread over more
    actors and lose less when a node dies, larger ones cost fewer files."""
    max_row_mib: float = Field(16.0, gt=0)
    """Largest row in MiB; a larger one is quarantined as `row_too_large`."""
    max_quarantine_fraction: float = Field(0.05, ge=0, le=1)
    """The run fails when more than this share of all rows is quarantined, because a corpus that is mostly unreadable is
    usually read in the wrong format."""


class Split(Record):
    """Fractions of the prompts, by hash of prompt_id, that are kept out of selection."""

    holdout: Fraction = 0.0
    """Share of the prompts that trainings are evaluated on. They are never selected, never part of a statistic and
    never trained on."""
    proxy: Fraction = 0.0
    """Share of the prompts that train the models made on the spot (`scratch_policy`, `scratch_reward`). They are
    dropped from selection, so that no model scores what it was trained on."""
    validation: Fraction = 0.0
    """Share of the prompts that selectors aim at: they give tangents their gradient and θ_val its training. They are
    never selected, and no training is evaluated on them, so the evaluation is independent of the selection."""

    @model_validator(mode="after")
    def _something_left(self) -> Split:
        if (total := self.holdout + self.proxy + self.validation) >= 1:
            raise ValueError(f"holdout + proxy + validation: got {total}; must stay below 1")
        return self


# ------------------------------------------------------------------------------------------------------- models


class PretrainedModel(Record):
    """A model from a directory or a hub."""

    kind: Literal["pretrained"] = "pretrained"
    """A model that exists already."""
    name: Name
    """Name of the model, by which scorers, tangents and trainings mean it. It also names the columns, for example
    `logps_<name>`."""
    path: str
    """Directory with `config.json`, safetensors weights and a tokenizer, or the id of a model on the Hugging Face hub.
    Pickled weights are never read."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null means the hub's main branch. The commit it stands for when the run starts
    is what every worker loads."""
    dtype: Dtype = "bf16"
    """Number format of the weights and activations while scoring. `bf16` is what most weights are published in."""
    max_length: int | None = Field(None, ge=8)
    """Longest prompt and response together, in tokens; null means what the model declares."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a completion over `max_length`: `drop` leaves it out as `too_long`, `right` cuts its end, `left`
    cuts the beginning of its prompt. Each completion is cut for itself."""
    template: str = "auto"
    """How messages become text: `auto` is the tokenizer's chat template, `plain` joins the contents, `hh` writes
    `Human:` and `Assistant:` turns; or a Jinja template, inline or as the path of a file."""
    trust_remote_code: bool = False
    """Run the model code that a hub repository ships. It needs `revision` as the 40 hex digits of a commit, so that the
    code cannot change unnoticed."""
    gpus_per_replica: int = Field(1, ge=1)
    """GPUs that one copy of the model is spread over while scoring; without GPUs it has no effect."""


class ScratchTokenizer(Record):
    """A tokenizer trained on the corpus text."""

    kind: Literal["bpe", "word"] = "bpe"
    """`bpe` learns byte pairs; `word` makes one token per word, for generated corpora of few words."""
    vocab_size: int = Field(2048, ge=64)
    """Largest number of tokens; 2 048 keeps the head of a small model small."""


class ScratchModel(Record):
    """A small model made on the spot from the `proxy` part of the corpus: for trials without weights at hand."""

    name: Name
    """Name of the model, as of a pretrained one."""
    hidden_size: int = Field(64, ge=8)
    """Width of the model; a multiple of twice `num_heads`. The defaults make a model small enough to be trained on one
    core."""
    num_layers: int = Field(2, ge=1)
    """Decoder layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    steps: int = Field(150, ge=1)
    """Optimizer steps of the training on the spot."""
    batch_tokens: int = Field(4096, ge=64)
    """At most this many tokens per step, padding included."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate of AdamW: 5 % linear warm-up, then a cosine to 0. The default suits models this small."""
    max_length: int = Field(512, ge=8)
    """Longest prompt and response together, in tokens, in training and in scoring."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a completion over `max_length` while scoring: dropped as `too_long`, cut at its end (`right`), or
    its prompt cut at the beginning (`left`)."""
    seed: int = 0
    """Decides the initial weights and the order of the batches."""
    tokenizer: ScratchTokenizer = ScratchTokenizer()
    """The tokenizer that is trained on the same texts."""
    dtype: Dtype = "fp32"
    """Number format while scoring; training is always in fp32."""
    template: str = "auto"
    """How messages become text, as of a pretrained model; the tokenizer made here has a chat template for `auto`."""


class ScratchPolicy(ScratchModel):
    """A causal language model, tuned on the chosen completions of the `proxy` prompts."""

    kind: Literal["scratch_policy"]
    """A small policy made from the corpus."""


class ScratchReward(ScratchModel):
    """A Bradley–Terry reward model, trained on the pairs of the `proxy` prompts."""

    kind: Literal["scratch_reward"]
    """A small reward model made from the corpus."""
    heads: list[Name] = []
    """Aspects that get an output of their own, each trained on the pairs of that aspect and scored as `rm_<aspect>`.
    Empty: one output, trained on all pairs."""


Model = Annotated[PretrainedModel | ScratchPolicy | ScratchReward, Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------------------ scoring


class Pool(Record):
    """How many copies of a model score at once."""

    size: int | None = Field(None, ge=1)
    """A fixed number of actors; null means as many as the cluster holds, at most one per shard."""
    min_size: int | None = Field(None, ge=1)
    """Fewest actors of a pool that grows and shrinks with the work; goes together with `max_size`."""
    max_size: int | None = Field(None, ge=1)
    """Most actors of a pool that grows and shrinks with the work; goes together with `min_size`."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs that each actor reserves; null means the model's `gpus_per_replica` where the cluster has GPUs, and 0
    elsewhere."""
    num_cpus: float = Field(1.0, gt=0)
    """CPUs that each actor reserves."""
    share: Literal["auto", "never"] = "auto"
    """`auto` computes the log-probs of several models that need the same tokens in one pass over the shards, where all
    of their weights fit into 0.6 of an actor's memory. `never` runs one model after another. The numbers are the
    same."""

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
    """The actors this scorer runs on."""
    token_budget: int | None = Field(None, ge=64)
    """Tokens of one packed row, which decides the memory of a forward pass; null means 8 192 on a CPU, and on a GPU
    what each actor finds its free memory to hold, at most 65 536."""
    max_poison_fraction: float = Field(0.0, ge=0, le=1)
    """The run fails when more than this share of the completions got NaN or infinity from the model. 0 by default: such
    numbers are a fault, and leaving rows out must be a decision."""


class ModelScorer(PooledScorer):
    """What the scorers named after a model share."""

    model: str
    """Name of an entry of `models` or of `train`; it also names the columns."""
    compile: bool = False
    """Compile the decoder layers with torch: some percent faster after seconds to minutes at the start. The numbers
    differ by rounding, as they do between token budgets, so no fingerprint depends on it."""


class CausalLogps(ModelScorer):
    """`logps_<model>` (nats, summed over the response) and `num_tokens_<model>`."""

    kind: Literal["causal_logps"]
    """Log-probabilities of the responses under a causal language model."""
    unconditional: bool = False
    """Score the responses without their prompts, as `ifd_margin` needs: `logps_<model>_uncond` and
    `num_tokens_<model>_uncond`."""


class RewardModel(ModelScorer):
    """`rm_<model>`; `rm_<head>` for each of several heads; `rm_<aspect>` for each model of a training with aspects."""

    kind: Literal["reward_model"]
    """Rewards of a sequence classifier."""
    heads: list[Name] | None = None
    """Names of the outputs, in the order of the model's labels; null means those of the model's own `id2label`."""
    aspect: Name | None = None
    """Of a training with `aspects`: score with the model of this aspect only; null means with each, one column set per
    aspect."""


class GeneratedReward(ModelScorer):
    """`rm_<model>_generated`, or `rm_<head>_generated`: the reward of one response that a policy gives to the prompt.

    The number is the same for all of the prompt's completions; null where the response is empty or too long.
    """

    kind: Literal["generated_reward"]
    """The reward of a response that a policy samples, as `filtered_dpo` needs."""
    head: Name | None = None
    """Which output of the reward model judges, where it has several."""
    policy: str
    """Name of the model that responds: an entry of `models` or of `train`."""
    temperature: float = Field(1.0, ge=0)
    """Temperature of the sampling; 0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampling: tokens are drawn from the most likely ones that make up this probability; 1 keeps
    all."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest response in tokens; a longer one is cut."""
    seed: int = 0
    """Seed of the sampling. The random numbers of a response follow from it and the prompt_id, so sharding changes
    nothing."""


class DirectionalLogps(PooledScorer):
    """`dlogps_<tangent>`: derivative of every completion's log-prob along a tangent, at the tangent's own model.

    A tangent with strata gives one column each, `dlogps_<tangent>-<stratum>`, in one pass over the model.
    """

    kind: Literal["directional_logps"]
    """Directional derivatives of the log-probabilities, as `influence` needs."""
    tangent: Name
    """Name of an entry of `tangents`; it also names the columns."""
    method: Literal["exact", "finite_difference"] = "exact"
    """`exact` uses forward mode and costs about three forwards per stratum. `finite_difference` costs one forward per
    stratum and one more, in fp32; its error against the exact derivative is measured on the first groups of every
    shard."""
    step: float = Field(3e-5, gt=0)
    """Length of the step of the finite difference, relative to the norm of the weights. Measured: 3e-5 errs by 0.001 to
    0.006 of the largest derivative, 1e-3 by up to 0.23, 1e-6 by up to 0.2."""


class PairGradients(PooledScorer):
    """What LESS needs of every eligible pair, from its own gradient: `gamma_dot_<tangent>`, the inner product of its
    Adam feature with the unit validation gradient, and `gamma_norm_<tangent>`, the feature's norm. The tangent must be
    the plain gradient, and its model a training with `keep_optimizer_state`."""

    kind: Literal["pair_gradients"]
    """Per-pair gradient features, as `less` needs."""
    tangent: Name
    """Name of an entry of `tangents`, which must be a plain gradient at a training with `keep_optimizer_state`."""


class Imported(Record):
    """Numbers that came with the data, kept as a column."""

    kind: Literal["imported"]
    """Numbers of the data itself; no model runs."""
    name: Name
    """Name of the column, `rm_<name>`, with `as: rm`; with `as: ratings` only a label of the column set."""
    field: str | Annotated[list[str], Field(min_length=1)] = "score"
    """What the number is called in the data: `score` for `score_chosen` and `score_rejected`, in general `<x>` for
    `<x>_chosen` and `<x>_rejected`, or the name of a rated aspect. A list of aspects gives one `ratings_<aspect>`
    column each."""
    as_: Literal["rm", "ratings"] = Field("rm", alias="as")
    """Whether the number stands for a reward model (`rm_<name>`) or for ratings (`ratings_<field>`)."""


Scorer = Annotated[
    CausalLogps | RewardModel | GeneratedReward | DirectionalLogps | PairGradients | Imported,
    Field(discriminator="kind"),
]

# ----------------------------------------------------------------------------------------------------- influence


class Tangent(Record):
    """A direction in the space of a model's weights: the mean DPO gradient of the validation pairs, or what a diagonal
    makes of it. Along it `directional_logps` gives the influence of every pair."""

    name: Name
    """Name of the tangent, by which scorers and metrics mean it."""
    model: str
    """The warm-up model θ at which the gradient is taken: an entry of `models` or of `train`."""
    reference: str
    """The model whose stored log-probs are the reference of the validation loss; a `causal_logps` scorer must make
    them."""
    beta: float = Field(0.1, gt=0)
    """β of the validation loss. The influence of a pair is exact for this β, and a metric with another one is
    refused."""
    preconditioner: Literal["none", "adam", "fisher"] = "none"
    """`none` keeps the plain gradient. `adam` divides it by √(second moment) + damping, with the moments of the
    warm-up's Adam, which must be a training with `keep_optimizer_state`; `fisher` does so with the mean squared
    validation gradient over pairs (empirical Fisher)."""
    damping: float = Field(1e-8, gt=0)
    """Added to the root of the second moment before dividing; it should be small beside the largest root. OPEN: no
    source gives a value."""
    by: Literal["aspect", "source"] | None = None
    """Column whose values part the validation pairs into strata, with one direction each; null means one direction."""
    values: list[str] = []
    """The strata: values of `by`. They must be named, because columns are named after them before any data is read."""
    max_pairs: int | None = Field(None, ge=1)
    """Use at most this many validation pairs, the first by hash of their pair_id; null means all."""
    dtype: Dtype = "fp32"
    """Number format of the weights while the gradient is taken; finite differences need `fp32`."""

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
    """Name of the metric, and of the score column `score_<name>` that rules read."""
    metric: str
    """Which method scores the pairs: a name from the table of metric parameters, such as `explicit_margin`."""
    params: dict[str, Any] = {}
    """The parameters of that method."""


class Selection(Record):
    """A subset, kept by one rule."""

    name: Name
    """Name of the subset: of its dataset, and what trainings give as `selection`."""
    rule: dict[str, Any]
    """What is kept: a table with a `kind` and that rule's keys. Its scores are called `score_<metric name>`."""
    controls: list[Literal["random", "reverse"]] = []
    """Subsets to emit for comparison: `random` gives `<name>-random`, as many pairs drawn at random from those the rule
    could have kept; `reverse` gives `<name>-reverse`, the rule's opposite."""
    dataset: Literal["always", "auto", "never"] = "always"
    """Whether the kept rows are written out as a dataset. `always` writes them, because the rows are what most people
    came for; `never` writes none, and trainings read the corpus through the selection; `auto` writes them unless the
    trainings on them read them once in all (every worker of a training reads once, for all epochs)."""


class Duplicates(Record):
    """The same pair, or its opposite, in several places of the corpus."""

    contradictions: Literal["drop", "keep"] = "drop"
    """What happens to a pair that stands in the corpus with both labels: `drop` leaves both out, as one of them is
    wrong; `keep` keeps both."""


# ----------------------------------------------------------------------------------------------------- training


class Lora(Record):
    """Low-rank adapters instead of full weights (extra `peft`); the adapter and the merged model are both exported."""

    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the update, which is multiplied by alpha / r."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` means all of them but the head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class Optimization(Record):
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
    """Decoupled weight decay of AdamW."""
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


class DpoOptions(Optimization):
    """What decides a training on preference pairs with stored reference log-probs (`simpo` needs none)."""

    USED_BY: ClassVar[dict[str, tuple[str, ...]]] = {
        "label_smoothing": ("dpo", "robust_dpo"),
        "ipo_reduction": ("ipo",),
        "simpo_gamma": ("simpo",),
        "num_aspects": ("dfpo",),
        "aspect_weights": ("weighted_dfpo",),
        "divergence": ("dfpo", "weighted_dfpo"),
    }
    """Options that only some losses have; any other loss refuses them."""

    loss: Literal["dpo", "robust_dpo", "ipo", "hinge", "simpo", "length_normalised_dpo", "dfpo", "weighted_dfpo"] = (
        "dpo"
    )
    """Which preference loss is minimised; the equations stand in `prefsel/train/losses.py`."""
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
        for name, losses in self.USED_BY.items():
            value = getattr(self, name)
            if self.loss in losses and value is None:
                raise ValueError(f"{name}: got None; loss {self.loss!r} needs it")
            if self.loss not in losses and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}: got {value!r} with loss {self.loss!r}; only used by {', '.join(losses)}")
        if self.loss == "robust_dpo" and self.label_smoothing == 0:
            raise ValueError("label_smoothing: got 0.0 with loss 'robust_dpo'; valid: above 0, below 0.5 (0 is dpo)")
        return self

    @model_validator(mode="after")
    def _state_of_all_weights(self) -> DpoOptions:
        if self.keep_optimizer_state and self.lora is not None:
            raise ValueError("keep_optimizer_state: got True with lora; it is kept for all weights, not for adapters")
        return self


class Placement(Record):
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


class CrossFit(Record):
    """One model per fold, trained on the prompts of the other folds; every prompt is scored by the one that never saw
    it. Scorers name the training, the fold of a prompt follows from its prompt_id."""

    folds: int = Field(2, ge=2, le=64)
    """Number of folds, and of models."""
    seed: int = 0
    """Another seed deals the prompts to the folds anew."""


class Train(DpoOptions, Placement):
    """A training of a policy. Its name is a model's name: scorers, tangents and other trainings may use it."""

    kind: Literal["dpo"] = "dpo"
    """A training of a policy on preference pairs; the default kind."""
    name: Name
    """Name of the training, which is also the name of the model it makes."""
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

    @model_validator(mode="after")
    def _has_reference(self) -> Train:
        if (self.reference is None) != (self.loss == "simpo"):
            needed = "required" if self.reference is None else "not used"
            raise ValueError(f"reference: {needed} with loss {self.loss!r}")
        return self


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


class TrainReward(RewardOptions, Placement):
    """A training of reward models: one per aspect, or one on all pairs."""

    kind: Literal["reward"]
    """A training of Bradley–Terry reward models."""
    name: Name
    """Name of the training, which is also the name of the model, or models, it makes."""
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
    """Pairs shown per selection, half kept and half dropped; 0 for corpora whose text must not be copied."""


class Ray(Record):
    """Where the work runs. Without an address (and outside a Ray job) a Ray of this process is started.

    The sizes are those of a Ray started here; a cluster that is joined keeps its own.
    """

    address: str | None = None
    """Address of a running cluster; null means the cluster of the Ray job this runs in, and outside of one a Ray of
    this process."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of a Ray started here; null means all that the machine has."""
    num_gpus: int | None = Field(None, ge=0)
    """GPUs of a Ray started here; null means all that are visible."""
    object_store_gib: float = Field(1.0, gt=0)
    """Size of the object store of a Ray started here, in GiB. Only names and counts cross it, so the default is
    small."""


class Config(Record):
    """A whole run."""

    name: Name
    """Name of the run; it names the report's folder and the file of the run."""
    sources: list[Source] = Field(min_length=1)
    """The corpus: one entry per named source."""
    exclude_prompts: list[str] = []
    """Files of prompts, such as evaluation sets, that must not be selected or trained on, in any format of ingest."""
    ingest: Ingest = Ingest()
    """How files are cut into shards, and how many unreadable rows are borne."""
    split: Split = Split()
    """Which prompts are kept out of selection, and what for."""
    models: list[Model] = []
    """The models by name: of a directory, of a hub, or made on the spot."""
    scorers: list[Scorer] = []
    """What is computed for every completion; each scorer makes columns that metrics read."""
    tangents: list[Tangent] = []
    """Directions in weight space that influence is measured along."""
    metrics: list[MetricSpec] = []
    """Pair scores: arithmetic on columns."""
    duplicates: Duplicates = Duplicates()
    """What happens to pairs that stand in the corpus more than once."""
    selections: list[Selection] = []
    """The subsets to keep, each by one rule."""
    train: list[Training] = []
    """The trainings; each makes a model whose name may stand wherever a model's may."""
    report: Report = Report()
    """What the page shows that a run leaves."""
    ray: Ray = Ray()
    """Where the work runs."""
