"""The corpus has changed: bring a workspace up to date at the cost of what is new, and say what that did.

    inputs ─▶ new, changed and removed files ─▶ new shards ─▶ numbers of new completions, by the models of the last run
           ─▶ selections over all ─▶ what entered and left ─▶ trained, where asked

Everything but the models is what `run` does: shards are found again by their content, and completions whose numbers
are known from shards that left the corpus are not scored again. Models and tangents that score are those of the last
run of the same name; without that every corpus would be scored by models of its own, all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefsel.config import Config
from prefsel.config.file import parse_config
from prefsel.config.yaml_text import read_yaml
from prefsel.damage import until_whole
from prefsel.errors import UserError, invalid
from prefsel.pipeline import Outcome, run
from prefsel.plan.nodes import make_plan
from prefsel.plan.pinned import Former, former
from prefsel.progress import Progress
from prefsel.publishing.gate import MAX_DROP, require_no_worse
from prefsel.publishing.publish import publish
from prefsel.publishing.versions import folder, prune
from prefsel.stages.changes import Selected, compare_selections, lines
from prefsel.workspace.catalog import PATH, read_catalog
from prefsel.workspace.documents import read_document
from prefsel.workspace.lease import hold, require_no_writer
from prefsel.workspace.manifest import StageReport, load_summary
from prefsel.workspace.storage import Storage


@dataclass(frozen=True)
class Publishing:
    """What a refresh publishes."""

    selection: str
    name: str
    model: str | None = None
    """A training that goes along, and must not be worse than the published one."""
    max_drop: float = MAX_DROP
    """Points of held-out accuracy that it may lose."""
    keep: int | None = None
    """Versions that stay; None: all."""


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did."""

    outcome: Outcome
    diffs: list[StageReport] = field(default_factory=list)
    """One per selection that the run before had too."""
    former: Mapping[str, Any] | None = None
    """The manifest of that run."""


def refresh(
    config: Config,
    workspace: str,
    progress: Progress,
    *,
    retrain_scorers: bool = False,
    trains: bool = False,
    publishing: Publishing | None = None,
    wait: bool = False,
) -> Refreshed:
    """Bring a workspace up to date with its inputs, as its only writer. The first time this is a run.

    Args:
        config: The run.
        workspace: Directory or URI.
        progress: Where it is told.
        retrain_scorers: Make the models that score anew, for the corpus as it is now; everything is scored again.
        trains: Also train, answer and evaluate what the configuration asks for.
        publishing: What is published in the end, where the gate lets it through; None: nothing.
        wait: For the end of another run that writes to the workspace.

    Raises:
        RefusedError: another run writes to it.
        GateError: the new model is worse than the published one; everything is made, and nothing published.
        UserError: the configuration cannot work, or does not make what is to be published.
        PrefselError: a model of the run before is gone.
    """
    storage = Storage(workspace)
    if publishing is not None:
        folder(publishing.name)
        names = [name for one in config.selections for name in one.names]
        if publishing.selection not in names:
            raise invalid("--publish", publishing.selection, names)
    if not wait:
        require_no_writer(storage)
    with hold(storage, wait=wait, tell=progress.line) as held:
        done = _refresh(config, held, progress, retrain_scorers=retrain_scorers, trains=trains)
        if publishing is not None:
            _publish(held, done, publishing, progress)
    return done


def _refresh(config: Config, storage: Storage, progress: Progress, *, retrain_scorers: bool, trains: bool) -> Refreshed:
    manifest, files = until_whole(storage, progress, lambda: last_manifest(storage, config.name)), _files(storage)
    if manifest is None:
        progress.line(f"refresh: no finished run of {config.name!r} is here; everything is made")
        return Refreshed(run(config, storage.uri, progress, trains=trains))
    goes_by = None if retrain_scorers else _former(config, storage, manifest, progress)
    outcome = run(config, storage.uri, progress, former=goes_by, trains=trains)
    for line in _changed_files(files, _files(storage)):
        progress.line(line)
    diffs = []
    for now in (report for report in outcome.reports if report.stage == "select"):
        before = next((one for one in manifest["stages"] if (one["stage"], one["name"]) == ("select", now.name)), None)
        if before is None or before["artifact"] == now.artifact:
            continue
        sides = [_selected(storage, manifest["stages"], before["artifact"]), _now(outcome, now)]
        if (side := sides[0]) is None or sides[1] is None:
            progress.line(f"diff      {now.name}: the selection of the run before is not here any more")
            continue
        diffs.append(compare_selections(storage, side, sides[1], progress))
        for line in lines(diffs[-1]):
            progress.line(line)
    return Refreshed(outcome, diffs, manifest)


