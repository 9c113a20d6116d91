"""Damaged objects set aside, so that the stage that made them makes them again, and the proof that it did.

Nothing is computed here. A stage makes what is not there, so repairing is: away with the damaged object and with what
says that its artifact is complete, run again, and compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime

from prefsel.errors import DamagedError
from prefsel.workspace.entries import COPIES, LEDGER, PIECE, checked_entries, restore_piece
from prefsel.workspace.folders import SEAL, read_seal
from prefsel.workspace.manifest import SUMMARY
from prefsel.workspace.notes import DAMAGED, Note, left, notes, write_note
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import CORPUS, SEALED, SHARDED, Finding, root_of
from prefsel.workspace.withdrawals import WITHDRAWN, restore_withdrawal

NOT_REPEATED = ("reports", "runs")
"""What holds times: made again it is another one."""


def set_aside(storage: Storage, findings: Iterable[Finding]) -> list[Note]:
    """Move damaged objects below `damaged/`, and take away what says that their artifacts are complete.

    Returns:
        A note for each.
    """
    number = max((int(name) for name in storage.folders(DAMAGED) if name.isdecimal()), default=0)
    made = []
    for finding in findings:
        if finding.path.startswith(f"{WITHDRAWN}/"):  # never set aside: without it rows would come back
            restore_withdrawal(storage, finding.path)
            continue
        number += 1
        note = Note(
            number,
            finding.path,
            finding.problem,
            finding.detail,
            finding.content or _committed_content(storage, finding.path),
            datetime.now(UTC).isoformat(timespec="seconds"),
            "restored" if finding.problem == "added" else "open",
        )
        # The note first: a run that is killed between the two finds nothing at the path, and the note.
        write_note(storage, note)
        if storage.is_taken(finding.path):
            storage.move(finding.path, f"{DAMAGED}/{number:06d}/{finding.path.rsplit('/', 1)[-1]}")
        if not note.is_settled and not restore_piece(storage, finding.path):
            _begin_again(storage, note)
        made.append(note)
    return made


def _begin_again(storage: Storage, note: Note) -> None:
    """Take away the summary and the seal of an artifact of which something is gone: they say that it is complete."""
    kind = note.root.split("/")[0]
    if kind not in CORPUS:
        storage.delete(f"{note.root}/{SUMMARY}")
    if kind in SEALED:
        storage.delete(f"{note.root}/{SEAL}")
    if kind == "reports":  # a run whose page is gone is to be told once more
        storage.delete(f"runs/{note.root.removeprefix('reports/')}.json")
    if kind == "evaluations" and storage.exists(model := f"models/{note.root.removeprefix('evaluations/')}/{SEAL}"):
        # The margins of a model: made while it is trained.
        storage.delete(model)
        storage.delete(f"{model.removesuffix(SEAL)}{SUMMARY}")
    if note.problem == "duplicated":
        storage.delete_tree(note.path)


def settle(storage: Storage) -> list[Note]:
    """Compare what was made again since with what was committed; returns the notes whose state changed."""
    changed = []
    for note in notes(storage):
        state = note.state if note.is_settled else _state(storage, note)
        if state != note.state:
            changed.append(Note(**(asdict(note) | {"state": state})))
            write_note(storage, changed[-1])
    return changed


def unsettled(storage: Storage) -> list[Finding]:
    """The same as findings, each with the folder that says so: without it nobody asks any more."""
    return [
        Finding(note.problem, note.path, f"{note.became}; {DAMAGED}/{note.number:06d} says so until you remove it")
        for note in left(storage)
    ]


def _ledger_objects(storage: Storage, root: str) -> list[str]:
    """What lies in the ledgers of an artifact, attempts apart."""
    names = storage.files(root, recursive=True)
    return [name for name in names if f"/{LEDGER}/" in name and "/attempts/" not in name]


def _committed_content(storage: Storage, path: str) -> str:
    """The hash of what a ledger or a seal says was committed at `path`; empty where none says it."""
    folder, _, name = path.rpartition("/")
    if name.endswith(".parquet"):
        entry = checked_entries(storage, folder)[0].get(name.removesuffix(".parquet"))
        if entry is not None:
            return entry.content
    root = root_of(path)
    if root.split("/")[0] not in SEALED:
        return ""
    try:
        seal = read_seal(storage, root)
    except DamagedError:
        return ""
    file = (seal or {"files": {}})["files"].get(path.removeprefix(f"{root}/"))
    return file["blake2b"] if file else ""


def _state(storage: Storage, note: Note) -> str:
    """What became of an object that was set aside."""
    kind = note.path.split("/")[0]
    if kind in NOT_REPEATED:
        return "restored"  # the next finished run writes one of its own
    if note.path == note.root != kind and kind in (*SHARDED, *SEALED):
        is_there = storage.exists(f"{note.root}/{SUMMARY}") or bool(_ledger_objects(storage, note.root))
        return "restored" if is_there else "open"
    if f"/{LEDGER}/" in note.path and not note.path.endswith(SEAL):
        folder, _, name = note.path.partition(f"/{LEDGER}/")
        shard = name.removesuffix(".json").removeprefix(f"{COPIES}/").removeprefix(PIECE)  # of a piece the first one
        if storage.exists(note.path) or shard in checked_entries(storage, folder)[0]:
            return "restored"
        return "open" if storage.is_taken(f"{folder}/{shard}.parquet") else "extra"
    if "/_files/" in note.path and not storage.is_taken(note.path):
        return "extra"  # it says that a file needs no second reading, and nobody reads that file now
    if not storage.is_taken(note.path):
        return "open"
    if not note.content:
        return "restored"
    found = _committed_content(storage, note.path)
    return "open" if not found else "same" if found == note.content else "other"
