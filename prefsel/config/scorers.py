"""Scorers: which numbers every completion (or pair) gets, and from which model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn, get_args

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from prefsel.config.lookup import Lookup, find, require_model, require_single, require_untrained
from prefsel.config.options import Name, Options
from prefsel.errors import UserError, invalid
from prefsel.plugins.contracts import kind_of
from prefsel.plugins.scorers import BUILT_IN, ELSEWHERE, plugin_scorer, scorer_origin


class Pool(Options):
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
    silence_s: float | None = Field(None, gt=0)
    """Seconds after which an actor that neither began nor finished a shard is taken to hang: it is ended, and its
    shards are begun again by another one, as those of an actor that died. More than loading the models and one shard
    take; null means that nothing is ended."""
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


class ScorerOptions(Options):
    """What a scorer of any kind says of itself; a kind of its own is a subclass of it or of `PooledScorer`."""

    kind: str
    """Which kind of scorer this is."""
    unit: ClassVar[str] = "completions"
    """What its rows are: `pairs` where its numbers are no function of one completion."""
    runs_models: ClassVar[bool] = True
    """Whether actors make its numbers, as its loader says; else the numbers came with the data, see `fields`."""
    makes: ClassVar[Mapping[str, str]] = {}
    """Regular expression of its columns' names → the setting without which it makes other ones; for errors that say
    who makes a column."""
    has_selftest: ClassVar[bool] = False
    """Whether `prefsel selftest` can try its model, as it does that of `CausalLogps` or `RewardModel`."""

    if TYPE_CHECKING:

        @property
        def max_poison_fraction(self) -> float:
            """Share of its rows that may get NaN or infinity from a model before the run fails."""

    @property
    def label(self) -> str:
        """What its column set is called after; unique in a configuration."""
        self._must_say("label")

    def models(self, config: Lookup) -> list[str]:
        """Names of the models it runs, the one that gives the numbers last."""
        return []

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """Names of the columns it makes.

        Args:
            config: Where it stands.
            heads: Name of a reward model → names of its outputs.
        """
        self._must_say("columns")

    @property
    def fields(self) -> dict[str, str]:
        """Column → what the number is called in the data, where the numbers came with the data."""
        self._must_say("fields")

    def _must_say(self, part: str) -> NoReturn:
        record = type(self)
        raise UserError(
            f"scorers: kind {self.kind!r} has no {part}; add it to the record {record.__name__} in {record.__module__}"
        )

    def recipe_settings(self) -> dict[str, Any]:
        """What of it changes a number by more than rounding."""
        return self.model_dump(exclude={"pool", "max_poison_fraction", "token_budget", "compile"})

    def expanded(self, config: Lookup) -> list[Any]:
        """Itself, or the scorers that it stands for."""
        return [self]

    def check(self, config: Lookup) -> None:
        """Refuse what cannot be scored in this configuration.

        Raises:
            UserError: names the field, the value and the valid ones.
        """

    def check_unseen(self, config: Lookup) -> None:
        """The same where what is scored are answers to prompts that no model of the run was trained on."""
        self.check(config)

    @property
    def tangent_name(self) -> str | None:
        """The tangent along which it differentiates, if it does."""
        return None

    @property
    def generates_with(self) -> str | None:
        """The policy whose responses it scores, if it scores generated ones."""
        return None

    @property
    def compares_with(self) -> str | None:
        """The second model that it runs beside its own, if it does."""
        return None

    @property
    def function_path(self) -> str | None:
        """The function of the user's that makes its numbers, if one does: its code is part of the recipe."""
        return None

    @property
    def own_aspect(self) -> str | None:
        """The one aspect of a training that it scores with, if it does."""
        return None

    @property
    def reference_model(self) -> str | None:
        """The model whose log-probs it stores, where these can be the reference of a training or a tangent, and its
        token counts lengths."""
        return None

    @property
    def can_share_pass(self) -> bool:
        """Whether it may score in one pass with other scorers that need the same tokens."""
        return False

    @property
    def is_by_completion(self) -> bool:
        """Whether its numbers follow from a prompt and one completion alone: then they are carried over to the shards
        that a completion stands in after its file has changed."""
        return False


