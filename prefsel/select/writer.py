"""Kept rows, written: selection shards and, where one is wanted, the files of a dataset.

An output file is made by one task from consecutive shards, so that the number of files follows the rows kept and not
the shards of the corpus. Without a dataset only scores and ids are read. The numbers the report needs (strata, lengths,
score histogram of the kept) are counted while the rows are at hand and ride in the ledger of the selection shards; of
held-out pairs, which no rule selects, the lengths in that of the dataset's files.

Shape suffixes: N rows of a shard, K kept rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError
from prefsel.numbers.columns import id_words
from prefsel.numbers.histogram import histogram
from prefsel.numbers.ranges import WORD_BITS
from prefsel.pairs.card import dataset_card
from prefsel.pairs.export import exchanged, export_rows
from prefsel.pairs.reader import PairReader
from prefsel.pairs.rows import Rows
from prefsel.pairs.score_report import mean_lengths
from prefsel.pairs.score_shards import ScoreReader
from prefsel.schema import FLIPPED, MESSAGES, SELECTION, with_rest
from prefsel.select.close import ClosePairs, close_pairs
from prefsel.select.compose import CompiledRule, columns_of
from prefsel.select.evaluate import flipped, kept, stratum_names
from prefsel.select.percentiles import Percentiles
from prefsel.select.thresholds import Threshold, Thresholds
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.entries import Entry
from prefsel.workspace.folders import write_seal
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage, digest

ROWS_PER_FILE = 50_000
SHARDS_PER_FILE = 256
"""At most: a small share of many shards is still read in parallel."""


@dataclass(frozen=True)
class Decision:
    """What a rule decided about the corpus, as tasks need it."""

    reader: ScoreReader
    compiled: CompiledRule
    thresholds: tuple[Thresholds, ...]
    """Of every leaf, by number."""

    @property
    def columns(self) -> list[str]:
        """The scores that are read to apply it, its own first."""
        flips = () if self.compiled.flips is None else (self.compiled.flips,)
        return list(dict.fromkeys((self.compiled.score, *columns_of(self.compiled.keep), *flips)))

    @property
    def by(self) -> list[str]:
        """The columns of all strata."""
        return list(dict.fromkeys(name for leaf in self.compiled.leaves for name in leaf.by))


@dataclass(frozen=True)
class ShardCounts:
    """What a rule keeps of one shard."""

    kept: int
    dropped: dict[str, int]
    """Pairs that have the rule's score but lack another one it reads, by reason."""
    ends: dict[str, tuple[Threshold, Threshold]]
    """First and last kept row of every score that stands in an intersection with a budget."""


def count_kept(shard: ShardRef, decision: Decision) -> ShardCounts:
    """Count what is kept of a shard."""
    compiled = decision.compiled
    shown = [column for step in compiled.derived if step.how == "middle" for column in step.scores]
    ids = bool(shown) or any(one.needs_ids for one in decision.thresholds)
    rows = decision.reader.rows(shard, list(dict.fromkeys((*decision.columns, *shown))), ids=ids, by=decision.by)
    row_K = np.flatnonzero(kept(compiled.keep, decision.thresholds, rows))
    ends = {column: _first_and_last(rows, column, row_K) for column in shown if len(row_K)}
    return ShardCounts(len(row_K), _missing(shard, decision, rows), ends)


def count_close(shard: ShardRef, shared: tuple[Decision, tuple[int, ...]]) -> ClosePairs:
    """The pairs of a shard beside the thresholds of some leaves."""
    decision, numbers = shared
    rows = decision.reader.rows(shard, decision.columns, ids=True, by=decision.by)
    found = (close_pairs(leaf, decision.thresholds[leaf.number], rows) for leaf in decision.compiled.leaves)
    return ClosePairs.merge(one for number, one in enumerate(found) if number in numbers)


def _first_and_last(rows: Rows, column: str, row_K: np.ndarray) -> tuple[Threshold, Threshold]:
    """The first and the last of some rows under (score descending, pair_id ascending)."""
    assert rows.ids_NW is not None, "whoever asks for ends has read the pair_ids"
    ids_KW, score_K = rows.ids_NW[row_K].astype(np.uint64), rows.scores[column][row_K]
    order_K = np.lexsort((ids_KW[:, 1], ids_KW[:, 0], -score_K))
    first, last = (
        Threshold(float(score_K[at]), (int(ids_KW[at, 0]) << WORD_BITS) | int(ids_KW[at, 1]), True)
        for at in (order_K[0], order_K[-1])
    )
    return first, last


def ends_of(counts: Sequence[ShardCounts], column: str) -> tuple[Threshold, Threshold]:
    """The first and the last row kept of all shards; some row is kept."""
    ends = [one.ends[column] for one in counts if column in one.ends]

    def place(one: Threshold) -> tuple[float, int]:
        assert one.pair_id is not None
        return -one.score, one.pair_id

    return min((first for first, _ in ends), key=place), max((last for _, last in ends), key=place)


