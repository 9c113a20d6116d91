"""Ray tasks over many small items, a bounded number at a time: the arithmetic stages' only way to use the cluster.

Scoring goes through Ray Data with actor pools. The passes over numbers (eligibility, statistics, rounds of counting)
are tens of milliseconds a shard, many rounds in a row; starting a Ray Data execution costs half a second, a task under
1 ms.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.experimental import internal_kv

from prefsel.errors import PrefselError, known_error
from prefsel.plugins.failures import prepared
from prefsel.progress import Counter

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_shards(
    function: Callable[..., Result],
    items: Sequence[Item],
    *,
    shared: Any = None,
    counter: Counter | None = None,
    num_cpus: float = 1.0,
    per_task: int = 1,
) -> list[Result]:
    """`[function(item, shared) for item in items]` on the cluster, results in the order of `items`.

    Args:
        function: importable by workers; returns little (ids and numbers), commits the rest itself.
        items: what the function is called with.
        shared: what all tasks need; travels once per node.
        counter: advanced by one per finished item.
        num_cpus: CPUs a task reserves.
        per_task: items that one task handles, one after the other, where there are so many that all CPUs have work.

    Raises:
        PrefselError: as raised by a task, unwrapped.
    """
    if not items:
        return []
    num_cpus_there = int(ray.cluster_resources().get("CPU", 1))
    size = max(1, min(per_task, len(items) // (4 * num_cpus_there)))
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    remote = ray.remote(num_cpus=num_cpus)(prepared(_each))
    halt = Halt()
    reference = ray.put((function, shared, halt))
    limit = max(4, 4 * num_cpus_there)
    results: dict[int, list[Result]] = {}
    running: dict[Any, int] = {}
    waiting = iter(enumerate(batches))
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < limit:
            number, batch = next(waiting, (-1, None))
            if number < 0:
                exhausted = True
            else:
                running[remote.remote(batch, reference)] = number
        if not running:
            break
        ready, _ = ray.wait(list(running), num_returns=1)
        for done in ready:
            number = running.pop(done)
            with halt.draining(running):
                results[number] = unwrap(done)
            if counter is not None:
                counter.advance(len(batches[number]))
    return [result for number in range(len(batches)) for result in results[number]]


def _each(items: Sequence[Any], work: tuple[Callable[..., Result], Any, Halt]) -> list[Result]:
    function, shared, halt = work
    halt.check()
    return [function(item, shared) for item in items]


class Halted(Exception):
    """A task was not begun, or not ended, because another one of its pass had failed."""


class Halt:
    """Lets the tasks of one pass know, on whatever node they run, that one of them failed.

    Cancelling them instead can end the driver: a task that is on its way to a worker while Ray cancels it fails one of
    Ray's own assertions, and a failed task is just what sets a worker free for the next one.
    """

    def __init__(self) -> None:
        """A pass in which nothing failed."""
        self._key = f"prefsel-halt-{uuid.uuid4().hex}".encode()

    def check(self) -> None:
        """Call it in a task, before every part of its work; about 0.3 ms.

        Raises:
            Halted: A task of the pass failed.
        """
        if internal_kv._internal_kv_exists(self._key):
            raise Halted

    @contextmanager
    def draining(self, tasks: Iterable[Any]) -> Iterator[None]:
        """When the block fails, end the tasks whose results nobody will read, and wait until they have ended.

        An error that is never read would be printed with its traceback.

        Args:
            tasks: As they are at the time of the failure: the reference of each, or those of all its values, of which
                a task that went well has only the first one fetched.
        """
        try:
            yield
        except Exception:
            with suppress(Exception):  # a cluster that is gone: the error that is on its way says more
                internal_kv._internal_kv_put(self._key, b"")
                for task in list(tasks):
                    _read_errors(task if isinstance(task, list) else [task])
                internal_kv._internal_kv_del(self._key)
            raise


def _read_errors(values: Sequence[Any]) -> None:
    """Wait for a task; of one that failed every value is an error, and each of them must be read."""
    first, *others = values
    with suppress(Exception):
        ray.get(first)
        others = []
    for reference in others:
        with suppress(Exception):
            ray.get(reference)


def unwrap(reference: Any) -> Any:
    """`ray.get` that raises the task's own `PrefselError` instead of Ray's wrapping of it."""
    with known_errors():
        return ray.get(reference)


@contextmanager
def known_errors() -> Iterator[None]:
    """Raise the known error that the block failed with, wherever it was raised, without the layers around it.

    Raises:
        PrefselError: As a task, an actor or a worker raised it; what the operating system refused them; or that Ray
            lost one of them (a dead actor excepted, which its pool answers).
    """
    try:
        yield
    except Exception as error:
        known = known_error(error)
        if known is None and isinstance(error, RayError) and not isinstance(error, RayTaskError | RayActorError):
            known = PrefselError(f"Ray: {type(error).__name__}: {error}")
        if known is None or known is error:
            raise
        raise known from None
