"""A whole run: everything that a configuration file says."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prefsel.config.data import Duplicates, Ingest, Source, Split
from prefsel.config.models import Model
from prefsel.config.options import Name, Options
from prefsel.config.scorers import Scorer
from prefsel.config.selections import MetricSpec, Selection
from prefsel.config.tangents import Tangent
from prefsel.config.training import Training


class ReportOptions(Options):
    """The page a run leaves."""

    examples: int = Field(6, ge=0)
    """Pairs shown of each kind (kept, dropped); 0 for corpora whose text must not be copied."""


class RayOptions(Options):
    """Where the work runs. Without an address (and outside a Ray job) a Ray of this process is started.

    The sizes are those of a Ray started here; a cluster that is joined keeps its own.
    """

    address: str | None = None
    num_cpus: int | None = Field(None, ge=1)
    num_gpus: int | None = Field(None, ge=0)
    object_store_gib: float = Field(1.0, gt=0)


class Config(Options):
    """A whole run."""

    name: Name
    plugins: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]] = []
    """Python modules that register metrics, losses and formats when they are imported (`prefsel.plugins`); they must be
    importable on every machine of the run. What an installed package names in its entry points needs no entry here."""
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
    report: ReportOptions = ReportOptions()
    ray: RayOptions = RayOptions()
