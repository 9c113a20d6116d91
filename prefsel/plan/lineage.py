"""What depends on what: fingerprint and place of every artifact of a configuration, without computing any.

Stages ask here where to write and pipelines ask what is missing, so that the same configuration always names the same
artifacts. Columns depend on models and settings only; what sees the whole corpus (eligibility, scores, selections,
trained models) also on the corpus fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prefsel.config import (
    PARTS,
    CausalLogps,
    Config,
    DirectionalLogps,
    Imported,
    MetricSpec,
    PairGradients,
    PretrainedModel,
    RewardModel,
    Scorer,
    Selection,
    Tangent,
    Train,
    Training,
)
from prefsel.config.naming import (
    Member,
    expanded,
    members,
    own_columns,
    scorer_label,
    scorer_models,
    selection_names,
    stem,
)
from prefsel.errors import UserError, invalid
from prefsel.metrics.table import find_metric
from prefsel.pairs.reader import PairReader
from prefsel.rules import LEAVES, random_rule, ranks_of, reversed_rule, rule_scores
from prefsel.workspace.catalog import Catalog, read_catalog
from prefsel.workspace.folders import folder_content
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.recipes import fingerprint, hash_hex, recipe
from prefsel.workspace.storage import Storage

MADE_BY = {
    "logps_": "causal_logps",
    "num_tokens_": "causal_logps",
    "dlogps_": "directional_logps",
    "gamma_": "pair_gradients",
    "ratings_": "imported, as: ratings",
    "rm_": "reward_model or imported",
}
"""Kind of scorer by the beginning of a column."""


def maker_of(column: str) -> str:
    """The kind of scorer that makes a column."""
    if column.endswith("_uncond"):
        return "causal_logps, with unconditional: true,"
    if column.endswith("_generated"):
        return "generated_reward"
    return next(kind for prefix, kind in {**MADE_BY, "": "imported"}.items() if column.startswith(prefix))


MOVE_NO_WEIGHT = {
    *("name", "selection", "workers", "gpus_per_worker", "cpus_per_worker", "max_failures", "max_eval_pairs"),
    *("kind", "aspects", "cross_fit", "keep_optimizer_state", "divergence"),
    *("eval_every_steps", "checkpoint_every_steps", "keep_checkpoints", "reference_check_pairs"),
    *("micro_batch_pairs", "token_budget"),
}
"""Keys of a training that move no weight by more than rounding, or that stand in its recipe in another form."""


@dataclass(frozen=True)
class ModelRef:
    """A model of the configuration, found."""

    name: str
    path: str
    """Directory in the workspace (`made_here`), local directory, or hub id."""
    identity: str
    made_here: bool
    settings: dict[str, Any]
    """dtype, max_length, truncation, template: what changes numbers."""
    revision: str | None = None
    """Commit of a hub model."""


@dataclass(frozen=True)
class Lineage:
    """Fingerprints and paths of one configuration in one workspace."""

    config: Config
    storage: Storage

    @cached_property
    def catalog(self) -> Catalog:
        """The corpus as ingested."""
        return read_catalog(self.storage)

    @cached_property
    def corpus(self) -> str:
        """The corpus fingerprint."""
        return self.catalog.fingerprint(self.storage)

    # ------------------------------------------------------------------------------------------- eligibility

    @cached_property
    def eligible_recipe(self) -> dict[str, Any]:
        """Who may be selected: splits, exclusions, duplicates."""
        roles = {source.name: source.role for source in self.catalog.sources}
        excluded = [shard for s in self.catalog.sources if s.role == "exclude" for f in s.files for shard in f.shards]
        settings = {
            "split": self.config.split.model_dump(),
            "roles": roles,
            "excluded": excluded,
            # Of a pair that stands in several places the first in corpus order is kept.
            "order": hash_hex(*(shard.key for shard in self.catalog.shards)),
            "contradictions": self.config.duplicates.contradictions,
        }
        return recipe("eligible", settings, corpus=self.corpus)

    @property
    def eligible_folder(self) -> str:
        """Drop reasons before any score, one row per pair."""
        return f"eligible/all@{fingerprint(self.eligible_recipe)}"

    # ------------------------------------------------------------------------------------------------ models

    def scratch_recipe(self, name: str) -> dict[str, Any]:
        """The recipe of a model made here from the proxy part of the corpus."""
        settings = self.model_spec(name).model_dump(exclude={"dtype", "template", "truncation"})
        upstream = {"eligible": fingerprint(self.eligible_recipe)}
        return recipe("scratch", settings, upstream=upstream, corpus=self.corpus)

    def model_spec(self, name: str) -> Any:
        """The configuration of model `name`.

        Raises:
            UserError: no such model.
        """
        for spec in self.config.models:
            if spec.name == name:
                return spec
        raise invalid("model", name, [spec.name for spec in self.config.models] or "none: `models` is empty")

    def scratch_path(self, name: str) -> str:
        """Where a model made here lies."""
        return f"models/{name}@{fingerprint(self.scratch_recipe(name))}"

    def model(self, name: str) -> ModelRef:
        """Model `name`, with the identity of its weights.

        Raises:
            UserError: no such model, its directory is incomplete, or it stands for several models.
        """
        refs = self.model_members(name)
        if len(refs) > 1:
            raise UserError(f"model: {name!r} is {len(refs)} models, per fold or aspect; only a scorer can use them")
        return next(iter(refs.values()))

    def model_members(self, name: str, aspect: str | None = None) -> dict[Member, ModelRef]:
        """The models that `name` stands for: one, or those of a training's folds and aspects (only `aspect`, if given).

        Raises:
            UserError: as `model`.
        """
        if name in self.trainings:
            spec = self.trainings[name]
            settings = self.scoring_settings(spec.model)
            chosen = [one for one in members(spec) if aspect is None or one.aspect == aspect]
            return {one: self._made(one.label, self.member_path(one), settings) for one in chosen}
        spec = self.model_spec(name)
        settings = self.scoring_settings(name)
        if isinstance(spec, PretrainedModel):
            return {Member(name): self._pretrained(spec, settings)}
        return {Member(name): self._made(name, self.scratch_path(name), settings)}

    def scoring_settings(self, name: str) -> dict[str, Any]:
        """dtype, max_length, truncation and template, which change numbers; of a trained model those of its base."""
        while name in self.trainings:
            name = self.trainings[name].model
        spec = self.model_spec(name)
        settings: dict[str, Any] = spec.model_dump(include={"dtype", "max_length", "truncation", "template"})
        if Path(spec.template).is_file():  # its text decides, and workers have other working directories
            settings["template"] = Path(spec.template).read_text(encoding="utf-8")
        if isinstance(spec, PretrainedModel):
            from prefsel.models.loading import context_length, max_positions, model_identity

            revision = None if Path(spec.path).is_dir() else model_identity(spec.path, revision=spec.revision)
            declared = max_positions(spec.path, revision, spec.trust_remote_code)
            if spec.max_length is None:
                settings["max_length"] = context_length(spec.path, revision, spec.trust_remote_code)
            elif declared and spec.max_length > declared:
                valid = f"at most the model's {declared} positions"
                raise invalid(f"models.{spec.name}.max_length", spec.max_length, valid)
        return settings

    def _made(self, label: str, path: str, settings: dict[str, Any]) -> ModelRef:
        content = folder_content(self.storage, path)
        if content is None:
            raise UserError(f"models.{label}: not made yet; run the whole pipeline (`prefsel run`) first")
        return ModelRef(label, path, content, True, settings)

    def _pretrained(self, spec: PretrainedModel, settings: dict[str, Any]) -> ModelRef:
        from prefsel.models.loading import model_identity

        identity = model_identity(spec.path, revision=spec.revision)
        is_local = Path(spec.path).is_dir()
        # The commit that the identity names is the one that workers load, whatever the hub says by then.
        path = str(Path(spec.path).absolute()) if is_local else spec.path
        return ModelRef(spec.name, path, identity, False, settings, None if is_local else identity)

    @cached_property
    def trainings(self) -> dict[str, Training]:
        """Every training by name: each is a model, or several."""
        return {spec.name: spec for spec in self.config.train}

    @cached_property
    def tangents(self) -> dict[str, Tangent]:
        """Every tangent by name."""
        return {spec.name: spec for spec in self.config.tangents}

    def training(self, name: str) -> Training:
        """Training `name`; it must exist."""
        return self.trainings[name]

    # ----------------------------------------------------------------------------------------------- columns

    @cached_property
    def scorers(self) -> list[Scorer]:
        """Every scorer; one per aspect of a reward training."""
        return expanded(self.config)

    def scorer(self, label: str) -> Scorer:
        """The scorer whose column set is called `label`; it must exist."""
        return next(scorer for scorer in self.scorers if scorer_label(scorer) == label)

    def columns_recipe(self, scorer: Scorer) -> dict[str, Any]:
        """The recipe of a scorer's columns: never of the corpus."""
        if isinstance(scorer, Imported):
            return recipe("score", scorer.model_dump())
        settings = scorer.model_dump(exclude={"pool", "max_poison_fraction", "token_budget", "compile"})
        models, upstream = {}, {}
        for name in scorer_models(scorer, self.tangents):
            aspect = scorer.aspect if isinstance(scorer, RewardModel) else None
            for ref in self.model_members(name, aspect).values():
                models[ref.name] = ref.identity
                settings |= {f"{name}.{key}": value for key, value in ref.settings.items()}
            if name in self.trainings and (cross_fit := self.trainings[name].cross_fit):
                settings["cross_fit"] = cross_fit.model_dump()
        if isinstance(scorer, DirectionalLogps | PairGradients):
            path = self.tangent_path(scorer.tangent)
            models[scorer.tangent] = folder_content(self.storage, path) or fingerprint(
                self.tangent_recipe(scorer.tangent)
            )
        if isinstance(scorer, PairGradients):
            upstream = {"reference": self.columns_folder(self.logps_scorer(self.tangents[scorer.tangent].reference))}
            upstream["eligible"] = fingerprint(self.eligible_recipe)
        return recipe("score", settings, models=models, upstream=upstream)

    def columns_folder(self, scorer: Scorer) -> str:
        """The column set a scorer makes, without the source."""
        kind = "pair_columns" if isinstance(scorer, PairGradients) else "columns"
        return f"{kind}/{scorer_label(scorer)}@{fingerprint(self.columns_recipe(scorer))}"

    def logps_scorer(self, model: str) -> Scorer:
        """The scorer that makes `logps_<model>`.

        Raises:
            UserError: none does.
        """
        return self.scorers_for([f"logps_{model}_chosen"], field=f"reference {model}")[0]

    def is_early(self, scorer: Scorer) -> bool:
        """Whether a scorer needs no training: its columns can be there before anything is selected."""
        return not any(name in self.trainings for name in scorer_models(scorer, self.tangents))

    @cached_property
    def length_scorer(self) -> CausalLogps | None:
        """Whose token counts are the lengths of reports and of `length_bin`; None: characters are counted."""
        found = (s for s in self.scorers if isinstance(s, CausalLogps) and not s.unconditional and self.is_early(s))
        return next(found, None)

    def reader(self, flat_names: list[str] | None = None, *, field: str = "columns") -> PairReader:
        """A reader of flat pair tables with the columns that `flat_names` need; default: what needs no training."""
        if flat_names is None:
            return self.reader_of([scorer for scorer in self.scorers if self.is_early(scorer)])
        return self.reader_of(self.scorers_for(flat_names, field=field))

    def reader_of(self, scorers: list[Scorer], *, lengths: bool = True) -> PairReader:
        """A reader of flat pair tables with the columns of some scorers, and the lengths unless they are not needed."""
        wanted = [(self.columns_folder(scorer), tuple(self.column_names(scorer))) for scorer in scorers]
        counter = self.length_scorer if lengths else None
        length = f"num_tokens_{counter.model}" if counter else None
        if counter and length and counter not in scorers:
            wanted.append((self.columns_folder(counter), (length,)))
        return PairReader(self.storage, self.eligible_folder, tuple(wanted), length)

    @cached_property
    def providers(self) -> dict[str, Scorer]:
        """Completion column → the scorer that makes it."""
        found: dict[str, Scorer] = {}
        for scorer in self.scorers:
            for column in self.column_names(scorer):
                if column in found:
                    raise UserError(f"scorers: {column!r} would be made twice; give one of the models another name")
                found[column] = scorer
        return found

    def column_names(self, scorer: Scorer) -> list[str]:
        """Names of the columns a scorer makes."""
        heads: list[str] = []
        if isinstance(scorer, RewardModel) and not scorer.aspect:
            heads = scorer.heads or self._heads(scorer.model)
        return own_columns(scorer, self.tangents, heads)

    def _heads(self, name: str) -> list[str]:
        if name in self.trainings:
            return [name]
        spec = self.model_spec(name)
        if isinstance(spec, PretrainedModel):
            from prefsel.models.loading import head_names

            return head_names(spec.path, revision=spec.revision)
        return spec.heads or [spec.name]

    def scorers_for(self, flat_names: list[str], *, field: str) -> list[Scorer]:
        """The scorers that make the given flat columns (`rm_x_chosen`), in configuration order.

        Raises:
            UserError: nothing makes one of them.
        """
        needed = []
        for name in flat_names:
            column = name if name in self.providers else stem(name)
            if column in ("pair_id", "prompt_id", "aspect", "source"):
                continue
            if column == "num_tokens":  # of whichever model counted them first
                column = next((made for made in self.providers if made.startswith("num_tokens_")), column)
            if column not in self.providers:
                kind = maker_of(column)
                made = ", ".join(self.providers) or "none"
                raise UserError(f"{field}: needs column {column!r}, which a scorer of kind {kind} makes; made: {made}")
            needed.append(self.providers[column])
        return [scorer for scorer in self.scorers if any(scorer is n for n in needed)]

    # ------------------------------------------------------------------------------- scores, selections, models

    @cached_property
    def metrics(self) -> dict[str, MetricSpec]:
        """Every metric by name, with the random ones that controls need."""
        found = {spec.name: spec for spec in self.config.metrics}
        return found | {name: MetricSpec(name=name, metric="random") for name in self.controls if name not in found}

    @cached_property
    def controls(self) -> dict[str, str]:
        """Random metric made for a control → the metric whose scored pairs it draws from.

        Drawn from all eligible pairs, a selection and its control would stand for different populations wherever a
        number is missing. The control of a compound rule is a rule of its own (`random_rule`) and needs no metric.
        """
        names = {spec.name for spec in self.config.metrics}
        rules = [s.rule for s in self.config.selections if "random" in s.controls and s.rule.get("kind") in LEAVES]
        return {f"random-{base}": base for rule in rules for base in rule_scores(rule) if base in names}

    def text_reader(self) -> PairReader:
        """A reader without any column: texts and drop reasons."""
        return PairReader(self.storage, self.eligible_folder)

    def metric_columns(self, name: str) -> list[str]:
        """The flat columns metric `name` needs.

        Raises:
            UserError: no such metric, or parameters it does not have.
        """
        spec = self.metrics.get(name)
        if spec is None:
            raise invalid("score", f"score_{name}", [f"score_{metric}" for metric in self.metrics])
        metric, params = find_metric(spec.metric, spec.params)
        return list(metric.columns(params))

    def metric_recipe(self, name: str) -> dict[str, Any]:
        """The recipe of the scores of metric `name`; lengths, which the scores are set against, are part of it."""
        spec = self.metrics[name]
        reader = self.reader(self.metric_columns(name), field=f"metrics.{name}")
        upstream = {folder: ",".join(columns) for folder, columns in reader.columns}
        upstream |= {"eligible": fingerprint(self.eligible_recipe), "lengths": reader.length_column or ""}
        if name in self.controls:
            upstream["population"] = fingerprint(self.metric_recipe(self.controls[name]))
        return recipe("metric", {"metric": spec.metric, "params": spec.params}, upstream=upstream, corpus=self.corpus)

    def scores_folder(self, name: str) -> str:
        """The scores of metric `name`, without the source."""
        return f"scores/{name}@{fingerprint(self.metric_recipe(name))}"

    def selected_folder(self, name: str, rule: Mapping[str, Any]) -> str:
        """The selection that `rule` makes of the scores it reads."""
        upstream = {metric: fingerprint(self.metric_recipe(metric)) for metric in rule_scores(rule)}
        made_of = recipe("selection", {"rule": dict(rule)} | ranks_of(rule), upstream=upstream, corpus=self.corpus)
        return f"selections/{name}@{fingerprint(made_of)}"

    def dataset_folder(self, name: str, selection: str) -> str:
        """The dataset of a selection folder: its rows with the columns of `exported`."""
        columns = {self.columns_folder(scorer): "" for scorer in self.exported(name)}
        made_of = recipe("dataset", {}, upstream=columns | {"selection": selection}, corpus=self.corpus)
        return f"datasets/{name}@{fingerprint(made_of)}"

    def writes_dataset(self, name: str) -> bool:
        """Whether the rows of a selection, or of a control, are written out.

        Reading through it costs the text of what is not kept each time, and no writing: half as much for one reading,
        the same for two (`benchmarks/read_through.py`).
        """
        selection = next(one for one in self.config.selections if name in selection_names(one))
        if selection.dataset != "auto":
            return selection.dataset == "always"
        trained = [spec for spec in self.config.train if spec.selection == name]
        return sum(spec.workers * len(members(spec)) for spec in trained) != 1

    def control_rules(self, selection: Selection) -> dict[str, dict[str, Any]]:
        """The rules of a selection's controls: as many pairs at random, and its reverse. The selection must exist."""
        rules: dict[str, dict[str, Any]] = {}
        for control in selection.controls:
            if control == "reverse":
                rule = reversed_rule(selection.rule)
            else:
                base = load_summary(self.storage, self.selected_folder(selection.name, selection.rule))
                assert base is not None, f"selection {selection.name} comes before its controls"
                rule = random_rule(selection.rule, base.rows_out)
            rules[f"{selection.name}-{control}"] = rule
        return rules

    def selected_dataset(self, name: str) -> str | None:
        """The dataset of a selection, or of a control, by name; None where it has none."""
        return self.dataset_folder(name, self.selected_path(name)) if self.writes_dataset(name) else None

    def selected_path(self, name: str) -> str:
        """The folder of a selection, or of a control, by name.

        Raises:
            UserError: no such selection.
        """
        names = []
        for selection in self.config.selections:
            names += [selection.name, *(f"{selection.name}-{control}" for control in selection.controls)]
            if name in names:
                rules = {selection.name: selection.rule} if name == selection.name else self.control_rules(selection)
                return self.selected_folder(name, rules[name])
        raise invalid("train.selection", name, names)

    def exported(self, name: str) -> list[Scorer]:
        """The scorers whose columns stand in the dataset of selection (or control, or part) `name`.

        Those that need no training, what its rule reads, and the references of the trainings on it: all of them are
        there when the dataset is written, and a scorer that runs on a model trained on it is not among them.
        """
        wanted = [scorer for scorer in self.scorers if self.is_early(scorer)]
        for selection in self.config.selections:
            if name in selection_names(selection):
                for metric in rule_scores(selection.rule):
                    wanted += self.scorers_for(self.metric_columns(metric), field=f"metrics.{metric}")
        trained = [spec for spec in self.config.train if isinstance(spec, Train) and spec.selection == name]
        wanted += [self.logps_scorer(spec.reference) for spec in trained if spec.reference]
        return [scorer for scorer in self.scorers if any(scorer is one for one in wanted)]

    @property
    def holdout_dataset(self) -> str:
        """The held-out pairs."""
        return self.dataset_folder("holdout", self.eligible_folder)

    # ---------------------------------------------------------------------------------- trainings and tangents

    def member_recipe(self, member: Member) -> dict[str, Any]:
        """The recipe of a trained model: its options, where its weights start, what it is trained on."""
        spec = self.trainings[member.training]
        base = self.model(spec.model)
        settings: dict[str, Any] = {"train": spec.model_dump(exclude=MOVE_NO_WEIGHT), "model": base.settings}
        if member.aspect is not None:
            settings["aspect"] = member.aspect
        if spec.cross_fit is not None:
            settings["fold"] = [member.fold, spec.cross_fit.model_dump()]
        models = {"model": base.identity}
        upstream = {"selection": self.trained_on(spec)}
        if isinstance(spec, Train):
            if spec.reference:
                reference = self.model(spec.reference)
                settings["reference"] = reference.settings
                models["reference"] = reference.identity
                upstream["reference"] = self.columns_folder(self.logps_scorer(spec.reference))
            if spec.keep_optimizer_state:
                settings["keep_optimizer_state"] = True
            if spec.divergence:
                upstream["divergence"] = fingerprint(self.metric_recipe(spec.divergence))
        return recipe("model", settings, models=models, upstream=upstream, corpus=self.corpus)

    def trained_on(self, spec: Training) -> str:
        """What names the pairs of a training: a selection's folder, or a part of the corpus."""
        if spec.selection in PARTS:
            return f"{spec.selection} of {self.eligible_folder}"
        return self.selected_path(spec.selection)

    def member_path(self, member: Member) -> str:
        """Where a trained model lies."""
        return f"models/{member.label}@{fingerprint(self.member_recipe(member))}"

    def tangent_recipe(self, name: str) -> dict[str, Any]:
        """The recipe of a tangent: its settings, its model, the validation pairs with their reference log-probs."""
        spec = self.tangents[name]
        model = self.model(spec.model)
        unused = {"name", *(["damping"] if spec.preconditioner == "none" else [])}
        return recipe(
            "tangent",
            {"tangent": spec.model_dump(exclude=unused), "model": model.settings},
            models={"model": model.identity},
            upstream={
                "pairs": f"validation of {self.eligible_folder}",
                "reference": self.columns_folder(self.logps_scorer(spec.reference)),
            },
            corpus=self.corpus,
        )

    def tangent_path(self, name: str) -> str:
        """Where a tangent lies."""
        return f"tangents/{name}@{fingerprint(self.tangent_recipe(name))}"
