"""The entries of a ledger: one object for each shard as it is committed, folded into few when there are many.

    _ledger/<shard>.json          one entry
    _ledger/all-<shard>.json      the entries of up to 1 024 shards, in the order of their names, from this one on
    _ledger/copy/all-<shard>.json the same once more: a piece that is damaged is read from there

An object of a shard overrides what a piece says of it. A ledger of 100 000 shards is 98 pieces; who wants to know of
one shard lists them and reads one.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

from prefsel.errors import DamagedError
from prefsel.workspace.documents import check_document, find_document, to_document
from prefsel.workspace.storage import THREADS, Storage

LEDGER = "_ledger"
PIECE_SHARDS = 1024
PIECE = "all-"
COPIES = "copy"
ATTEMPTS = "attempts"
"""Folder of who began which shard: one empty object each, in its name."""
SEAL_NAME = "files.json"
"""The seal of a folder, which lies in its ledger too, see `folders`."""
ALL = "all.json"
"""What earlier versions folded everything into."""
FOLDED_FROM = 64
"""Ledgers with fewer objects of one shard stay as they are."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """One ledger object."""

    shard: str
    rows: int
    bytes: int
    content: str
    """blake2b-128 of the data file, 32 hex digits."""
    input: str
    """Hash of what the shard was made from; the shard is done for exactly this input."""
    attempt: str
    checks: str = ""
    """Hashes of the footer and the column chunks of the data file, which readers compare; see `parquet_bytes`."""
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per numeric column: min, max, nulls."""
    info: dict[str, Any] = field(default_factory=dict)
    """What the stage adds: counts, drops by reason, histogram, counters, seconds."""


class Proof(NamedTuple):
    """What a reader compares the data of a shard with."""

    size: int
    checks: str
    content: str


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which looks through millions of rows again and again: a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_uncollected()
def entries_of(storage: Storage, path: str, expected: Iterable[str] = ()) -> dict[str, Entry]:
    """Every entry of the ledger of the artifact at `path`, by shard.

    Args:
        storage: The workspace.
        path: Of the artifact.
        expected: Shards that are asked for by name in a store whose listing lacks them: it may be behind.

    Raises:
        DamagedError: an object of it is not what was written.
    """
    objects, pieces = _listed(storage, path)
    entries: dict[str, Entry] = {}
    for rows in _each(storage, lambda name: _piece(storage, path, name), pieces):
        entries |= {row["shard"]: Entry(**row) for row in rows}
    for shard, row in zip(objects, _each(storage, lambda shard: _object(storage, path, shard), objects)):
        if row is not None:
            entries[shard] = Entry(**row)
    unlisted = [] if storage.is_local else [shard for shard in expected if shard not in entries]
    for shard, row in zip(unlisted, _each(storage, lambda shard: _object(storage, path, shard), unlisted)):
        if row is not None:
            entries[shard] = Entry(**row)
    return dict(sorted(entries.items()))


@_uncollected()
def checked_entries(storage: Storage, path: str) -> tuple[dict[str, Entry], list[DamagedError]]:
    """Every entry that can be read, and what is wrong with the objects of the ledger, copies included."""
    objects, pieces = _listed(storage, path)
    damage: list[DamagedError] = []

    def read(name: str) -> list[dict[str, Any]]:
        """The rows of a piece; none where they cannot be read."""
        try:
            found = find_document(storage, f"{path}/{LEDGER}/{name}")
        except DamagedError as error:
            damage.append(error)
            return []
        return [] if found is None else found["shards"] if isinstance(found, dict) else found

    rows: list[dict[str, Any]] = []
    for name in pieces:
        places = (name, f"{COPIES}/{name}")
        try:
            is_whole = check_document(storage, f"{path}/{LEDGER}/{places[1]}")
        except DamagedError as error:
            damage.append(error)
            is_whole = False
        found = read(name) or (read(places[1]) if is_whole else [])
        rows += found
        if name == ALL or {row["shard"] for row in found} <= set(objects):
            continue  # folding was killed before it was done; it takes nothing away before
        lost = [place for place in places if not storage.exists(f"{path}/{LEDGER}/{place}")]
        damage += [storage.damaged(f"{path}/{LEDGER}/{place}", "missing", "its copy is there") for place in lost]
    for shard in objects:
        try:
            row = _object(storage, path, shard)
        except DamagedError as error:
            damage.append(error)
            continue
        rows += [] if row is None else [row]
    return {row["shard"]: Entry(**row) for row in rows}, damage


def restore_piece(storage: Storage, name: str) -> bool:
    """Write a folded object of a ledger anew from its other copy.

    Args:
        storage: The workspace.
        name: Path of the object that is gone, either of the two.

    Returns:
        Whether it is there again: it is such an object, and the other one is as it was written.
    """
    folder, _, file = name.rpartition("/")
    if not file.startswith(PIECE) or LEDGER not in folder.split("/"):
        return False
    is_copy = folder.endswith(f"/{COPIES}")
    other = f"{folder.removesuffix(f'/{COPIES}')}/{file}" if is_copy else f"{folder}/{COPIES}/{file}"
    try:
        found = find_document(storage, other)
    except DamagedError:
        return False
    if found is not None:
        storage.write(name, to_document(name, found))
    return found is not None