def _publish(storage: Storage, done: Refreshed, what: Publishing, progress: Progress) -> None:
    if what.model is not None:
        made = {one.name: one.artifact for one in done.outcome.reports if one.artifact.startswith("models/")}
        if what.model not in made:
            raise invalid("--model", what.model, sorted(made) or "none: this refresh made no model; add --train")
        line = require_no_worse(storage, what.name, what.model, made[what.model], what.max_drop)
        progress.line(line)
    published = publish(storage, what.selection, what.name, what.model)
    state = "is current now" if published.is_new else "is current and holds this already"
    progress.line(f"publish   {what.name} {published.version} {state}: {published.rows:,} pairs")
    if what.keep is not None and (gone := prune(storage, what.name, what.keep)):
        progress.line(f"publish   {what.name}: removed {', '.join(gone)}")


def _files(storage: Storage) -> dict[str, str]:
    """The files of the corpus as it is: name → hash of the content; none where there is no corpus yet."""
    if not storage.exists(PATH):
        return {}
    return {file.uri: file.content for source in read_catalog(storage).sources for file in source.files}


def _changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What became of the inputs, one line each kind; nothing where they are the same."""
    kinds = {
        "new": [uri for uri in now if uri not in before],
        "changed": [uri for uri in now if uri in before and now[uri] != before[uri]],
        "gone": [uri for uri in before if uri not in now],
    }
    shown = {kind: ", ".join(uris[:3]) + (" …" if len(uris) > 3 else "") for kind, uris in kinds.items()}
    return [f"refresh: {len(uris):,} files {kind}: {shown[kind]}" for kind, uris in kinds.items() if uris]


def last_manifest(storage: Storage, name: str) -> Mapping[str, Any] | None:
    """The manifest of the newest finished run of a name.

    Raises:
        DamagedError: it is not what was written.
    """
    # <name>-<date>-<time>-<hash>.json
    runs = [run for run in storage.files("runs") if run.removeprefix("runs/").rsplit("-", 3)[0] == name]
    return read_document(storage, max(runs, key=lambda run: run.rsplit("-", 3)[1:3])) if runs else None


def _former(config: Config, storage: Storage, manifest: Mapping[str, Any], progress: Progress) -> Former | None:
    """The models that score, of the run before; those asked for in other words than then are made anew, and told."""
    try:
        then = parse_config(read_yaml(manifest["config_yaml"], "config_yaml"))
    except UserError as error:
        progress.line(f"refresh: the configuration of the run before cannot be read, so all models are made: {error}")
        return None
    found, anew = former(make_plan(config, storage), make_plan(then, storage), manifest)
    if found.kept:
        names = ", ".join(name for _, name in found.kept)
        progress.line(f"refresh: scored with the models of {manifest['run']}: {names}")
    if anew:
        progress.line(f"refresh: made anew, as the configuration asks for others now: {', '.join(anew)}")
    return found


def _selected(storage: Storage, stages: list[dict[str, Any]], artifact: str) -> Selected | None:
    """A selection of the run before, with its scores; None where they are not there any more."""
    selection = load_summary(storage, artifact)
    if selection is None:
        return None
    wanted = selection.details["metric"]
    paths = [one["artifact"] for one in stages if one["stage"] in ("metric", "fuse") and one["name"] == wanted]
    scores = load_summary(storage, paths[0]) if paths else None
    return Selected(selection, scores) if scores else None


def _now(outcome: Outcome, selection: StageReport) -> Selected | None:
    wanted = selection.details["metric"]
    found = [one for one in outcome.reports if one.stage in ("metric", "fuse") and one.name == wanted]
    return Selected(selection, found[0]) if found else None
