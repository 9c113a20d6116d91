"""What a stage did and what a run did, as records a person can check: counts, hashes, versions, timings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

from prefsel.config import Config
from prefsel.display import redacted
from prefsel.version import __version__
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.entries import ATTEMPTS, LEDGER, SEAL_NAME, compact
from prefsel.workspace.ledger import require_flow
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage

SUMMARY = "summary.json"
LISTING = "listing"
"""Key of a summary beside those of a report."""
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
    """Fold the ledgers of an artifact and keep the stage's report beside it: the sign that it is complete.

    With it stands what a listing of the artifact shows now, so that nothing has to be read to see that all is there.
    """
    for path in ledgers_in(storage.sizes(report.artifact, recursive=True)):
        compact(storage, path)
    # Not the last key: that would look like the digest of an earlier version.
    table = {LISTING: listing_of(storage.sizes(report.artifact, recursive=True)), **asdict(report)}
    write_document(storage, f"{report.artifact}/{SUMMARY}", table, indent=1)


def load_summary(storage: Storage, artifact: str) -> StageReport | None:
    """The report of a complete artifact, as of a run that computed nothing; None while it is incomplete.

    Raises:
        DamagedError: it is not what was written.
    """
    return summary_and_listing(storage, artifact)[0]


def summary_and_listing(storage: Storage, artifact: str) -> tuple[StageReport | None, str | None]:
    """The report as of `load_summary`, and the hash of the listing of the artifact when it was complete."""
    found = find_document(storage, f"{artifact}/{SUMMARY}")
    if found is None:
        return None, None
    listing = found.pop(LISTING, None)
    return replace(StageReport(**found), computed_shards=0, seconds=0.0), listing


def ledgers_in(names: Iterable[str]) -> list[str]:
    """The artifacts whose ledgers are among these files, sorted; seals are none."""
    found = {name.split(f"/{LEDGER}/")[0] for name in names if f"/{LEDGER}/" in name and not name.endswith(SEAL_NAME)}
    return sorted(found)


def listing_of(sizes: Mapping[str, int]) -> str:
    """Hash of the names and sizes of the files of an artifact; its summary and the logs of attempts apart."""
    names = sorted(name for name in sizes if f"/{LEDGER}/{ATTEMPTS}/" not in name and not name.endswith(f"/{SUMMARY}"))
    return hash_hex(*(f"{name} {sizes[name]}" for name in names))


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