def _missing(shard: ShardRef, decision: Decision, rows: Rows) -> dict[str, int]:
    compiled = decision.compiled
    if compiled.keep.population == (compiled.score,):
        return {}
    is_there_N = np.zeros(rows.num_rows, bool)
    is_there_N[_all_or(rows.rows_with([compiled.score]))] = True
    is_there_N[_all_or(rows.rows_with(compiled.keep.population))] = False
    if not is_there_N.any():
        return {}
    reasons = decision.reader.reasons(shard, compiled.keep.population).filter(pa.array(is_there_N))
    return dict(sorted(Counter(reasons.to_pylist()).items()))


def _all_or(row_M: np.ndarray | None) -> np.ndarray | slice:
    return slice(None) if row_M is None else row_M


def plan_files(shards: Sequence[ShardRef], counts: Sequence[int]) -> list[list[ShardRef]]:
    """Consecutive shards that together give about `ROWS_PER_FILE` rows, and that one task can read."""
    files: list[list[ShardRef]] = [[]]
    rows = 0
    for shard, count in zip(shards, counts):
        if files[-1] and (rows + count > ROWS_PER_FILE or len(files[-1]) == SHARDS_PER_FILE):
            files.append([])
            rows = 0
        files[-1].append(shard)
        rows += count
    return [file for file in files if file]


def file_names(files: Sequence[Sequence[ShardRef]], counts: Mapping[ShardRef, int], split: str) -> list[str]:
    """`<split>-00000-of-N` for the files with rows; the others get a name that `datasets`, which opens none, skips."""
    has_rows = [any(counts[shard] for shard in file) for file in files]
    number, names = 0, []
    for position, is_full in enumerate(has_rows):
        names.append(f"{split}-{number:05d}-of-{sum(has_rows):05d}" if is_full else f"empty-{position:05d}")
        number += is_full
    return names


@dataclass(frozen=True)
class OutputFile:
    """One task's work: a file of the dataset, and the selection shards of the same rows."""

    name: str
    shards: tuple[ShardRef, ...]
    contents: tuple[str, ...]
    """Hash of the pairs of each shard."""

    @property
    def made_from(self) -> str:
        """What the file is made from."""
        return hash_hex(*self.contents)


@dataclass(frozen=True)
class KeptRows:
    """What is written of one shard."""

    row_K: np.ndarray
    """Positions of the kept pairs, ascending."""
    attached: dict[str, pa.Array]
    """Score, percentile and stratum, and which are flipped where the rule may turn labels; nothing of held-out
    pairs."""
    info: dict[str, Any]
    """`strata` and `lengths` for the report; of a rule also the `histogram`."""


@dataclass(frozen=True)
class SelectionWriter:
    """What a task needs to keep rows of a shard and to write them."""

    reader: PairReader
    dataset: str | None
    """Folder of the dataset; None: only the selection is written."""
    decision: Decision | None = None
    percentiles: Percentiles | None = None
    """Of the rule's score."""
    folder: str | None = None
    """Of the selection."""
    held_out: str | None = None
    """Instead of a rule: keep the pairs dropped for this reason."""
    has_rest: bool = False
    """Some message of the corpus holds more than role and content: then every file has the schema for it."""
    done: frozenset[str] = frozenset()
    """Keys of the shards whose selection is committed already."""

    def held_out_rows(self, shard: ShardRef, flat: pa.Table) -> KeptRows:
        """The held-out pairs of a shard."""
        row_K = np.flatnonzero(pc.equal(flat["dropped"], self.held_out).fill_null(False).to_numpy())
        return KeptRows(row_K, {}, _numbers(shard, row_K, flat["aspect"], self.reader.lengths(shard, flat)))

    def kept_rows(self, shard: ShardRef, pair_ids: pa.ChunkedArray) -> KeptRows:
        """The rows of a shard that the rule keeps, from its scores alone.

        Args:
            shard: which.
            pair_ids: of its pairs, which the scores must be of.

        Raises:
            IntegrityError: they are of others.
        """
        assert self.decision is not None
        assert self.percentiles is not None
        compiled, thresholds = self.decision.compiled, self.decision.thresholds
        by = [*self.decision.by, "aspect"]
        rows = self.decision.reader.rows(shard, self.decision.columns, ids=True, by=by, lengths=True)
        assert rows.ids_NW is not None
        assert rows.lengths is not None
        if not np.array_equal(rows.ids_NW.view(np.uint64), id_words(pair_ids).view(np.uint64)):  # as they lie: faster
            raise IntegrityError(f"{self.folder}: the scores of {shard.key} are not those of pairs/{shard.key}")
        row_K = np.flatnonzero(kept(compiled.keep, thresholds, rows))
        score_K = rows.scores[compiled.score][row_K]
        attached = {
            "score": pa.array(score_K),
            "percentile": pa.array(self.percentiles.of(score_K)),
            "stratum": stratum_names(compiled, thresholds, rows, row_K),
        }
        lengths = rows.lengths
        is_flipped_K = flipped(compiled, rows, row_K)
        if is_flipped_K is not None:
            attached[FLIPPED] = pa.array(is_flipped_K)
            is_flipped_N = np.zeros(rows.num_rows, bool)
            is_flipped_N[row_K] = is_flipped_K
            lengths = exchanged(is_flipped_N, *lengths)
        info = _numbers(shard, row_K, rows.texts["aspect"], lengths)
        info |= {} if is_flipped_K is None else {FLIPPED: int(is_flipped_K.sum())}
        return KeptRows(row_K, attached, info | {"histogram": histogram(score_K).to_text()})


