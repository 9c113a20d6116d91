"""`verify --repair`: what is damaged is set aside and made again, by the configurations that the workspace keeps."""

from __future__ import annotations

from collections.abc import Iterator

from prefsel.config import Config
from prefsel.config.file import parse_config
from prefsel.config.yaml_text import read_yaml
from prefsel.errors import DamagedError, PrefselError, UserError
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.workspace.documents import find_document
from prefsel.workspace.lease import hold
from prefsel.workspace.notes import left
from prefsel.workspace.repair import set_aside, unsettled
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import PUBLISHED, Verification, verify


def mend(storage: Storage, progress: Progress, *, quick: bool = False, wait: bool = False) -> Verification:
    """Repair a workspace, as its only writer, and check it once more.

    Args:
        storage: The workspace.
        progress: Where it is told: what was set aside, what was made again, and what could not be and why.
        quick: Look at sizes and ledgers only.
        wait: For the end of another run that writes to it.

    Raises:
        RefusedError: another run writes to it.
    """
    with hold(storage, wait=wait, tell=progress.line) as held:
        return _mend(held, progress, quick=quick)


def _mend(storage: Storage, progress: Progress, *, quick: bool) -> Verification:
    before = verify(storage, quick=quick)
    configs = list(kept_configs(storage))
    damage = [finding for finding in before.findings if not finding.is_harmless]
    served = [finding for finding in damage if finding.path.startswith(f"{PUBLISHED}/")]
    for finding in served:
        progress.line(f"damage    {finding}; publish once more, or roll back to a version that is whole")
    damage = [finding for finding in damage if finding not in served]
    for note in set_aside(storage, damage):
        progress.line(f"damage    {note}")
    if not damage and not left(storage):
        return before
    for config, until in configs:
        try:
            run(config, storage.uri, progress, until=until)
        except PrefselError as error:
            progress.line(f"damage    configuration {config.name!r} cannot be run again: {error}")
    after = verify(storage, quick=quick)
    after.findings += unsettled(storage)
    return after


def kept_configs(storage: Storage) -> Iterator[tuple[Config, str | None]]:
    """The configurations of finished runs, newest first and each once, and the last one if its run did not finish.

    With each the part of the job that it was run for: None for all of it. Of a run that did not finish only what the
    workspace has something of is made: ingest, or everything up to scores, selections or models.
    """
    texts: list[str] = []
    for name in sorted(storage.files("runs"), reverse=True):
        try:
            manifest = find_document(storage, name)
        except DamagedError:
            continue
        text = manifest.get("config_yaml") if isinstance(manifest, dict) else None
        if text and text not in texts:
            texts.append(text)
    for text in texts:
        if (config := parsed(text)) is not None:
            yield config, None
    text = storage.read("config.yaml").decode(errors="replace") if storage.exists("config.yaml") else ""
    if text not in ("", *texts) and (config := parsed(text)) is not None:
        yield config, _until(storage)


def parsed(text: str) -> Config | None:
    """The configuration that a workspace keeps; None where it can no longer be read."""
    try:
        return parse_config(read_yaml(text, "config_yaml"))
    except (UserError, AttributeError):
        return None


def _until(storage: Storage) -> str:
    """The last part of the job that a workspace has something of."""
    parts = (("models", "train"), ("selections", "select"), ("scores", "select"), ("columns", "score"))
    return next((until for folder, until in parts if storage.folders(folder)), "ingest")