class PooledScorer(ScorerOptions):
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
    role: ClassVar[Literal["policy", "reward"]] = "reward"
    """What its model must be able to serve as."""

    @property
    def label(self) -> str:
        """The name of its model."""
        return self.model

    def models(self, config: Lookup) -> list[str]:
        """Its model."""
        return [self.model]

    def check(self, config: Lookup) -> None:
        """A model of its role, which is not trained on all that it would score; errors as of every scorer."""
        field = f"scorers.{self.label}"
        require_model(config, f"{field}.model", self.model, self.role)
        self.check_kind(config, field)
        training = find(config.train, self.model)
        if training is None or training.role != "reward":
            return
        if not training.aspects and not training.cross_fit and training.selection == "all":
            raise UserError(
                f"{field}: {training.name!r} would score the prompts it is trained on; "
                f"set train.{training.name}.cross_fit, and every prompt is scored by a fold that never saw it"
            )

    def check_unseen(self, config: Lookup) -> None:
        """A model of its role; errors as of every scorer."""
        field = f"scorers.{self.label}"
        require_model(config, f"{field}.model", self.model, self.role)
        self.check_kind(config, field)

    def check_kind(self, config: Lookup, field: str) -> None:
        """What only this kind of scorer asks of the configuration."""


class CausalLogps(ModelScorer):
    """`logps_<model>` (nats, summed over the response) and `num_tokens_<model>`."""

    kind: Literal["causal_logps"]
    """Log-probabilities of the responses under a causal language model."""
    unconditional: bool = False
    """Score the responses without their prompts, as `ifd_margin` needs: `logps_<model>_uncond` and
    `num_tokens_<model>_uncond`."""
    role: ClassVar[Literal["policy", "reward"]] = "policy"
    makes: ClassVar[Mapping[str, str]] = {
        r"(logps|num_tokens)_.+_uncond": " with unconditional: true",
        r"(logps|num_tokens)(_.+)?": "",
    }
    has_selftest: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The name of its model, which `-uncond` is added to."""
        return f"{self.model}-uncond" if self.unconditional else self.model

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """Log-probs and the number of tokens they are sums over."""
        suffix = "_uncond" if self.unconditional else ""
        return [f"logps_{self.model}{suffix}", f"num_tokens_{self.model}{suffix}"]

    @property
    def reference_model(self) -> str | None:
        """Its model, unless it scores responses without their prompts."""
        return None if self.unconditional else self.model

    @property
    def can_share_pass(self) -> bool:
        """With other models that need the same tokens."""
        return not self.unconditional and self.pool.share == "auto"

    @property
    def is_by_completion(self) -> bool:
        """They do."""
        return True


class RewardModel(ModelScorer):
    """`rm_<model>`; `rm_<head>` for each of several heads; `rm_<aspect>` for each model of a training with aspects."""

    kind: Literal["reward_model"]
    """Rewards of a sequence classifier."""
    heads: list[Name] | None = None
    """Names of the outputs, in the order of the model's labels; null means those of the model's own `id2label`."""
    aspect: Name | None = None
    """Of a training with `aspects`: score with the model of this aspect only; null means with each, one column set per
    aspect."""
    makes: ClassVar[Mapping[str, str]] = {r"rm_.+(?<!_generated)": ""}
    has_selftest: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The name of its model, and of the aspect."""
        return f"{self.model}-{self.aspect}" if self.aspect else self.model

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """One per head of a model with several, one of the aspect, or the one."""
        if self.aspect:
            return [f"rm_{self.aspect}"]
        names = self.heads or heads(self.model)
        return [f"rm_{head}" for head in names] if len(names) > 1 else [f"rm_{self.model}"]

    def expanded(self, config: Lookup) -> list[Any]:
        """One scorer for each aspect of a training that has aspects."""
        training = find(config.train, self.model)
        if self.aspect is not None or training is None or not training.aspects:
            return [self]
        return [self.model_copy(update={"aspect": aspect}) for aspect in training.aspects]

    @property
    def own_aspect(self) -> str | None:
        """Its aspect."""
        return self.aspect

    @property
    def is_by_completion(self) -> bool:
        """Unless it leaves out prompts by the aspects that their pairs are labelled with."""
        return self.aspect is None

    def check_kind(self, config: Lookup, field: str) -> None:
        """Heads and aspects that its model has."""
        training = find(config.train, self.model)
        if training is None or training.role != "reward":
            if self.aspect:
                raise invalid(f"{field}.aspect", self.aspect, "none: only a reward training has aspects")
            return
        if self.heads:
            raise invalid(f"{field}.heads", self.heads, "none: a trained reward model has one head")
        if self.aspect and self.aspect not in training.aspects:
            raise invalid(f"{field}.aspect", self.aspect, training.aspects or "none: it has no aspects")


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
    name: Name | None = None
    """What the column is called, `rm_<name>_generated`, where several policies answer; null means after the judge."""
    makes: ClassVar[Mapping[str, str]] = {r"rm_.+_generated": ""}

    @property
    def label(self) -> str:
        """Its name, or that of its model, and `-generated`."""
        return f"{self.name or self.model}-generated"

    @model_serializer(mode="wrap")
    def _without_name(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """One without a name is written, and so named, as before there were any."""
        written: dict[str, Any] = dump(self)
        if self.name is None:
            written.pop("name", None)
        return written

    def models(self, config: Lookup) -> list[str]:
        """The policy that responds, then the model that judges."""
        return [self.policy, self.model]

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """The reward of the response."""
        return [f"rm_{self.name or self.head or self.model}_generated"]

    @property
    def generates_with(self) -> str | None:
        """Its policy."""
        return self.policy

    def check_kind(self, config: Lookup, field: str) -> None:
        """One policy and one judge, which has seen no labels."""
        require_model(config, f"{field}.policy", self.policy, "policy")
        require_single(config, f"{field}.policy", self.policy)
        require_single(config, f"{field}.model", self.model)
        require_untrained(config, f"{field}.model", self.model)


class RewardFunction(PooledScorer):
    """`rm_<name>`: the reward that a function of the user's gives each completion; no model runs."""

    kind: Literal["function"]
    """Rewards of a Python function."""
    name: Name
    """Name of the column, `rm_<name>`."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`package.module:function`, importable on every machine of the run. It is called with a list of prompts and a list
    of answers, as many of each, and returns as many finite numbers, of which the larger is better. A prompt that is one
    message of the user is given as its text, another one as its messages. The file that the function lies in is part of
    the recipe: another text there scores anew. `prefsel.world.gold:gold` is the gold reward of the generated world."""
    makes: ClassVar[Mapping[str, str]] = {r"rm_.+(?<!_generated)": ""}

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def function_path(self) -> str | None:
        """Its function."""
        return self.function

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """The reward."""
        return [f"rm_{self.name}"]


class ModelDivergence(PooledScorer):
    """`kl_<model>` and `log_ratio_<model>` in nats, summed over the `kl_tokens_<model>` tokens of the response: how far
    a model is from another one, exactly at every token and by the tokens that were said. Of answers that the model
    sampled itself at temperature 1, both have the mean KL(model ‖ reference)."""

    kind: Literal["divergence"]
    """The Kullback-Leibler divergence of two policies."""
    model: str
    """The model whose answers they should be: an entry of `models` or of `train`; it names the columns."""
    reference: str
    """What it is compared with: another model with the same tokens. Both are loaded in one actor."""
    makes: ClassVar[Mapping[str, str]] = {r"(kl|log_ratio|kl_tokens)_.+": ""}

    @property
    def label(self) -> str:
        """`kl-` and the model."""
        return f"kl-{self.model}"

    def models(self, config: Lookup) -> list[str]:
        """The reference, then the model."""
        return [self.reference, self.model]

    @property
    def compares_with(self) -> str | None:
        """Its reference."""
        return self.reference

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """Exact sum, sum over the said tokens, and how many they are."""
        return [f"{what}_{self.model}" for what in ("kl", "log_ratio", "kl_tokens")]

    def check(self, config: Lookup) -> None:
        """Two single policies; errors as of every scorer."""
        for key, name in (("model", self.model), ("reference", self.reference)):
            require_model(config, f"scorers.{self.label}.{key}", name, "policy")
            require_single(config, f"scorers.{self.label}.{key}", name)


class TangentScorer(PooledScorer):
    """What the scorers along a tangent share: they run the tangent's own model."""

    tangent: Name
    """Name of an entry of `tangents`; also names the columns."""

    def models(self, config: Lookup) -> list[str]:
        """The model that the tangent belongs to."""
        tangent = find(config.tangents, self.tangent)
        return [tangent.model] if tangent else []

    @property
    def tangent_name(self) -> str | None:
        """Its tangent."""
        return self.tangent

    def directions(self, config: Lookup) -> list[str]:
        """Names of the tangent's directions."""
        tangent = find(config.tangents, self.tangent)
        return tangent.directions if tangent else [self.tangent]

    def check(self, config: Lookup) -> None:
        """A tangent that it can use; errors as of every scorer."""
        tangent = find(config.tangents, self.tangent)
        if tangent is None:
            known = [spec.name for spec in config.tangents]
            raise invalid(f"scorers.{self.label}.tangent", self.tangent, known or "none: `tangents` is empty")
        self.check_tangent(config, tangent)

    def check_tangent(self, config: Lookup, tangent: Any) -> None:
        """What this kind of scorer asks of its tangent."""


class DirectionalLogps(TangentScorer):
    """`dlogps_<tangent>`: derivative of every completion's log-prob along a tangent, at the tangent's own model.

    A tangent with strata gives one column each, `dlogps_<tangent>-<stratum>`, in one pass over the model.
    """

    kind: Literal["directional_logps"]
    """Directional derivatives of the log-probabilities, as `influence` needs."""
    method: Literal["exact", "finite_difference"] = "exact"
    """`exact` uses forward mode and costs about three forwards per stratum. `finite_difference` costs one forward per
    stratum and one more, in fp32; its error against the exact derivative is measured on the first groups of every
    shard."""
    step: float = Field(3e-5, gt=0)
    """Length of the step of the finite difference, relative to the norm of the weights. Measured: 3e-5 errs by 0.001 to
    0.006 of the largest derivative, 1e-3 by up to 0.23, 1e-6 by up to 0.2."""
    makes: ClassVar[Mapping[str, str]] = {r"dlogps_.+": ""}

    @property
    def label(self) -> str:
        """`dlogps-` and the tangent."""
        return f"dlogps-{self.tangent}"

    @property
    def is_by_completion(self) -> bool:
        """They do."""
        return True

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """One derivative per direction."""
        return [f"dlogps_{direction}" for direction in self.directions(config)]

    def check_tangent(self, config: Lookup, tangent: Any) -> None:
        """Differences are taken in fp32."""
        if self.method != "exact" and tangent.dtype != "fp32":
            raise invalid(f"tangents.{tangent.name}.dtype", tangent.dtype, "fp32, for finite differences")


class PairGradients(TangentScorer):
    """What LESS needs of every eligible pair, from its own gradient: `gamma_dot_<tangent>`, the inner product of its
    Adam feature with the unit validation gradient, and `gamma_norm_<tangent>`, the feature's norm. The tangent must be
    the plain gradient, and its model a training with `keep_optimizer_state`."""

    kind: Literal["pair_gradients"]
    """Per-pair gradient features, as `less` needs."""
    unit: ClassVar[str] = "pairs"
    makes: ClassVar[Mapping[str, str]] = {r"gamma_(dot|norm)_.+": ""}

    @property
    def label(self) -> str:
        """`gamma-` and the tangent."""
        return f"gamma-{self.tangent}"

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """Inner product and norm, for every direction."""
        return [f"gamma_{what}_{direction}" for direction in self.directions(config) for what in ("dot", "norm")]

    def check_tangent(self, config: Lookup, tangent: Any) -> None:
        """A plain gradient, at a model whose optimizer was kept."""
        if tangent.preconditioner != "none":
            field = f"tangents.{tangent.name}.preconditioner"
            raise invalid(field, tangent.preconditioner, "none: LESS keeps v plain")
        tangent.require_adam(config)


class Imported(ScorerOptions):
    """Numbers that came with the data, kept as a column."""

    runs_models: ClassVar[bool] = False
    makes: ClassVar[Mapping[str, str]] = {r"rm_.+(?<!_generated)": "", r"ratings_.+": ", as: ratings"}
    max_poison_fraction: ClassVar[float] = 0.0

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

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def fields(self) -> dict[str, str]:
        """Column → what the number is called in the data."""
        names = self.field if isinstance(self.field, list) else [self.field]
        return {f"rm_{self.name}": names[0]} if self.as_ == "rm" else {f"ratings_{name}": name for name in names}

    def columns(self, config: Lookup, heads: Callable[[str], list[str]]) -> list[str]:
        """One per field."""
        return list(self.fields)

    def check(self, config: Lookup) -> None:
        """One field where a reward is imported; errors as of every scorer."""
        if self.as_ == "rm" and isinstance(self.field, list) and len(self.field) > 1:
            raise invalid(f"scorers.{self.label}.field", self.field, "one field for `as: rm`")


BuiltInScorer = (
    CausalLogps
    | RewardModel
    | GeneratedReward
    | RewardFunction
    | ModelDivergence
    | DirectionalLogps
    | PairGradients
    | Imported
)
"""The kinds of this package."""
BUILT_IN_SCORERS: tuple[type[ScorerOptions], ...] = get_args(BuiltInScorer)

Scorer = Annotated[
    Annotated[Annotated[BuiltInScorer, Field(discriminator="kind")], Tag(BUILT_IN)]
    | Annotated[SerializeAsAny[PooledScorer], BeforeValidator(plugin_scorer), Tag(ELSEWHERE)],
    Discriminator(scorer_origin([str(kind_of(one)) for one in BUILT_IN_SCORERS])),
]
"""An entry of `scorers`: of a kind of this package, or of one that a plugin registers."""
