"""Where the corpus comes from, how its rows are read, and which of its prompts are kept out of selection."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prefsel.config.options import Fraction, Name, Options


class FormatOptions(Options):
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


class Source(Options):
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


class Ingest(Options):
    """Limits of ingest."""

    rows_per_shard: int = Field(4096, ge=1)
    """Input rows in one shard, the unit of work, retry and resume."""
    max_row_mib: float = Field(16.0, gt=0)
    max_quarantine_fraction: float = Field(0.05, ge=0, le=1)
    """The run fails when more of the rows are quarantined."""


class Split(Options):
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


class Duplicates(Options):
    """The same pair, or its opposite, in several places of the corpus."""

    contradictions: Literal["drop", "keep"] = "drop"
