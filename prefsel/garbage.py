"""`gc`: what a workspace holds and nothing needs, told with its reason and its size, and removed when asked to.

What is needed is what the configurations of finished runs, the last configuration, and published versions name: their
plans are made, as a run would make them. Where a plan cannot tell, because a model is gone or was not made, everything
of that kind and name is kept, and so is whatever was made of corpora that models answered.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from prefsel.config import Config
from prefsel.errors import DamagedError, PrefselError
from prefsel.mend import kept_configs, parsed
from prefsel.plan.derived import derived_scores
from prefsel.plan.node import Node
from prefsel.plan.nodes import all_nodes, make_plan, selection_rule
from prefsel.plan.plan import Plan
from prefsel.rules import parse_rule
from prefsel.select.compose import compile_rule
from prefsel.workspace.documents import find_document
from prefsel.workspace.entries import LEDGER
from prefsel.workspace.folders import SEAL
from prefsel.workspace.manifest import SUMMARY, load_summary
from prefsel.workspace.notes import DAMAGED, NOTE
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import verify

KINDS = ("eligible", "columns", "pair_columns", "scores", "selections", "datasets", "models", "tangents", "evaluations")
"""Folders of artifacts that plans name."""
MADE_KINDS = ("groups", "pairs", "quarantine", "prompts", "rewritten", "verdicts")
"""Folders that hold corpora which models answered, beside those of files."""
TEMPORARY = ".tmp-"
IN_USE_S = 3600.0
"""What was written later may be a run's that is at work, or about to commit it."""
ARTIFACT = re.compile(rf"(?:{'|'.join(KINDS)})/[^\s\"'/@]+@[0-9a-f]{{16}}")


@dataclass(frozen=True)
class Waste:
    """Something that can go."""

    why: str
    """`temporary`, `uncommitted`, `attempts`, `damaged` or `unnamed`."""
    path: str
    bytes: int
    changed: float
    """When it was written last, in seconds since 1970."""
    files: tuple[str, ...] = ()
    """What it is, where it is no whole folder."""


@dataclass(frozen=True)
class Found:
    """What a workspace holds."""

    waste: list[Waste]
    """What can go, the oldest first."""
    kept: dict[str, str] = field(default_factory=dict)
    """Artifact that may be needed, nobody knows → why it stays."""
    bytes: int = 0
    """Of the whole workspace."""


@dataclass
class Needed:
    """What plans name."""

    paths: set[str] = field(default_factory=set)
    unsure: dict[str, str] = field(default_factory=dict)
    """`<kind>/<name>@` of which nobody knows which one is needed → why."""
    answers: bool = False
    """Whether a configuration has models answer prompts."""


def find_waste(
    storage: Storage, *, older_than_days: float = 0, keep_bytes: int | None = None, damaged: bool = False
) -> Found:
    """What can go.

    Args:
        storage: The workspace.
        older_than_days: Of artifacts that nothing names, those that nothing was written to for so long.
        keep_bytes: Of these, the oldest until the workspace is not larger; None: all.
        damaged: Also what was set aside and is there again.
    """
    sizes, times = storage.sizes("", recursive=True), storage.modified("", recursive=True)
    old = {name for name in sizes if times[name] < time.time() - IN_USE_S}
    waste = [*_files("temporary", [name for name in old if _base(name).startswith(TEMPORARY)], sizes, times)]
    uncommitted = [one.path for one in verify(storage, quick=True).findings if one.is_harmless]
    waste += _files("uncommitted", [name for name in uncommitted if name in old], sizes, times)
    logs = [name for name in old if f"/{LEDGER}/attempts/" in name]
    for root in sorted({name.split(f"/{LEDGER}/")[0] for name in logs}):
        mine = tuple(name for name in logs if name.startswith(f"{root}/{LEDGER}/attempts/"))
        waste.append(
            Waste("attempts", root, sum(map(sizes.__getitem__, mine)), max(map(times.__getitem__, mine)), mine)
        )
    waste += _settled(storage, sizes, times) if damaged else []
    needed = named(storage)
    limit = time.time() - max(older_than_days * 86400, IN_USE_S)
    unnamed, kept = list[Waste](), dict[str, str]()
    for path in _artifacts(storage):
        why = _why_kept(storage, path, needed)
        mine = tuple(name for name in sizes if name.startswith(f"{path}/"))
        changed = max((times[name] for name in mine), default=0.0)
        if why:
            kept[path] = why
        elif why is None and changed < limit:
            unnamed.append(Waste("unnamed", path, sum(map(sizes.__getitem__, mine)), changed))
    unnamed.sort(key=lambda one: one.changed)
    total = sum(sizes.values())
    if keep_bytes is not None:
        left, some = total - sum(one.bytes for one in waste), []
        for one in unnamed:
            if left > keep_bytes:
                some.append(one)
                left -= one.bytes
        unnamed = some
    whole = tuple(f"{one.path}/" for one in unnamed)
    return Found([*(one for one in waste if not f"{one.path}/".startswith(whole)), *unnamed], kept, total)


