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
    CausalLogps,
    Config,
    Imported,
    MetricSpec,
    PretrainedModel,
    RewardModel,
    Scorer,
    Selection,
    Train,
)
from prefsel.errors import UserError, invalid
from prefsel.metrics.reader import PairReader
from prefsel.metrics.table import find_metric
from prefsel.workspace.catalog import Catalog, read_catalog
from prefsel.workspace.folders import folder_content
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.recipes import fingerprint, hash_hex, recipe
from prefsel.workspace.storage import Storage

SUFFIXES = ("_chosen", "_rejected", "_max", "_min")


def scorer_label(scorer: Scorer) -> str:
    """The name of a scorer's column set: its model, or its own name."""
    return scorer.name if isinstance(scorer, Imported) else scorer.model


def rule_metric(rule: Mapping[str, Any]) -> str:
    """The metric whose score a rule's leaf names."""
    return str(rule.get("score", "")).removeprefix("score_")


MOVE_NO_WEIGHT = {
    *("name", "selection", "workers", "gpus_per_worker", "cpus_per_worker", "max_failures", "max_eval_pairs"),
    *("eval_every_steps", "checkpoint_every_steps", "keep_checkpoints", "reference_check_pairs"),
    *("micro_batch_pairs", "token_budget"),
}
"""Keys of a training that move no weight by more than rounding; changing one trains nothing again."""


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
            UserError: no such model, or its directory is incomplete.
        """
        spec = self.model_spec(name)
        settings = spec.model_dump(include={"dtype", "max_length", "truncation", "template"})
        if Path(spec.template).is_file():  # its text decides, and workers have other working directories
            settings["template"] = Path(spec.template).read_text(encoding="utf-8")
        if isinstance(spec, PretrainedModel):
            return self._pretrained(spec, settings)
        path = self.scratch_path(name)
        content = folder_content(self.storage, path)
        if content is None:
            raise UserError(f"models.{name}: not made yet; run the whole pipeline (`prefsel run`) first")
        return ModelRef(name, path, content, True, settings)

    def _pretrained(self, spec: PretrainedModel, settings: dict[str, Any]) -> ModelRef:
        from prefsel.models.loading import context_length, max_positions, model_identity

        identity = model_identity(spec.path, revision=spec.revision)
        is_local = Path(spec.path).is_dir()
        # The commit that the identity names is the one that workers load, whatever the hub says by then.
        revision = None if is_local else identity
        declared = max_positions(spec.path, revision, spec.trust_remote_code)
        if spec.max_length is None:
            settings["max_length"] = context_length(spec.path, revision, spec.trust_remote_code)
        elif declared and spec.max_length > declared:
            raise invalid(
                f"models.{spec.name}.max_length", spec.max_length, f"at most the model's {declared} positions"
            )
        path = str(Path(spec.path).absolute()) if is_local else spec.path
        return ModelRef(spec.name, path, identity, False, settings, revision)

    # ----------------------------------------------------------------------------------------------- columns

    def columns_recipe(self, scorer: Scorer) -> dict[str, Any]:
        """The recipe of a scorer's columns: never of the corpus."""
        if isinstance(scorer, Imported):
            return recipe("score", scorer.model_dump())
        model = self.model(scorer.model)
        settings = scorer.model_dump(exclude={"pool", "max_poison_fraction", "token_budget"}) | model.settings
        return recipe("score", settings, models={model.name: model.identity})

    def columns_folder(self, scorer: Scorer) -> str:
        """The column set a scorer makes, without the source."""
        return f"columns/{scorer_label(scorer)}@{fingerprint(self.columns_recipe(scorer))}"

    def reader(self, flat_names: list[str] | None = None, *, field: str = "columns") -> PairReader:
        """A reader of flat pair tables with the columns that `flat_names` need; default: all columns."""
        scorers = self.config.scorers if flat_names is None else self.scorers_for(flat_names, field=field)
        wanted = [(self.columns_folder(scorer), tuple(self.column_names(scorer))) for scorer in scorers]
        logps = [scorer for scorer in self.config.scorers if isinstance(scorer, CausalLogps)]
        length = f"num_tokens_{logps[0].model}" if logps else None
        if length and logps[0] not in scorers:
            wanted.append((self.columns_folder(logps[0]), (length,)))
        return PairReader(self.storage, self.eligible_folder, tuple(wanted), length)

    @cached_property
    def providers(self) -> dict[str, Scorer]:
        """Completion column → the scorer that makes it."""
        found: dict[str, Scorer] = {}
        for scorer in self.config.scorers:
            for column in self.column_names(scorer):
                if column in found:
                    raise UserError(f"scorers: {column!r} would be made twice; give one of the models another name")
                found[column] = scorer
        return found

    def column_names(self, scorer: Scorer) -> list[str]:
        """Names of the completion columns a scorer makes."""
        if isinstance(scorer, CausalLogps):
            return [f"logps_{scorer.model}", f"num_tokens_{scorer.model}"]
        if isinstance(scorer, RewardModel):
            heads = scorer.heads or self._heads(scorer.model)
            return [f"rm_{head}" for head in heads] if len(heads) > 1 else [f"rm_{scorer.model}"]
        return list(self.imported_fields(scorer))

    def imported_fields(self, scorer: Imported) -> dict[str, str]:
        """Column → what the number is called in the data."""
        fields = scorer.field if isinstance(scorer.field, list) else [scorer.field]
        if scorer.as_ == "rm":
            return {f"rm_{scorer.name}": fields[0]}
        return {f"ratings_{field}": field for field in fields}

    def _heads(self, name: str) -> list[str]:
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
            column = next((name[: -len(s)] for s in SUFFIXES if name.endswith(s)), name)
            if column in ("pair_id", "prompt_id", "aspect", "source"):
                continue
            if column == "num_tokens":  # of whichever model counted them first
                column = next((made for made in self.providers if made.startswith("num_tokens_")), column)
            if column not in self.providers:
                is_logps = column.startswith(("logps_", "num_tokens_"))
                kind = "causal_logps" if is_logps else "reward_model or imported"
                made = ", ".join(self.providers) or "none"
                raise UserError(f"{field}: needs column {column!r}, which a scorer of kind {kind} makes; made: {made}")
            needed.append(self.providers[column])
        return [scorer for scorer in self.config.scorers if any(scorer is n for n in needed)]

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
        number is missing.
        """
        names = {spec.name for spec in self.config.metrics}
        bases = [rule_metric(s.rule) for s in self.config.selections if "random" in s.controls]
        return {f"random-{base}": base for base in bases if base in names}

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

    def selection_folder(self, name: str, rule: Mapping[str, Any], metric: str) -> str:
        """The selection that `rule` makes."""
        upstream = {metric: fingerprint(self.metric_recipe(metric))}
        made_of = recipe("selection", {"rule": dict(rule)}, upstream=upstream, corpus=self.corpus)
        return f"selections/{name}@{fingerprint(made_of)}"

    def dataset_folder(self, name: str, selection: str) -> str:
        """The dataset of a selection folder: its rows with the columns of every scorer."""
        columns = {self.columns_folder(scorer): "" for scorer in self.config.scorers}
        made_of = recipe("dataset", {}, upstream=columns | {"selection": selection}, corpus=self.corpus)
        return f"datasets/{name}@{fingerprint(made_of)}"

    def control_rules(self, selection: Selection) -> dict[str, dict[str, Any]]:
        """The rules of a selection's controls: as many pairs at random, and its reverse. The selection must exist."""
        rules: dict[str, dict[str, Any]] = {}
        for control in selection.controls:
            if control == "reverse":
                rule = dict(selection.rule, reverse=not selection.rule.get("reverse", False))
            else:
                base = load_summary(self.storage, self.selected_folder(selection.name, selection.rule))
                assert base is not None, f"selection {selection.name} comes before its controls"
                score = f"score_random-{rule_metric(selection.rule)}"
                rule = {"kind": "top", "score": score, "count": base.rows_out}
            rules[f"{selection.name}-{control}"] = rule
        return rules

    def selected_folder(self, name: str, rule: Mapping[str, Any]) -> str:
        """The selection that `rule` makes; its leaf names the metric."""
        return self.selection_folder(name, rule, rule_metric(rule))

    def selected_dataset(self, name: str) -> str:
        """The dataset of a selection, or of a control, by name."""
        return self.dataset_folder(name, self.selected_path(name))

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

    @property
    def holdout_dataset(self) -> str:
        """The held-out pairs."""
        return self.dataset_folder("holdout", self.eligible_folder)

    def trained_recipe(self, spec: Train) -> dict[str, Any]:
        """The recipe of a trained model: its options, both models, what was selected, and the reference's log-probs."""
        model, reference = self.model(spec.model), self.model(spec.reference)
        scorer = self.providers[f"logps_{spec.reference}"]
        settings = {
            "train": spec.model_dump(exclude=MOVE_NO_WEIGHT),
            "model": model.settings,
            "reference": reference.settings,
        }
        return recipe(
            "model",
            settings,
            models={"model": model.identity, "reference": reference.identity},
            upstream={"selection": self.selected_path(spec.selection), "reference": self.columns_folder(scorer)},
            corpus=self.corpus,
        )
