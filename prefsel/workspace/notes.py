"""Notes of what was set aside because it was damaged.

damaged/<number>/note.json      what was wrong, where, and the hash of what was committed there
damaged/<number>/<file>         the object as it was found; nothing where it was gone
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from prefsel.errors import DamagedError
from prefsel.workspace.documents import find_document, write_document
from prefsel.workspace.storage import Storage

DAMAGED = "damaged"
NOTE = "note.json"


@dataclass(frozen=True)
class Note:
    """What is known of an object that was set aside."""

    number: int
    path: str
    problem: str
    detail: str
    content: str
    """Hash of the bytes that were committed there; empty where nobody knows it."""
    when: str
    state: str = "open"
    """`open` until it is there again: `same` bytes, `restored` (not known what they were), or `other` bytes; `extra`
    where nothing belongs to it, and nobody makes it again."""

    @property
    def root(self) -> str:
        """The artifact it is of: kind and name."""
        return "/".join(self.path.split("/")[:2])

    @property
    def is_settled(self) -> bool:
        """Whether it is there again and nothing is left to say."""
        return self.state in ("same", "restored", "extra")

    @property
    def became(self) -> str:
        """What became of it, for people."""
        told = {
            "open": "set aside, not made again yet",
            "same": "made again, the same bytes",
            "restored": "made again",
            "other": "made again, with other bytes than were committed",
            "extra": "set aside, nothing belongs to it",
        }
        return told[self.state] if self.problem != "added" else "set aside"

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}{f' ({self.detail})' if self.detail else ''}; {self.became}"


def notes(storage: Storage) -> Iterator[Note]:
    """Every note, in order; one that is damaged itself is passed over."""
    for name in storage.files(DAMAGED, recursive=True):
        if not name.endswith(f"/{NOTE}"):
            continue
        try:
            found = find_document(storage, name)
        except DamagedError:
            continue
        if found is not None:
            yield Note(**found)


def write_note(storage: Storage, note: Note) -> None:
    """Keep a note, or its new state."""
    write_document(storage, f"{DAMAGED}/{note.number:06d}/{NOTE}", asdict(note), indent=1)


def left(storage: Storage) -> list[Note]:
    """The notes of what is not there again as it was committed."""
    return [note for note in notes(storage) if not note.is_settled]
