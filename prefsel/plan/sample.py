"""A seeded sample of a corpus that nobody ingested yet, through the readers and windows of ingest; nothing is written.

    sources ─ files, their bytes ─┬─ few bytes: every window ──────────────┬─▶ counts of each window (`WindowRead`)
                                  └─ many: windows at random places ───────┘   └─▶ some groups, drawn at random

A window is what a shard of the run would be, so prompts that stand together are one group here as there. In a file of
plain lines a window begins anywhere; of a compressed or a columnar file only the first one is read, and that is said.
Duplicates across windows, and prompts of `exclude` sources, are not looked for: what a run drops for them is over.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from prefsel.config import Config, Ingest, Source, Split
from prefsel.display import redact
from prefsel.errors import PrefselError, UserError
from prefsel.ingest.compression import BrokenStream, compression_of, decompressed
from prefsel.ingest.hub import HubName, parse
from prefsel.ingest.identity import split_of
from prefsel.ingest.jsonl import read_jsonl
from prefsel.ingest.locations import bytes_of, is_dataset_name, open_random, plain_name
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.windows import Window, ingest_windows
from prefsel.models.writer import Messages
from prefsel.plan.survey import Estimate, Survey, WindowRead, over_sources
from prefsel.workspace.catalog import WITHOUT_PAIRS
from prefsel.workspace.parquet_bytes import to_bytes

READ_BYTES, PACKED = 128 << 20, 4
"""Bytes of a corpus up to which every window is read, in half a minute; compressed ones count so many times."""
HUB_ROWS = 4096
"""Rows that are fetched of a data set on the hub, whose size nobody knows before it is read."""
WINDOWS = 16
"""Windows read of each source of a larger corpus."""
WRITTEN_WINDOWS = 4
"""Windows of each source that are written, to nowhere, to see what a character takes in a workspace."""
GROUPS = 1000
"""Groups that every tokenizer is given."""


@dataclass(frozen=True)
class SampledGroup:
    """A group that is looked at closely."""

    prompt: Messages
    completions: list[Messages]
    pairs: list[tuple[int, int]]
    """Its eligible pairs, chosen and rejected as places among the completions."""


@dataclass(frozen=True)
class Sample:
    """What was seen of a corpus."""

    surveys: dict[str, Survey]
    """By source; those whose prompts alone are read have none."""
    groups: dict[str, list[SampledGroup]]
    """The sampled groups of each source, in the order of its survey."""
    bytes: float
    """Stored bytes of all sources."""
    notes: list[str] = field(default_factory=list)
    """What the numbers do not cover, a sentence each."""

    @property
    def every_group(self) -> list[SampledGroup]:
        """The sampled groups of all sources."""
        return [group for many in self.groups.values() for group in many]

    def counted(self, name: str) -> Estimate:
        """The total of a field of `WindowRead`, such as `num_groups`."""
        return over_sources([one.counted(lambda window: getattr(window, name)) for one in self.surveys.values()])

    def total(self, y: Sequence[float]) -> Estimate:
        """The total over the corpus of a number of every sampled group, in the order of `every_group`."""
        parts, start = [], 0
        for source, survey in self.surveys.items():
            end = start + len(self.groups[source])
            parts.append(survey.sampled(np.array(y[start:end], np.float64)))
            start = end
        return over_sources(parts)


def take_sample(
    config: Config, *, num_groups: int | None = GROUPS, seed: int = 0, read_bytes: int = READ_BYTES
) -> Sample:
    """Sample every source that has pairs.

    Args:
        config: The run.
        num_groups: Groups that are tokenised, over all sources by their bytes; None: all of the corpus, and every
            window is read whatever its size.
        seed: Of the draws.
        read_bytes: Bytes up to which every window is read.

    Raises:
        UserError: No source can be read; names the first and why.
    """
    sources = [source for source in config.sources if source.role not in WITHOUT_PAIRS]
    files: dict[str, list[tuple[str, int]]] = {}
    notes, refused = [], list[UserError]()
    for source in sources:
        try:
            files[source.name] = [(uri, bytes_of(uri)) for path in source.paths for uri in list_files(path)]
        except PrefselError as error:
            refused.append(UserError(f"sources.{source.name}: {error}"))
            notes.append(f"source {source.name} is not counted: {error}")
    sizes = {name: sum(size for _, size in of) for name, of in files.items()}
    plain = sum(size * (PACKED if plain_name(uri) != uri.lower() else 1) for of in files.values() for uri, size in of)
    reads_all = num_groups is None or plain <= read_bytes
    surveys: dict[str, Survey] = {}
    groups: dict[str, list[SampledGroup]] = {}
    for source in (one for one in sources if one.name in files):
        share = sizes[source.name] / max(1, sum(sizes.values()))
        wanted = None if num_groups is None else max(50, round(num_groups * share))
        draw = _Draw(wanted, random.Random(f"{seed} {source.name}"))
        reader = _Reader(source, config.ingest, config.split, draw)
        try:
            surveys[source.name] = reader.all(files[source.name]) if reads_all else reader.some(files[source.name])
        except PrefselError as error:
            refused.append(UserError(f"sources.{source.name}: {error}"))
            notes.append(f"source {source.name} is not counted: {error}")
            continue
        groups[source.name] = [group for _, _, group in draw.kept]
        notes += reader.notes
    if not surveys and refused:
        raise refused[0]
    return Sample(surveys, groups, float(sum(sizes.values())), notes)


class _Draw:
    """Groups drawn without replacement while they go by, each equally likely (Vitter's algorithm R)."""

    def __init__(self, wanted: int | None, rng: random.Random) -> None:
        self.wanted, self.rng, self.seen = wanted, rng, 0
        self.kept: list[tuple[int, float, SampledGroup]] = []

    def offer(self, window: int, characters: float, group: SampledGroup) -> None:
        """Keep a group that goes by, or not."""
        self.seen += 1
        if self.wanted is None or len(self.kept) < self.wanted:
            self.kept.append((window, characters, group))
        elif (at := self.rng.randrange(self.seen)) < self.wanted:
            self.kept[at] = (window, characters, group)


class _Reader:
    """Reads windows of one source, counts them, and hands groups to the draw."""

    def __init__(self, source: Source, ingest: Ingest, split: Split, draw: _Draw) -> None:
        self.source, self.ingest, self.split, self.draw = source, ingest, split, draw
        self.notes: list[str] = []
        self.windows: list[WindowRead] = []
        self._stored, self._written = 0, 0.0
        self._rows, self._unusable, self._first = 0, 0, ""
        self._max_row = int(ingest.max_row_mib * 2**20)

    def all(self, files: Sequence[tuple[str, int]]) -> Survey:
        """Every window; one that stands in the source twice counts once, as in a run."""
        seen: set[str] = set()
        for uri, size in files:
            rows = read_rows(uri, max_row_bytes=self._max_row)
            if is_dataset_name(uri) and isinstance(parse(uri), HubName):
                rows = islice(rows, HUB_ROWS)
                self.notes.append(f"source {self.source.name}: of {uri} only the first {HUB_ROWS:,} rows are counted")
            for number, window in enumerate(self._windows(uri, rows, self.ingest.rows_per_shard)):
                key = f"{window.digest[:16]}-{number}"
                if key not in seen:
                    seen.add(key)
                    self._take(window, float(size))
        return self._survey(float(sum(size for _, size in files)), is_read=True)

    def some(self, files: Sequence[tuple[str, int]]) -> Survey:
        """Some windows at random places."""
        rng, total = self.draw.rng, float(sum(size for _, size in files))
        starts: set[str] = set()
        for uri, size in rng.choices(files, [size for _, size in files], k=WINDOWS):
            if _is_lines(uri):
                rows = self._stretch(uri, size)
                self._take_rows(uri, rows, float(sum(len(row.raw) + 1 for row in rows)))
            elif uri not in starts:
                starts.add(uri)
                rows = list(islice(read_rows(uri, max_row_bytes=self._max_row), self.ingest.rows_per_shard))
                self._take_rows(uri, rows, size * _share_read(uri, rows, size))
        if starts:
            self.notes.append(
                f"source {self.source.name}: of files that are compressed or columnar only the first window was read; "
                "where rows differ along a file the interval is too narrow"
            )
        return self._survey(total, is_read=False)

    def _stretch(self, uri: str, size: int) -> list[Any]:
        """The rows of a file of lines that begin in a stretch at a random place, as long as a shard of its first rows.

        It may begin before the file does, so that the first rows are as likely as all others.
        """
        with open_random(uri) as file:
            head = bytes(file.read(1 << 18))
            length = min(int(self.ingest.rows_per_shard * len(head) / max(1, head.count(b"\n"))), READ_BYTES)
            start = int(self.draw.rng.uniform(-length, size))
            end = start + length
            file.seek(max(0, start - 1))  # a line that begins right at the start has its line feed before it
            text = bytes(file.read(end - max(0, start - 1)))
            while text and not text.endswith(b"\n") and (more := bytes(file.read(1 << 18))):
                line, found, _ = more.partition(b"\n")
                text += line + found
                if found:
                    break
        if start > 0:
            text = text.partition(b"\n")[2]
        return list(read_jsonl(iter([text]), max_row_bytes=self._max_row, broken="not_json"))

    def _take_rows(self, uri: str, rows: Sequence[Any], size: float) -> None:
        """Count rows as one window."""
        for window in self._windows(uri, iter(rows), len(rows)) if rows else ():
            self._take(window, size)

    def _windows(self, uri: str, rows: Iterator[Any], rows_per_shard: int) -> Iterator[Window]:
        return ingest_windows(
            rows,
            file=redact(uri),
            format=self.source.format,
            options=self.source.options,
            rows_per_shard=rows_per_shard,
            fields=self.source.map,
        )

    def _take(self, window: Window, size: float) -> None:
        """Count a window, and let its groups go by the draw."""
        number = len(self.windows)
        self._rows, self._unusable = self._rows + window.num_rows, self._unusable + window.num_quarantined
        self._first = self._first or next((f"{why}, {told}" for why, told in window.examples.items()), "")
        groups, pairs = window.groups.select(["prompt_id", "prompt", "completions"]), window.pairs
        prompts = groups["prompt_id"].to_pylist()
        parts = split_of(prompts, **self.split.model_dump())
        is_open = {one for one, part in zip(prompts, parts) if part == 0 and self.source.role == "train"}
        of_prompt: dict[bytes, list[tuple[int, int]]] = {}
        for prompt, chosen, rejected in zip(*(pairs[key].to_pylist() for key in ("prompt_id", "chosen", "rejected"))):
            if prompt in is_open:
                of_prompt.setdefault(prompt, []).append((chosen, rejected))
        characters, squares, completions = 0.0, 0.0, 0
        for row in groups.to_pylist():
            said = [one["messages"] for one in row["completions"]]
            own = float(sum(len(one["content"] or "") for many in (row["prompt"], *said) for one in many)) + 1
            characters, squares, completions = characters + own, squares + own**2, completions + len(said)
            self.draw.offer(number, own, SampledGroup(row["prompt"], said, of_prompt.get(row["prompt_id"], [])))
        eligible = sum(map(len, of_prompt.values()))
        if number < WRITTEN_WINDOWS:
            self._stored += len(to_bytes(window.groups)) + len(to_bytes(pairs))
            self._written += characters
        stored = round(characters * self._stored / max(1.0, self._written))
        self.windows.append(
            WindowRead(size, len(prompts), characters, squares, completions, pairs.num_rows, eligible, stored)
        )

    def _survey(self, size: float, *, is_read: bool) -> Survey:
        allowed = self.ingest.max_quarantine_fraction
        if self._unusable > allowed * self._rows:
            self.notes.append(
                f"source {self.source.name}: {self._unusable:,} of {self._rows:,} rows that were read cannot be used, "
                f"and a run stops above {allowed:.0%} (ingest.max_quarantine_fraction); first: {self._first}"
            )
        kept = self.draw.kept
        return Survey(
            self.windows,
            size,
            is_read,
            np.array([window for window, _, _ in kept], np.int64),
            np.array([characters for _, characters, _ in kept], np.float64),
        )


def _is_lines(uri: str) -> bool:
    """Whether a window of a file can begin anywhere: JSON lines, not compressed."""
    if is_dataset_name(uri) or not plain_name(uri).endswith((".jsonl", ".ndjson")):
        return False
    with open_random(uri) as file:
        return compression_of(bytes(file.read(8))) is None


def _share_read(uri: str, raw: Sequence[Any], size: int) -> float:
    """Which part of a file its first rows are: of Parquet by rows, else by bytes."""
    if plain_name(uri).endswith((".parquet", ".pq")):
        with open_random(uri) as file:
            return min(1.0, len(raw) / max(1, pq.ParquetFile(file).metadata.num_rows))
    return min(1.0, sum(len(row.raw) + 1 for row in raw) / _packing(uri) / max(1, size))


def _packing(uri: str) -> float:
    """Plain bytes that a stored one holds, by the first million of a file."""
    with open_random(uri) as file:
        head = bytes(file.read(1 << 20))
    if (compression := compression_of(head)) is None:
        return 1.0
    plain = 0
    with suppress(BrokenStream):  # a stream that is cut off gives all that it has first
        for piece in decompressed(io.BytesIO(head), compression):
            plain += len(piece)
    return max(1.0, plain / max(1, len(head)))
