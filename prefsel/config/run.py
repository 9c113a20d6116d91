"""A whole run: everything that a configuration file says."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from prefsel.config.data import Duplicates, Ingest, Source, Split
from prefsel.config.evaluation import Evaluation
from prefsel.config.generation import Generation
from prefsel.config.models import Model
from prefsel.config.options import Name, Options
from prefsel.config.rounds import SelfPlay
from prefsel.config.scorers import Scorer
from prefsel.config.selections import MetricSpec, Selection
from prefsel.config.tangents import Tangent
from prefsel.config.training import Training

GENERATED = ("generate", "selfplay", "evaluate")
"""Keys of what models answer."""


class ReportOptions(Options):
    """The page a run leaves."""

    examples: int = Field(6, ge=0)
    """Pairs shown per selection, half kept and half dropped; 0 for corpora whose text must not be copied."""


class RayOptions(Options):
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


class Config(Options):
    """A whole run."""

    name: Name
    """Name of the run; it names the report's folder and the file of the run."""
    plugins: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]] = []
    """Python modules that register metrics, losses, formats and scorers when they are imported (`prefsel.plugins`).
    They must be importable on every machine of the run. What an installed package names in its entry points needs no
    entry here."""
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
    generate: list[Generation] = []
    """Answers of models to prompts of the corpus."""
    selfplay: list[SelfPlay] = []
    """Rounds of self-play; several entries are played beside each other and share what they have in common."""
    evaluate: Evaluation | None = None
    """What the trained policies answer to prompts that nothing was trained on, and how good that is; null measures
    nothing."""
    report: ReportOptions = ReportOptions()
    """What the page shows that a run leaves."""
    ray: RayOptions = RayOptions()
    """Where the work runs."""

    @property
    def round_models(self) -> list[str]:
        """Names of the models that rounds of self-play may train."""
        return [arm.trained_in(number + 1) for arm in self.selfplay if arm.train for number in range(arm.rounds)]

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Runs that generate nothing are written, and so named, as before there was anything to generate."""
        written: dict[str, Any] = dump(self)
        return {key: value for key, value in written.items() if key not in GENERATED or value}
