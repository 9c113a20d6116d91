"""A shard's groups in windows, tokenised and packed by a thread that runs ahead of the model.

    groups ─ slices of 256 ─► [encode ─ pack] ─► Window, Window, …      two are ready, or on their way, at any time

Made when a shard is read, so that the first windows wait for the model and not the model for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from prefsel.models.chat import EncodedGroup, Encoder, Unconditional
from prefsel.models.packing import PackedBatch
from prefsel.models.padded import PaddedBatch

WINDOW_GROUPS = 256
"""Groups tokenised, packed and scored together: some twenty rows of 8 192 tokens, so one unfilled row costs little."""
AHEAD = 2
"""Windows in preparation or waiting, per shard."""

AnyEncoder = Encoder | Unconditional
Rows = Sequence[PackedBatch | PaddedBatch]


@dataclass(frozen=True)
class Window:
    """Some groups, ready for a model."""

    prompt_ids: list[bytes]
    groups: list[EncodedGroup]
    rows: Rows
    packing: Hashable
    """What the rows depend on besides the groups: whoever packs otherwise must pack again."""
    seconds: float
    """What tokenising and packing took."""


class Windows:
    """Iterates over the windows of a table; the first ones are begun at once."""

    def __init__(
        self,
        groups: pa.Table,
        encoder: AnyEncoder,
        pack: Callable[[list[EncodedGroup]], tuple[Rows, Hashable]],
        thread: Executor,
    ) -> None:
        """Begin with the first windows.

        Args:
            groups: A table of `schema.GROUPS`.
            encoder: Used by `thread` only: tokenizers are not safe to share.
            pack: Groups → rows, and what they depend on.
            thread: One worker, so that windows come in order.
        """
        self._groups, self._encoder, self._pack, self._thread = groups, encoder, pack, thread
        self._starts = iter(range(0, groups.num_rows, WINDOW_GROUPS))
        self._ahead: deque[Future[Window]] = deque()
        self._fill(AHEAD)

    def __iter__(self) -> Iterator[Window]:
        """Yields every window once; the next one is begun before."""
        while self._ahead:
            window = self._ahead.popleft().result()
            self._fill(1)
            yield window

    def _fill(self, count: int) -> None:
        for start in islice(self._starts, count):
            self._ahead.append(self._thread.submit(self._prepare, start))

    def _prepare(self, start: int) -> Window:
        started = time.perf_counter()
        window = self._groups.slice(start, WINDOW_GROUPS)
        prompts, completions = window["prompt"].to_pylist(), window["completions"].to_pylist()
        pairs = [(prompt, [c["messages"] for c in row]) for prompt, row in zip(prompts, completions)]
        encoded = self._encoder.encode_groups(pairs, strict=False)
        rows, packing = self._pack(encoded)
        seconds = time.perf_counter() - started
        return Window(window["prompt_id"].to_pylist(), encoded, rows, packing, seconds)
