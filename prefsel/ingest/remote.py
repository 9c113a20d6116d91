"""What a hub or an object store answers when it does not give a source → one message that says what to do.

out of reach · offline mode · gated · private · missing · the server's own fault
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from prefsel.display import redact
from prefsel.errors import PrefselError, StoreError, UserError

Row = TypeVar("Row")

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_LOGIN = "set HF_TOKEN, or log in with `hf auth login`"
_DENIED = ("ACCESS_DENIED", "ACCESS DENIED", "FORBIDDEN", "403")
_ABSENT = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "404")


@contextmanager
def reachable(uri: str) -> Iterator[None]:
    """Raise what the block's clients raise about `uri` as one known error.

    Raises:
        UserError: It is missing, private or gated, or offline mode is on: trying again cannot help.
        PrefselError: Its server could not be reached, or failed: trying again can help.
    """
    try:
        yield
    except StoreError as error:
        told = f"source: {redact(uri)!r}: "
        if error.may_pass:
            raise PrefselError(f"{told}its server could not be reached: {error}") from error
        raise UserError(told + str(error)) from error
    except PrefselError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and uri.startswith("hf://"):
            raise UserError(f"source: {redact(uri)!r} names nothing on the hub ({_first_line(error)})") from error
        if not isinstance(error, (OSError, *_http_errors())):
            raise
        raise _told(uri, error) from error


def reached(uri: str, rows: Iterator[Row]) -> Iterator[Row]:
    """`rows`, with errors of the connection that they come through as known errors."""
    with reachable(uri):
        yield from rows


def _http_errors() -> tuple[type[BaseException], ...]:
    """The base class of the HTTP client that the hub's library uses, whichever that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__


def _told(uri: str, error: BaseException) -> PrefselError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    what, causes = f"source: {redact(uri)!r}", list(_chain(error))
    text = " ".join(str(one) for one in causes)
    status = next((code for one in causes if (code := _status(one)) is not None), None)
    kinds = {type(one).__name__ for one in causes}
    if kinds & {"OfflineModeIsEnabled", "OfflineModeError"} or (status is None and _is_offline(uri)):
        names = " or ".join(name for name in OFFLINE if os.environ.get(name)) or "offline mode"
        return UserError(f"{what}: {names} is set, so the hub is not asked; unset it, or give local files")
    if isinstance(error, PermissionError) and "://" not in uri and not uri.startswith("datasets:"):
        return UserError(f"{what}: permission to read it is denied")
    if any(isinstance(one, GatedRepoError) for one in causes) or "is a gated" in text:
        return UserError(f"{what} is gated: accept its conditions on its page, then {_LOGIN}")
    if status in (401, 403) or any(word in text.upper() for word in _DENIED[:3]):
        if any(isinstance(one, RepositoryNotFoundError) for one in causes):
            return UserError(f"{what}: there is none of this name, or it is private; {_LOGIN}")
        return UserError(f"{what} is private, or the credentials do not allow reading it ({_first_line(error)})")
    if "://" not in uri and not uri.startswith("datasets:") and not isinstance(error, FileNotFoundError):
        return PrefselError(f"{what} cannot be read: {_first_line(error)}")
    is_absent = isinstance(error, FileNotFoundError) or any(word in text.upper() for word in _ABSENT[:3])
    if status == 404 or is_absent:
        return UserError(f"{what}: there is none of this name ({_first_line(error)})")
    if status is not None:
        return PrefselError(f"{what}: its server answers {status} ({_first_line(error)}); try again later")
    return PrefselError(
        f"{what}: its server could not be reached ({_first_line(error)}); try again, or give local files"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    layer: BaseException | None = error
    while layer is not None and id(layer) not in seen:
        yield layer
        seen.add(id(layer))
        layer = layer.__cause__ or layer.__context__


def _status(error: BaseException) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _is_offline(uri: str) -> bool:
    is_of_hub = uri.startswith(("datasets:", "hf://"))
    return is_of_hub and any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE)


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return redact(line if len(line) <= 200 else f"{line[:199]}…")