def _numbers(
    shard: ShardRef, row_K: np.ndarray, aspects: pa.ChunkedArray, lengths: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    chosen_K, rejected_K = (length_N[row_K] for length_N in lengths)
    is_known_K = np.isfinite(chosen_K) & np.isfinite(rejected_K)
    counted = aspects.take(pa.array(row_K)).value_counts()
    names = [f"{shard.source} / {aspect}" if aspect else shard.source for aspect in counted.field("values").to_pylist()]
    strata = Counter[str]()
    for name, count in zip(names, counted.field("counts").to_pylist()):
        strata[name] += count
    return {
        "strata": dict(sorted(strata.items())),
        "lengths": {
            "count": int(is_known_K.sum()),
            "chosen": float(chosen_K[is_known_K].sum()),
            "rejected": float(rejected_K[is_known_K].sum()),
        },
    }


def write_file(file: OutputFile, writer: SelectionWriter) -> None:
    """Commit the selection shards of a file's rows, then the file of the dataset, as far as they are asked for."""
    if writer.dataset is None:
        for shard, content in zip(file.shards, file.contents):
            _write_selected(shard, content, writer)
        return
    artifact = Artifact(writer.reader.storage, f"{writer.dataset}/data")
    attempt = artifact.log_attempt(file.name)
    tables, infos = [], []
    for shard, content in zip(file.shards, file.contents):
        flat, pairs = writer.reader.flat(shard), writer.reader.pairs(shard)
        if writer.folder is None:
            found = writer.held_out_rows(shard, flat)
        else:
            found = _commit_selected(shard, content, writer, pairs)
        infos.append(found.info)
        rows = export_rows(found.row_K, pairs, writer.reader.groups(shard), flat, found.attached)
        tables.append(with_rest(rows) if writer.has_rest else rows)
    info = {"lengths": _added_lengths(infos)}
    artifact.commit(file.name, pa.concat_tables(tables), made_from=file.made_from, attempt=attempt, info=info)


def _write_selected(shard: ShardRef, content: str, writer: SelectionWriter) -> None:
    pairs = Artifact(writer.reader.storage, shard.pairs_path).read(shard.shard, ["pair_id", "prompt_id"])
    _commit_selected(shard, content, writer, pairs)


def _commit_selected(shard: ShardRef, made_from: str, writer: SelectionWriter, pairs: pa.Table) -> KeptRows:
    """Commit a selection shard: kept ids, in corpus order, with score, percentile, stratum and row in `pairs`."""
    if shard.key in writer.done:
        return writer.kept_rows(shard, pairs["pair_id"])
    artifact = Artifact(writer.reader.storage, f"{writer.folder}/{shard.source}")
    attempt = artifact.log_attempt(shard.shard)
    found = writer.kept_rows(shard, pairs["pair_id"])
    row_K = pa.array(found.row_K)
    ids = {name: pairs[name].take(row_K) for name in ("pair_id", "prompt_id")}
    schema = SELECTION.append(pa.field(FLIPPED, pa.bool_())) if FLIPPED in found.attached else SELECTION
    table = pa.table({**ids, **found.attached, "row": row_K}, schema=schema)
    artifact.commit(shard.shard, table, made_from=made_from, attempt=attempt, info=found.info, plain_numbers=True)
    return found


def _added_lengths(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The `lengths` of several pieces, added."""
    return {key: sum(info["lengths"][key] for info in infos) for key in ("count", "chosen", "rejected")}


def kept_lengths(entries: Iterable[Entry]) -> dict[str, float | None]:
    """Mean lengths of the kept completions."""
    sums = [entry.info["lengths"] for entry in entries]
    return mean_lengths([[one["count"], one["chosen"], one["rejected"]] for one in sums])


def seal_dataset(
    storage: Storage, dataset: str, name: str, split: str, parts: Sequence[Entry], facts: Mapping[str, Any]
) -> None:
    """Write the card of a dataset and seal it."""
    rows = sum(part.rows for part in parts)
    table = Artifact(storage, f"{dataset}/data").read(parts[0].shard)
    has_rest = table.schema.field("prompt").type != MESSAGES
    columns = table.column_names
    card = dataset_card(name=name, split=split, rows=rows, columns=columns, facts=facts, has_rest=has_rest).encode()
    storage.write(f"{dataset}/README.md", card)
    listed = {f"data/{part.shard}.parquet": {"bytes": part.bytes, "blake2b": part.content} for part in parts}
    listed["README.md"] = {"bytes": len(card), "blake2b": digest(card)}
    write_seal(storage, dataset, listed, {"rows": rows})
