"""Which failures of an object store pass by themselves, how long they are waited for, and what is said of the others.

Everything that talks to a store asks here: the file system of a workspace (`stores.py`), and reads of what was
committed, which are repeated before anything is called damaged.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from prefsel.display import redact
from prefsel.errors import DamagedError, StoreError, UserError

Result = TypeVar("Result")

ATTEMPTS = {"passing": 10, "unreached": 5}
"""Where one request in five fails, one of ten million fails ten times; a store that nobody reaches may be misnamed."""
GIVE_UP_S = 60.0
"""No attempt begins later than this after the first one."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0

SIGNS = {
    "denied": (
        *("ACCESS_DENIED", "INVALID_ACCESS_KEY", "INVALID_CLIENT_TOKEN", "SIGNATURE_DOES_NOT_MATCH", "EXPIREDTOKEN"),
        *("EXPIRED_TOKEN", "INVALIDTOKEN", "UNRECOGNIZED_CLIENT", "NO_CREDENTIALS", "PERMISSION_DENIED"),
        *("UNAUTHENTICATED", "HTTP STATUS 401", "HTTP STATUS 403"),
    ),
    "absent": ("NO_SUCH_BUCKET", "NOSUCHBUCKET", "BUCKET NOT FOUND"),
    # No such host, and nobody listening.
    "unreached": ("CURLCODE: 6,", "CURLCODE: 7,"),
    "passing": (
        *("SLOW_DOWN", "SLOWDOWN", "THROTTL", "TOOMANYREQUESTS", "RESOURCE_EXHAUSTED", "REQUEST_TIMEOUT"),
        *("INTERNAL_FAILURE", "INTERNALERROR", "SERVICE_UNAVAILABLE", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"),
        *("NETWORK_CONNECTION", "CURLCODE", "CONNECTION RESET", "TIMED OUT"),
        "XML_ERROR",  # a listing that was cut
        *(f"HTTP STATUS {status}" for status in (408, 425, 429, 500, 502, 503, 504)),
    ),
}
"""What the clients of S3 and Google say, in capitals, by kind of failure; the first kind that is met counts."""
ADVICE = {
    "denied": "the credentials do not allow it, or have expired; give others by the environment",
    "absent": "there is no such bucket; make it, or correct the URI",
    "other": "the store refuses it",
}
"""What to do about a failure that does not pass, by its kind."""


def kind_of(error: BaseException) -> str:
    """A key of `ATTEMPTS` or of `ADVICE`: which kind of failure of a store an error is, by what its client says."""
    text = str(error).upper()
    for kind, words in SIGNS.items():
        if any(word in text for word in words):
            return kind
    return "passing" if isinstance(error, ConnectionError | TimeoutError) else "other"


def patiently(what: str, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns; it is called again while its failure is one that passes, with waits that grow.

    The waits are drawn anew each time, so that workers which a store sent away do not come back together.

    Args:
        what: The operation and the object, for the message, without credentials: `reading s3://bucket/w/catalog.json`.
        attempt: May be repeated whatever came of it.

    Raises:
        StoreError: It failed too often, or its failure does not pass.
        FileNotFoundError: As `attempt` raised it: whether that is a failure only the caller knows.
    """
    begun, count = time.monotonic(), 0
    while True:
        count += 1
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except OSError as error:
            kind, seconds = kind_of(error), time.monotonic() - begun
            wait = backoff(count)
            if kind not in ATTEMPTS:
                raise StoreError(f"{what}: {ADVICE[kind]} ({_told(error)}); {_KEPT}", kind) from None
            if count >= ATTEMPTS[kind] or seconds + wait > GIVE_UP_S:
                tried = f"failed {count} times in {seconds:.0f} s"
                raise StoreError(f"{what}: {tried} ({_told(error)}); {_KEPT}", kind) from None
        time.sleep(wait)


@contextmanager
def as_input(field: str) -> Iterator[None]:
    """Raise what a store refuses for good as a mistake of the input: where nothing was begun, it is one.

    Raises:
        UserError: begins with the name of the field.
        StoreError: as it was raised, where trying again later may help.
    """
    try:
        yield
    except StoreError as error:
        if error.may_pass:
            raise
        raise UserError(f"{field}: {error}") from None


def backoff(count: int) -> float:
    """Seconds to wait after the failure with this number: up to twice as many as before, drawn evenly."""
    return random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (count - 1)))


READS = 5
"""Of what seems damaged, before it is called so."""


def confirmed(is_local: bool, read: Callable[[], Result]) -> Result:
    """What `read` returns; in an object store it is called again before its DamagedError is believed.

    A store may cut an answer and state the length of what is left, of which its client makes a file of the right
    length with an end that nobody wrote; and a listing or a cache may not know yet what was just written.
    """
    for count in range(1, READS):
        try:
            return read()
        except DamagedError:
            if is_local:
                raise
            time.sleep(backoff(count))
    return read()


_KEPT = "what is committed is kept, so run again once that is mended"


def _told(error: BaseException) -> str:
    """What the client says, in one line, without the object that the message names anyway."""
    line = " ".join(str(error).split())
    found = re.search(r"AWS Error .*|google::cloud.*", line)
    line = found[0] if found else line
    return redact(line if len(line) <= 200 else f"{line[:199]}…")
