"""What a stage did and what a run did, as records a person can check: counts, hashes, versions, timings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

from prefsel.config import Config
from prefsel.display import redacted
from prefsel.version import __version__
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.ledger import require_flow
from prefsel.workspace.storage import Storage

SUMMARY = "summary.json"
PACKAGES = ("ray", "torch", "transformers", "pyarrow", "datasets", "deepspeed", "numpy")


@dataclass(frozen=True)
class StageReport:
    """The outcome of one stage for one artifact; `rows_in = rows_out + Σ dropped` holds by construction."""

    stage: str
    name: str
    unit: str
    """What the rows are: `rows`, `completions`, `pairs`."""
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    shards: int
    computed_shards: int
    """Shards this run computed; 0 when everything was there already."""
    seconds: float
    artifact: str
    fingerprint: str | None = None
    """What stands after `@` in `artifact`."""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_flow(f"{self.stage} {self.name}", self.rows_in, self.rows_out, self.dropped)
        object.__setattr__(self, "fingerprint", self.artifact.partition("@")[2] or None)

    def sentence(self) -> str:
        """One line for the log."""
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items() if count)
        work = f"{self.computed_shards}/{self.shards} shards computed" if self.computed_shards else "nothing to do"
        flow = f"{self.rows_in:,} {self.unit} in, {self.rows_out:,} out" + (f" ({lost})" if lost else "")
        return f"{self.stage:<9} {self.name}: {flow}; {work}; {self.seconds:.1f} s"


def save_summary(storage: Storage, report: StageReport) -> None:
    """Keep a stage's report beside its artifact: the sign that a whole-corpus artifact is complete."""
    write_document(storage, f"{report.artifact}/{SUMMARY}", asdict(report), indent=1)


def load_summary(storage: Storage, artifact: str) -> StageReport | None:
    """The report of a complete artifact, as of a run that computed nothing; None while it is incomplete.

    Raises:
        DamagedError: it is not what was written.
    """
    found = find_document(storage, f"{artifact}/{SUMMARY}")
    return None if found is None else replace(StageReport(**found), computed_shards=0, seconds=0.0)


def config_text(config: Config) -> str:
    """`config` as YAML with every default written out and without secrets: what a workspace keeps."""
    return yaml.safe_dump(redacted(config.model_dump(mode="json", by_alias=True)), sort_keys=False)


def versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    found = {"prefsel": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def hardware() -> dict[str, Any]:
    """Cores and memory of the driver's machine."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpus": os.cpu_count(), "memory_gib": round(pages / 2**30, 1), "machine": platform.machine()}


def seal(storage: Storage, run: str, manifest: dict[str, Any]) -> str:
    """Write the manifest of a finished run, without secrets; returns its path."""
    path = f"runs/{run}.json"
    write_document(storage, path, redacted(manifest), indent=1)
    return path
