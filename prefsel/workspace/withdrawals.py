"""Rows taken back: what must not be in a workspace any more, named by ids and hashes, without any text.

    withdrawn/<id>.json        one withdrawal: what, when and why, what it took away, and which models saw it
    withdrawn/copy/<id>.json   the same once more

A record is written before anything is removed and says `begun` until all is: a withdrawal that was killed is finished
by the next command that writes. Records stay for ever, and ingest looks at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from prefsel.errors import DamagedError
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage

COPIES = "copy"
WITHDRAWN = "withdrawn"
"""Folder of the records, and the reason that their rows are counted under."""


@dataclass(frozen=True)
class Gone:
    """What was taken back, each as raw bytes of 16."""

    prompts: frozenset[bytes] = frozenset()
    completions: frozenset[bytes] = frozenset()
    pairs: frozenset[bytes] = frozenset()
    rows: frozenset[bytes] = frozenset()
    """blake2b-128 of quarantined rows as they were read."""

    def __bool__(self) -> bool:
        return any((self.prompts, self.completions, self.pairs, self.rows))

    def __or__(self, other: Gone) -> Gone:
        return Gone(
            self.prompts | other.prompts,
            self.completions | other.completions,
            self.pairs | other.pairs,
            self.rows | other.rows,
        )

    @cached_property
    def hex_ids(self) -> frozenset[str]:
        """Ids of prompts, completions and pairs as people see them."""
        return frozenset(one.hex() for one in (*self.prompts, *self.completions, *self.pairs))


@dataclass(frozen=True)
class Withdrawal:
    """One withdrawal; ids and hashes are 32 hex digits."""

    when: str
    why: str
    prompts: list[str]
    completions: list[str]
    pairs: list[str]
    rows: list[str]
    """Hashes of quarantined rows."""
    shards: list[str] = field(default_factory=list)
    """`<source>/<shard>` of the groups that held something of it."""
    quarantine: list[str] = field(default_factory=list)
    """`<source>/<shard>` of the quarantine that did."""
    files: list[str] = field(default_factory=list)
    """Other files of the workspace that did, such as exports."""
    models: list[str] = field(default_factory=list)
    """Models and tangents that saw, or may have seen, something of it."""
    removes_models: bool = False
    """Whether these models go too."""
    counts: dict[str, int] = field(default_factory=dict)
    state: str = "begun"
    """`begun`, or `done` when nothing of it is left."""

    @property
    def id(self) -> str:
        """16 hex digits; the same rows taken back again have the same."""
        return hash_hex(*self.prompts, "", *self.completions, "", *self.pairs, "", *self.rows)[:16]

    @property
    def gone(self) -> Gone:
        """What it takes back."""
        return Gone(*(frozenset(map(bytes.fromhex, many)) for many in self._ids))

    @property
    def _ids(self) -> Sequence[list[str]]:
        return self.prompts, self.completions, self.pairs, self.rows


def hex_sorted(ids: Iterable[bytes]) -> list[str]:
    """Ids as a record holds them."""
    return sorted(one.hex() for one in ids)


def write_withdrawal(storage: Storage, record: Withdrawal) -> None:
    """Keep a record, or its new state, and once more: nothing else knows what it says."""
    for folder in (f"{WITHDRAWN}/{COPIES}", WITHDRAWN):
        write_document(storage, f"{folder}/{record.id}.json", asdict(record), indent=1)


def read_withdrawals(storage: Storage) -> list[Withdrawal]:
    """Every record, in the order of their names.

    Raises:
        DamagedError: one is not what was written, nor is its copy; ingest must not go on without it.
    """
    names = {name.rsplit("/", 1)[-1] for name in storage.files(WITHDRAWN, recursive=True)}
    return [Withdrawal(**_read(storage, name)) for name in sorted(names)]


def _read(storage: Storage, name: str) -> dict[str, Any]:
    damage = None
    for folder in (WITHDRAWN, f"{WITHDRAWN}/{COPIES}"):
        try:
            if (found := find_document(storage, f"{folder}/{name}")) is not None:
                return dict(found)
        except DamagedError as error:
            damage = damage or error
    raise damage or storage.damaged(f"{WITHDRAWN}/{name}", "missing")


def restore_withdrawal(storage: Storage, path: str) -> bool:
    """Write a record that is damaged, or its copy, anew from the other one; returns whether that could be read."""
    try:
        write_withdrawal(storage, Withdrawal(**_read(storage, path.rsplit("/", 1)[-1])))
    except DamagedError:
        return False
    return True


def read_gone(storage: Storage) -> Gone:
    """Everything that was ever taken back from a workspace; errors as `read_withdrawals`."""
    gone = Gone()
    for record in read_withdrawals(storage):
        gone |= record.gone
    return gone