def remove(storage: Storage, waste: Iterable[Waste]) -> int:
    """Remove what can go, first what says that it is complete: a kill leaves nothing half that looks whole.

    Returns:
        Bytes.
    """
    total = 0
    for one in waste:
        if one.why == "unnamed":
            for said in (SUMMARY, SEAL):
                storage.delete(f"{one.path}/{said}")
            for name in storage.files(one.path, recursive=True):  # ledgers before data
                if f"/{LEDGER}/" in name:
                    storage.delete(name)
            storage.delete_tree(one.path)
        for name in one.files:
            storage.delete(name)
        total += one.bytes
    return total


def named(storage: Storage) -> Needed:
    """What the kept configurations and published versions name."""
    needed = Needed()
    for name in _unreadable(storage):
        needed.unsure |= {f"{kind}/": f"the configuration in {name} cannot be read" for kind in (*KINDS, *MADE_KINDS)}
    for config, _ in kept_configs(storage):
        needed.answers |= bool(config.generate or config.selfplay or config.evaluate)
        _name_all(config, storage, needed)
    needed.paths |= set(_made_last(storage))
    for path in [path for path in needed.paths if path.startswith("models/")]:
        needed.paths.add(path.replace("models/", "evaluations/", 1))  # the margins of its held-out pairs
    for name in storage.files("published", recursive=True):
        if name.endswith(".json"):
            needed.paths |= set(ARTIFACT.findall(storage.read(name).decode(errors="replace")))
    for path in [path for path in needed.paths if path.startswith("selections/")]:
        needed.paths |= _dataset_of(storage, path)
    return needed


def _made_last(storage: Storage) -> Iterator[str]:
    """The artifacts of the newest run of every name: a refresh scores with its models, and compares with its
    selections, which no plan of the corpus as it is now names."""
    newest: dict[str, str] = {}
    for name in sorted(storage.files("runs"), key=lambda name: name.rsplit("-", 3)[1:3]):
        newest[name.rsplit("-", 3)[0]] = name
    for name in newest.values():
        try:
            manifest = find_document(storage, name)
        except DamagedError:
            continue  # told as unreadable
        yield from (one["path"] for one in (manifest or {}).get("artifacts", ()))


def _unreadable(storage: Storage) -> Iterator[str]:
    """Manifests, and the last configuration, of which nobody knows what they name."""
    for name in storage.files("runs"):
        try:
            manifest = find_document(storage, name)
        except DamagedError:
            yield name
            continue
        if isinstance(manifest, dict) and parsed(manifest.get("config_yaml", "")) is None:
            yield name
    if storage.exists("config.yaml") and parsed(storage.read("config.yaml").decode(errors="replace")) is None:
        yield "config.yaml"