def proof_of(storage: Storage, path: str, shard: str, *, anew: bool = False) -> Proof | None:
    """What the ledger of the artifact at `path` says of the data of a shard; None where it says nothing.

    Args:
        storage: The workspace.
        path: Of the artifact.
        shard: Of it.
        anew: Read what this process may have read before.

    Raises:
        DamagedError: the object that says it is not what was written.
    """
    key = (storage.uri, path)
    known = None if anew else _KNOWN.get(key)
    if known is None:
        known = _KNOWN[key] = _Known(*_listed(storage, path), {})
        while len(_KNOWN) > MAX_KNOWN:
            _KNOWN.popitem(last=False)
    if shard in known.proofs:
        return known.proofs[shard]
    rows: Iterable[dict[str, Any]] = ()
    if shard in known.objects or (anew and not storage.is_local and storage.exists(f"{path}/{LEDGER}/{shard}.json")):
        row = _object(storage, path, shard)
        rows = [] if row is None else [row]
    elif known.pieces:
        firsts = [_first_shard(name) for name in known.pieces]
        rows = _piece(storage, path, known.pieces[max(0, bisect_right(firsts, shard) - 1)])
    overridden = set(known.objects) - {shard}
    found = {row["shard"]: Proof(row["bytes"], row.get("checks", ""), row["content"]) for row in rows}
    known.proofs.update({name: proof for name, proof in found.items() if name not in overridden})
    if anew and shard not in known.proofs and (entry := entries_of(storage, path).get(shard)) is not None:
        # Pieces overlap where folding was killed; all of them together are complete.
        known.proofs[shard] = Proof(entry.bytes, entry.checks, entry.content)
    return known.proofs.get(shard)


def compact(storage: Storage, path: str, *, at_least: int = FOLDED_FROM) -> None:
    """Fold the ledger objects of an artifact into pieces when there are `at_least` of them.

    Only the driver calls this, when no worker is committing. Pieces are written before anything is deleted, old pieces
    go before the objects that override them: a kill in between loses nothing.
    """
    objects, old = _listed(storage, path)
    if len(objects) < at_least:
        return
    rows = [asdict(entry) for entry in entries_of(storage, path).values()]
    pieces = [rows[start : start + PIECE_SHARDS] for start in range(0, len(rows), PIECE_SHARDS)]
    names = [f"{PIECE}{piece[0]['shard']}.json" for piece in pieces]
    if any(name not in old and storage.exists(f"{path}/{LEDGER}/{name}") for name in names):
        return  # the listing is behind: what that piece holds is not among the rows
    places = [f"{path}/{LEDGER}/", f"{path}/{LEDGER}/{COPIES}/"]
    written = [(f"{place}{name}", {"shards": piece}) for name, piece in zip(names, pieces) for place in places]
    stale = [f"{place}{name}" for name in old if name not in names for place in places]
    for _ in _each(storage, lambda one: storage.write(one[0], to_document(*one)), written):
        pass
    storage.delete_many(stale)
    storage.delete_many([f"{places[0]}{shard}.json" for shard in objects])
    # An entry names the attempt that committed it: the logs that are left are of those that did not.
    storage.delete_many([f"{places[0]}{ATTEMPTS}/{row['shard']}.{row['attempt']}" for row in rows])


def _each(storage: Storage, call: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`map`, several at a time in an object store: a request to one is mostly waiting.

    In a directory threads only wait for each other: 140 instead of 46 microseconds an object.
    """
    if storage.is_local:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        yield from pool.map(call, items)


def refold(storage: Storage, path: str) -> None:
    """Fold a ledger anew where pieces of it are overridden: what they said before is then nowhere any more."""
    objects, pieces = _listed(storage, path)
    if objects and pieces:
        compact(storage, path, at_least=1)


@dataclass
class _Known:
    """What this process has read of a ledger."""

    objects: list[str]
    """Shards with an object of their own."""
    pieces: list[str]
    proofs: dict[str, Proof]


_KNOWN: OrderedDict[tuple[str, str], _Known] = OrderedDict()
MAX_KNOWN = 16
"""Ledgers that a process remembers: about 30 MB each at 100 000 shards."""


def _listed(storage: Storage, path: str) -> tuple[list[str], list[str]]:
    """Shards with an object of their own, and names of pieces, those of old versions first."""
    files = (name.rsplit("/", 1)[-1] for name in storage.files(f"{path}/{LEDGER}"))
    names = [name for name in files if name.endswith(".json") and name != SEAL_NAME]
    copies = [name.rsplit("/", 1)[-1] for name in storage.files(f"{path}/{LEDGER}/{COPIES}")]
    pieces = {name for name in (*names, *copies) if name == ALL or name.startswith(PIECE)}
    objects = [name.removesuffix(".json") for name in names if name not in pieces]
    return objects, sorted(pieces, key=_first_shard)


def _first_shard(piece: str) -> str:
    return "" if piece == ALL else piece.removeprefix(PIECE).removesuffix(".json")


def _object(storage: Storage, path: str, shard: str) -> dict[str, Any] | None:
    """The entry of a shard as JSON holds it; None where it was folded away meanwhile."""
    name = f"{path}/{LEDGER}/{shard}.json"
    row = find_document(storage, name)
    if row is not None and (not isinstance(row, dict) or row.get("shard") != shard):
        raise storage.damaged(name, "altered", f"it is no entry of {shard}")
    return row


def _piece(storage: Storage, path: str, name: str) -> list[dict[str, Any]]:
    """The entries of a piece as JSON holds them, of its copy where it is gone or damaged."""
    try:
        found = find_document(storage, f"{path}/{LEDGER}/{name}")
    except DamagedError:
        found = find_document(storage, f"{path}/{LEDGER}/{COPIES}/{name}")
        if found is None:
            raise
    if found is None:
        found = find_document(storage, f"{path}/{LEDGER}/{COPIES}/{name}")
    if found is None:
        return []
    return found["shards"] if isinstance(found, dict) else found
