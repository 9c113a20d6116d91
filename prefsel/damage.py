"""What a run does with damage that it meets: sets it aside, begins again, and says in the end what was made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prefsel.errors import DamagedError, IntegrityError
from prefsel.progress import Progress
from prefsel.workspace.repair import set_aside, settle
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import as_finding, check_under

Result = TypeVar("Result")


def until_whole(storage: Storage, progress: Progress, work: Callable[[], Result]) -> Result:
    """Do work that makes what is not there, again and again until nothing damaged is in its way.

    Args:
        storage: The workspace.
        progress: Where it is told.
        work: Finds what is committed, so that beginning again costs what was set aside.

    Raises:
        DamagedError: an object that was made again is damaged once more.
        IntegrityError: something was made again with other bytes than were committed.
    """
    met: set[str] = set()
    while True:
        try:
            result = work()
            break
        except DamagedError as error:
            if error.path in met:
                raise
            met.add(error.path)
            put_aside(storage, error, progress)
    tell_settled(storage, progress)
    return result


def put_aside(storage: Storage, error: DamagedError, progress: Progress) -> None:
    """Set aside what a stage found damaged, and whatever else of its artifact is: the next pass makes it again."""
    found = as_finding(error)
    others = [one for one in check_under(storage, found.root) if one.path != found.path]
    for note in set_aside(storage, [found, *others]):
        progress.line(f"damage    {note}")


def tell_settled(storage: Storage, progress: Progress) -> None:
    """Say what was made again.

    Raises:
        IntegrityError: something has other bytes now than were committed; what was made of those stays as it is.
    """
    changed = settle(storage)
    for note in changed:
        progress.line(f"repaired  {note}")
    if others := [note.path for note in changed if note.state == "other"]:
        raise IntegrityError(
            f"{', '.join(others)}: made again with other bytes than were committed, as other inputs, versions or "
            "hardware give. What was made of the former ones stays; remove its folders to have it made again"
        )