def _name_all(config: Config, storage: Storage, needed: Needed) -> None:
    """Everything that one configuration names."""
    try:
        plan = make_plan(config, storage)
        nodes = all_nodes(plan)
    except PrefselError as error:
        needed.unsure |= {f"{kind}/": f"{config.name!r} cannot be planned: {error}" for kind in KINDS}
        return
    for node in nodes:
        try:
            needed.paths.add(node.path)
            needed.paths |= set(_derived(plan, node))
        except (PrefselError, AssertionError) as error:
            why = f"nobody knows which one {config.name!r} needs: {error or 'a selection is not made'}"
            needed.unsure[f"{node.folder}/{node.name}@"] = why
            if node.kind == "selection":  # scores that its rule makes are named after it
                needed.unsure[f"scores/{node.name}."] = why
                needed.unsure[f"datasets/{node.name}@"] = why


def _derived(plan: Plan, node: Node) -> Iterator[str]:
    """The scores that the rule of a selection makes, and its dataset."""
    if node.kind == "selection":
        compiled = compile_rule(parse_rule(selection_rule(plan, node)))
        yield from (one.folder for one in derived_scores(plan, node.name, compiled))
        yield plan.node("dataset", node.name).path


def _dataset_of(storage: Storage, selection: str) -> set[str]:
    try:
        report = load_summary(storage, selection)
    except DamagedError:
        return set()
    dataset = report.details.get("dataset") if report is not None else None
    return {dataset} if dataset else set()


def _why_kept(storage: Storage, path: str, needed: Needed) -> str | None:
    """Why an artifact that no plan names stays all the same; empty where one names it; None where it can go."""
    if path in needed.paths:
        return ""
    kind, _, name = path.partition("/")
    if kind == "reports":
        return "" if storage.exists(f"runs/{name}.json") else None
    if needed.answers and (kind in MADE_KINDS or _is_of_answers(storage, path)):
        return "a kept configuration has models answer prompts"
    return next((why for begin, why in needed.unsure.items() if path.startswith(begin)), None)


def _is_of_answers(storage: Storage, path: str) -> bool:
    """Whether an artifact was made of a corpus that models answered, or may have been."""
    kind = path.split("/")[0]
    if kind in ("models", "tangents", "datasets", "evaluations"):
        return True
    return any("@" in source for source in storage.folders(path))


def _artifacts(storage: Storage) -> Iterator[str]:
    """Every artifact that may be unnamed; the corpora of files never are."""
    for kind in (*KINDS, "reports", *MADE_KINDS):
        for name in storage.folders(kind):
            if "@" in name or kind == "reports":
                yield f"{kind}/{name}"


def _settled(storage: Storage, sizes: dict[str, int], times: dict[str, float]) -> Iterator[Waste]:
    """What was set aside and is there again, its notes included."""
    for number in storage.folders(DAMAGED):
        path = f"{DAMAGED}/{number}"
        try:
            note = find_document(storage, f"{path}/{NOTE}")
        except DamagedError:
            continue
        if note is not None and note.get("state") in ("same", "restored"):
            files = tuple(name for name in sizes if name.startswith(f"{path}/"))
            yield Waste("damaged", path, sum(sizes[one] for one in files), max(times[one] for one in files), files)


def _files(why: str, names: Iterable[str], sizes: dict[str, int], times: dict[str, float]) -> Iterator[Waste]:
    for name in sorted(names):
        yield Waste(why, name, sizes[name], times[name], (name,))


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def merged(waste: Iterable[Waste]) -> list[Waste]:
    """Lines for people: attempts of all artifacts as one."""
    lines, attempts = list[Waste](), list[Waste]()
    for one in waste:
        (attempts if one.why == "attempts" else lines).append(one)
    if attempts:
        number = sum(len(one.files) for one in attempts)
        total = sum(one.bytes for one in attempts)
        lines.append(replace(attempts[0], path=f"{number:,} logs of {len(attempts):,} ledgers", bytes=total))
    return lines
