"""Which node would be made, which is there, and what of the configuration makes one anew.

recipe now ─┐
            ├─ the first things that differ ─▶ "train.learning_rate: 1e-06, was 5e-07"
recipe then ┘  (of the configuration that the workspace keeps)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefsel.config.file import parse_config
from prefsel.config.yaml_text import read_yaml
from prefsel.display import redact
from prefsel.errors import UserError
from prefsel.ingest.identity import file_digest
from prefsel.ingest.locations import bytes_of, list_files
from prefsel.plan.node import Node
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan
from prefsel.plan.show import shown_nodes, state
from prefsel.workspace.catalog import PATH as CATALOG
from prefsel.workspace.ledger import Artifact

COMPARED_BYTES = 128 << 20
MAX_DIFFERENCES = 3
"""Differences that are told of one node."""


@dataclass(frozen=True)
class Change:
    """A node, what of it is there, and why the rest is made."""

    node: str
    state: str
    path: str
    left: float
    """The share of its shards that is missing."""
    why: str = ""


def changes(plan: Plan) -> list[Change]:
    """Every node of a run in its order, with the reason for which it would be made."""
    then, (of_files, share) = former_plan(plan), _changed_files(plan)
    if then is not None and _read_otherwise(plan, then):
        of_files, share = "options of sources or ingest changed", 1.0
    anew: set[Node] = set()
    found = []
    for node in shown_nodes(plan):
        told, path = state(plan, node)
        left = _left(plan, node) if told == "partly there" else float(told != "there")
        why = "begun, or shards are new" if told == "partly there" else ""
        if of_files and told != "to be made":
            causes = [str(need.node) for need in node.needs if need.node in anew and need.node.kind != "eligible"]
            if node.kind != "columns":
                told, left, why = "to be made", 1.0, of_files
            elif causes:
                told, left, why = "to be made", 1.0, f"{', '.join(dict.fromkeys(causes))} made anew"
            else:
                told, left, why = "partly there", max(left, share), of_files
        elif told == "to be made":
            why = _why(node, then, anew)
        if told == "to be made":
            anew.add(node)
        found.append(Change(str(node), told, path, left, why))
    return found


def _changed_files(plan: Plan) -> tuple[str, float]:
    """What of the input files is not as the workspace ingested it, and its share of their bytes; empty: all is.

    The content of files is compared where all lie on this machine and have up to `COMPARED_BYTES`; else names only.
    """
    if not plan.storage.exists(CATALOG):
        return "", 0.0
    known = {(source.name, file.uri): file.content for source in plan.catalog.sources for file in source.files}
    files = {
        (source.name, _called(uri)): uri
        for source in plan.config.sources
        for path in source.paths
        for uri in list_files(path)
    }
    sizes = {key: bytes_of(uri) for key, uri in files.items()}
    is_near = all(Path(uri).expanduser().is_file() for uri in files.values())
    is_small = is_near and sum(sizes.values()) <= COMPARED_BYTES
    fresh = {key for key in files if key not in known}
    other = {key for key, uri in files.items() if key in known and is_small and file_digest(uri) != known[key]}
    names = {source.name for source in plan.config.sources}
    gone = {key for key in known if key not in files and key[0] in names}
    parts = {"new": fresh, "changed": other, "gone": gone}
    told = ", ".join(f"{len(keys)} {what}" for what, keys in parts.items() if keys)
    share = sum(sizes[key] for key in fresh | other) / max(1, sum(sizes.values()))
    return f"input files: {told}" if told else "", share


def _called(uri: str) -> str:
    """What the catalog calls a file."""
    if uri.startswith("datasets:"):
        folder = Path(uri.removeprefix("datasets:"))
        return f"datasets:{folder.absolute()}" if folder.is_dir() else redact(uri)
    return redact(uri if "://" in uri else str(Path(uri).expanduser().absolute()))


def _read_otherwise(plan: Plan, then: Plan) -> bool:
    """Whether the rows of files would be read in another way than by the last run."""
    ours, theirs = (
        [one.config.ingest.rows_per_shard, *(source.model_dump(exclude={"paths"}) for source in one.config.sources)]
        for one in (plan, then)
    )
    return ours != theirs


def former_plan(plan: Plan) -> Plan | None:
    """The plan of the configuration that the workspace was last run with; None where there was no run.

    Raises:
        UserError: It is not readable any more, as one of another version may be.
    """
    if not plan.storage.exists("config.yaml"):
        return None
    text = plan.storage.read("config.yaml").decode()
    return make_plan(parse_config(read_yaml(text, "the workspace's config.yaml")), plan.storage)


def _left(plan: Plan, node: Node) -> float:
    if not plan.storage.exists(CATALOG):
        return 1.0
    shards = len(plan.catalog.shards)
    done = sum(len(Artifact(plan.storage, f"{node.path}/{one}").entries()) for one in plan.catalog.sources_of())
    return 1 - min(1.0, done / max(1, shards))


def _why(node: Node, then: Plan | None, anew: set[Node]) -> str:
    if then is None:
        return "new"
    try:
        former = then.node(node.kind, node.name)
    except UserError:
        return "new: the last run had none of this name"
    if causes := [str(need.node) for need in node.needs if need.node in anew]:
        own = _own_differences(node, former)
        return "; ".join([*own, f"{', '.join(dict.fromkeys(causes))} made anew"])
    try:
        differences = list(_differences(_named(node.recipe), _named(former.recipe)))
    except (UserError, AssertionError):
        return "not made yet"
    return "; ".join(differences[:MAX_DIFFERENCES]) or "not made yet"


def _own_differences(node: Node, former: Node) -> list[str]:
    """What differs of its own record, where its recipe cannot be written before others are made."""
    ours, theirs = (
        one.spec.model_dump(mode="json") if hasattr(one.spec, "model_dump") else {} for one in (node, former)
    )
    return list(_differences(ours, theirs))[:MAX_DIFFERENCES]


def _named(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the fingerprints in the names of its upstream taken out: `columns/policy@…` is the same columns."""
    upstream = {re.sub(r"@[0-9a-f]{16}$", "", key): value for key, value in recipe.get("upstream", {}).items()}
    return {**recipe, "upstream": upstream}


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Where two plain values part, by dotted path; hashes are only called other ones."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys([*ours, *theirs]):
            inner = key if not path or path == "settings" else f"{path}.{key}"
            if key not in theirs:
                yield f"{inner}: {_shown(ours[key])} is new"
            elif key not in ours:
                yield f"{inner}: {_shown(theirs[key])} is gone"
            else:
                yield from _differences(ours[key], theirs[key], inner)
    elif ours != theirs:
        hashed = re.compile(r"^(models|upstream|corpus)\b")
        if hashed.match(path):
            yield f"{path} is another one" if path == "corpus" else f"{path.partition('.')[2]} is another one"
        else:
            yield f"{path}: {_shown(ours)}, was {_shown(theirs)}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
