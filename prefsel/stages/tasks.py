"""Ray tasks over many small items, a bounded number at a time: the arithmetic stages' only way to use the cluster.

Scoring goes through Ray Data with actor pools. The passes over numbers (eligibility, statistics, rounds of counting)
take tens of milliseconds a shard, many rounds in a row; a Ray Data execution starts in half a second, a task in 1 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from prefsel.errors import PrefselError
from prefsel.progress import Counter

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_shards(
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
    remote = ray.remote(num_cpus=num_cpus)(_each)
    reference = ray.put((function, shared))
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
            try:
                results[number] = unwrap(done)
            except Exception:
                _drain(list(running))
                raise
            if counter is not None:
                counter.advance(len(batches[number]))
    return [result for number in range(len(batches)) for result in results[number]]


def _each(items: Sequence[Any], work: tuple[Callable[..., Result], Any]) -> list[Result]:
    function, shared = work
    return [function(item, shared) for item in items]


def _drain(references: list[Any]) -> None:
    """Stop tasks whose results nobody will read; an error that is never read would be printed with its traceback."""
    for reference in references:
        ray.cancel(reference)
    for reference in references:
        with suppress(Exception):
            ray.get(reference)


def unwrap(reference: Any) -> Any:
    """`ray.get` that raises the task's own `PrefselError` instead of Ray's wrapping of it."""
    with known_errors():
        return ray.get(reference)


@contextmanager
def known_errors() -> Iterator[None]:
    """Raise the `PrefselError` that a task of the block failed with, without the layers Ray puts around it."""
    try:
        yield
    except RayError as error:
        layer: BaseException | None = error
        while layer is not None and not isinstance(layer, PrefselError):
            layer = getattr(layer, "cause", None) or layer.__cause__
        # Ray's wrapper is an instance of the cause's class too; what is wanted is the cause itself.
        while isinstance(layer, RayTaskError):
            layer = layer.cause
        if isinstance(layer, PrefselError):
            raise layer from None
        raise
