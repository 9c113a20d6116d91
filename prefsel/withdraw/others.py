"""What else knows rows that are taken back: models and tangents that saw them, and files that no stage made."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.errors import DamagedError
from prefsel.schema import TRAINED_ON
from prefsel.withdraw.corpora import beside, corpora, file_records
from prefsel.withdraw.tables import is_among
from prefsel.withdraw.texts import SHORT_TEXT
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport, load_summary
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import SEALED, SHARDED
from prefsel.workspace.withdrawals import WITHDRAWN, Gone

OWN = {*SHARDED, *SEALED, "published", "runs", "damaged", WITHDRAWN, "catalog.json", "config.yaml"}
"""What stands directly in a workspace; beside it lie exports and, in that of the demo, its inputs."""
WEIGHTS = (".safetensors", ".bin", ".pt")
_HEX_ID = re.compile(rb"[0-9a-f]{32}")
PARTS = {"all": None, "validation": "validation"}
"""Part of the corpus that a training may name instead of a selection → reason that its pairs have in `eligible`."""


def models_that_saw(storage: Storage, gone: Gone, shards: Collection[str]) -> list[str]:
    """Models and tangents that were made of something that is taken back, as far as the workspace can tell.

    A model that keeps what it was trained on says it exactly. Of another one it is known which selection or part of
    the corpus it was trained on; of selections of one name under several configurations any counts.

    Args:
        storage: The workspace.
        gone: What is taken back.
        shards: `<source>/<shard>` of the groups that hold something of it.
    """
    reasons, kept = _reasons(storage, gone, shards), _selections(storage, gone, shards)
    found = []
    for path in [f"{kind}/{name}" for kind in ("models", "tangents") for name in storage.folders(kind)]:
        try:
            report = load_summary(storage, path)
            exact = f"{path}/{TRAINED_ON}"
            if storage.exists(exact):
                saw = bool(is_among(_read_parquet(storage.read(exact))["prompt_id"], gone.prompts).any())
            else:
                saw = report is not None and _may_have_seen(report, reasons, kept)
        except (DamagedError, pa.ArrowInvalid):
            saw = True  # nobody can tell
        if saw:
            found.append(path)
    return found


def _may_have_seen(report: StageReport, reasons: Collection[str | None], selections: Collection[str]) -> bool:
    if report.stage == "scratch":
        return "proxy" in reasons
    if report.stage == "tangent":
        return "validation" in reasons
    selection = report.details.get("selection")
    return selection in selections or (selection in PARTS and PARTS[selection] in reasons)


def _reasons(storage: Storage, gone: Gone, shards: Collection[str]) -> set[str | None]:
    """Why pairs that are taken back were not eligible; None for those that were."""
    found: set[str | None] = set()
    for artifact, shard in _of_shards(storage, "eligible", shards):
        table = artifact.read(shard)
        found |= set(table["dropped"].filter(pa.array(is_among(table["pair_id"], gone.pairs))).to_pylist())
    return found


def _selections(storage: Storage, gone: Gone, shards: Collection[str]) -> set[str]:
    """Names of the selections that kept a pair that is taken back."""
    return {
        artifact.path.split("/")[1].rpartition("@")[0]
        for artifact, shard in _of_shards(storage, "selections", shards)
        if is_among(artifact.read(shard, ["pair_id"])["pair_id"], gone.pairs).any()
    }


def _of_shards(storage: Storage, kind: str, shards: Collection[str]) -> Iterable[tuple[Artifact, str]]:
    for source in {key.rsplit("/", 1)[0] for key in shards}:
        for artifact in beside(storage, kind, source):
            yield from ((artifact, shard) for shard in artifact.entries() if f"{source}/{shard}" in shards)


def other_files(storage: Storage, gone: Gone, texts: Collection[str]) -> list[str]:
    """Files of the workspace that no stage made and that show something that is taken back, input files left out.

    Args:
        storage: The workspace.
        gone: What is taken back: an id of it in hex shows it.
        texts: What it says; texts shorter than `SHORT_TEXT` alone do not show it.
    """
    inputs = set(inputs_within(storage))
    return [name for name in _strangers(storage) if name not in inputs and _shows(storage, name, gone, texts)]


def inputs_within(storage: Storage) -> list[str]:
    """Input files that lie in the workspace, as those of the demo do."""
    root = storage.uri.rstrip("/") + "/"
    uris = {str(one["uri"]) for corpus in corpora(storage) for one in file_records(storage, corpus.source).values()}
    return sorted(uri.removeprefix(root) for uri in uris if uri.startswith(root))


def _strangers(storage: Storage) -> list[str]:
    return [
        name
        for name in storage.files("", recursive=True)
        if name.split("/")[0] not in OWN and not name.startswith("lease") and not name.endswith(WEIGHTS)
    ]


def _shows(storage: Storage, name: str, gone: Gone, texts: Collection[str]) -> bool:
    data = storage.read(name)
    if name.endswith(".parquet"):
        try:
            table = _read_parquet(data)
        except pa.ArrowInvalid:
            return False
        data = "\n".join(map(str, table.to_pylist())).encode(errors="replace")
        ids = [str(one)[2:-1].encode() for one in (*gone.pairs, *gone.prompts, *gone.completions)]
        if any(one in data for one in ids):
            return True
    if any(one.decode() in gone.hex_ids for one in _HEX_ID.findall(data)):
        return True
    long = [text for text in texts if len(text) >= SHORT_TEXT]
    forms = {json.dumps(text, ensure_ascii=one)[1:-1] for text in long for one in (False, True)} | set(long)
    return any(form.encode(errors="replace") in data for form in forms)


def _read_parquet(data: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(data))
