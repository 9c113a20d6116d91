"""A selection's dataset, and a model, as the next version of what is published, with where they came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prefsel.errors import IntegrityError, UserError, invalid
from prefsel.publishing.versions import folder, new_version, point, read_file, read_pointer, require_whole, versions
from prefsel.report.contents import last_manifest, read_contents
from prefsel.workspace.folders import read_seal, write_seal
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage, digest

LINEAGE = "lineage.json"


@dataclass(frozen=True)
class Published:
    """What became of a publishing."""

    version: str
    rows: int
    is_new: bool
    """False where the current version holds the same already."""


def publish(storage: Storage, selection: str, name: str, model: str | None = None) -> Published:
    """Make the next version of `name` current; a publishing that was killed is gone on with, or done again.

    Args:
        storage: The workspace, held.
        selection: A selection or control of the last finished run, written out as a dataset.
        name: What consumers know it by.
        model: A model of that run that goes along, in `model/`.

    Raises:
        UserError: there is no such selection or model, or the selection has no dataset.
        IntegrityError: a file is not what was committed.
    """
    lineage = _lineage(storage, selection, model)
    if found := _same(storage, name, lineage):
        pointer = read_pointer(storage, name)
        is_current = pointer is not None and pointer[0].version == found
        if not is_current:
            point(storage, name, found, "publish")
        return Published(found, lineage["rows"], not is_current)
    version, there = new_version(storage, name), read_pointer(storage, name)
    lineage |= {"name": name, "version": version, "parent": there[0].version if there else None}
    place, listed = folder(name, version), dict[str, dict[str, Any]]()

    def put(inside: str, data: bytes) -> None:
        storage.write(f"{place}/{inside}", data)
        listed[inside] = {"bytes": len(data), "blake2b": digest(data)}

    for source, below in ((lineage["dataset"], ""), (lineage["model"], "model/")):
        for file, data in _files(storage, source["path"]) if source else ():
            put(f"{below}{file}", data + _origin(lineage) if not below and file == "README.md" else data)
    put(LINEAGE, json.dumps(lineage, indent=1).encode())
    write_seal(storage, place, listed, {"rows": lineage["rows"]})
    point(storage, name, version, "publish")
    return Published(version, lineage["rows"], True)


def read_lineage(storage: Storage, name: str, version: str) -> dict[str, Any]:
    """Where a version came from.

    Raises:
        IntegrityError: nobody can tell, as it is damaged.
    """
    return json.loads(read_file(storage, name, version, LINEAGE))


def _same(storage: Storage, name: str, lineage: dict[str, Any]) -> str | None:
    """The version that holds just this: the current one, or the newest, which a killed publishing did not point to."""
    pointer, there = read_pointer(storage, name), versions(storage, name)
    newest = [there[-1]] if there and (not pointer or all(m.version != there[-1] for m in pointer[0].moves)) else []
    for version in [*([pointer[0].version] if pointer else []), *newest]:
        with suppress(IntegrityError):  # what is damaged is published anew
            known = read_lineage(storage, name, version)
            if all(known[key] == lineage[key] for key in ("dataset", "model")):
                require_whole(storage, name, version)
                return version
    return None


def _lineage(storage: Storage, selection: str, model: str | None) -> dict[str, Any]:
    contents, manifest = read_contents(storage), last_manifest(storage)
    report = contents.selection(selection)
    dataset = report.details.get("dataset")
    seal = read_seal(storage, dataset) if dataset else None
    if seal is None:
        raise UserError(
            f"publish {selection}: the last run did not write it out as a dataset; set selections.{selection}.dataset "
            "to always, and run again"
        )
    flow = [
        {key: getattr(one, key) for key in ("stage", "name", "unit", "rows_in", "rows_out", "dropped", "artifact")}
        for one in contents.stages
    ]
    return {
        "selection": selection,
        "rows": seal["info"]["rows"],
        "dataset": {"path": dataset, "content": seal["content"]},
        "model": None if model is None else _model(storage, contents.stages, model),
        "rule": report.details.get("rule"),
        "length": report.details.get("length"),
        **{key: manifest[key] for key in ("run", "corpus", "versions", "config_yaml")},
        "artifacts": [one["path"] for one in manifest["artifacts"]],
        "flow": flow,
    }


def _model(storage: Storage, stages: tuple[StageReport, ...], name: str) -> dict[str, str]:
    found = {one.name: one.artifact for one in stages if one.artifact.startswith("models/")}
    seal = read_seal(storage, found[name]) if name in found else None
    if seal is None:
        raise invalid("--model", name, sorted(found) or "none: the last run made no model")
    return {"path": found[name], "content": seal["content"]}


def _files(storage: Storage, path: str) -> Iterator[tuple[str, bytes]]:
    """The files of a sealed folder, one at a time, checked."""
    seal = read_seal(storage, path)
    assert seal is not None, "it was looked at before"
    for name, file in seal["files"].items():
        data = storage.read(f"{path}/{name}")
        if digest(data) != file["blake2b"]:
            raise IntegrityError(f"{path}/{name}: altered since it was committed, so it is not published")
        yield name, data


def _origin(lineage: dict[str, Any]) -> bytes:
    """The end of a card."""
    parent = lineage["parent"] or "none, it is the first"
    model = f" The model in `model/` is `{lineage['model']['path']}`." if lineage["model"] else ""
    return (
        f"\n## Version\n\n`{lineage['version']}` of `{lineage['name']}`; the version before: {parent}. Selection "
        f"`{lineage['selection']}` of run `{lineage['run']}`, corpus `{lineage['corpus']}`.{model} `{LINEAGE}` holds "
        "the configuration, the fingerprints, the counts of every stage and the versions of the packages.\n"
    ).encode()
