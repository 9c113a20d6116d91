"""The training table, its tokens, and which pairs make up optimizer step t on every worker.

The order of the pairs depends on (seed, epoch) alone and a global batch is a slice of it, so the number of pairs
consumed says everything about where a run stands: no worker count, micro-batch size or token budget enters.

Shapes: N pairs; B pairs of a global batch.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.config import DpoOptions
from prefsel.errors import NonFiniteError, UserError, invalid
from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.train.losses import LOSSES

TEXT = ("pair_id", "prompt", "chosen", "rejected")
REFERENCE = ("reference_logps_chosen", "reference_logps_rejected")
OPTIONAL = ("preference_divergence", "aspect", "score")
"""Read where the loss or the order needs them: PD of a pair, the aspect it is labelled with, the selection's score."""
NUM_OFFENDERS_SHOWN = 5

Indices = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
Order = Literal["shuffled", "given", "score"]


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs with the log-probs their reference model gave them; the reference itself is never loaded to train."""

    table: pa.Table
    """Columns `TEXT`: pair_id as hex strings, messages as lists of {role, content}; and of `REFERENCE` and `OPTIONAL`
    those that were given."""
    reference_logps_N2: Numbers | None
    """Stored reference log-probs, chosen then rejected, nats, summed over the response; None: the table has none."""

    @classmethod
    def from_table(cls, table: pa.Table) -> TrainingPairs:
        """Check and adopt a table that has at least `TEXT`; pair ids may be hex strings or 16 raw bytes.

        The columns `REFERENCE` may be absent together, for a loss without reference.

        Raises:
            UserError: A column is missing, a value is null, or a pair_id occurs twice.
            NonFiniteError: A reference log-prob is NaN or infinite.
        """
        has_reference = any(name in table.column_names for name in REFERENCE)
        needed = (*TEXT, *(REFERENCE if has_reference else ()))
        if missing := [name for name in needed if name not in table.column_names]:
            raise UserError(f"training table: missing columns {missing}; got {table.column_names}")
        given = [name for name in OPTIONAL if name in table.column_names]
        table = table.select([*needed, *given])  # not combined: 2 GiB of text do not fit one Arrow string array
        if not pa.types.is_string(table.schema.field("pair_id").type):
            hexed = [value.hex() for value in table["pair_id"].to_pylist()]
            table = table.set_column(0, "pair_id", pa.array(hexed, pa.string()))
        pair_ids = table["pair_id"].to_pylist()
        for name in needed:
            _refuse_nulls(table[name], name, pair_ids)
        if len(set(pair_ids)) != len(pair_ids):
            ids, counts = np.unique(np.array(pair_ids), return_counts=True)
            raise UserError(f"training table: pair_id occurs twice, first: {ids[counts > 1][:NUM_OFFENDERS_SHOWN]}")
        if not has_reference:
            return cls(table=table, reference_logps_N2=None)
        logps_N2 = np.stack([table[name].to_numpy().astype(np.float64) for name in REFERENCE], axis=1)
        if len(bad := np.flatnonzero(~np.isfinite(logps_N2).all(axis=1))):
            raise NonFiniteError(f"{' or '.join(REFERENCE)}: not finite for pair_ids {_named(pair_ids, bad)}")
        return cls(table=table, reference_logps_N2=logps_N2)

    @classmethod
    def from_parquet(cls, paths: str | Path | Sequence[str | Path] | pa.Table) -> TrainingPairs:
        """Read one file, a folder (every `*.parquet` below it, sorted), several of either, or adopt a table.

        Raises:
            UserError: Nothing to read, or a table `from_table` refuses.
        """
        if isinstance(paths, pa.Table):
            return cls.from_table(paths)
        entries = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        files = [
            file for entry in entries for file in (sorted(entry.rglob("*.parquet")) if entry.is_dir() else [entry])
        ]
        if not files:
            raise UserError(f"training table: no parquet file in {[str(entry) for entry in entries]}")
        if absent := [str(file) for file in files if not file.is_file()]:
            raise UserError(f"training table: no such file {absent[:NUM_OFFENDERS_SHOWN]}")
        tables = [pq.read_table(file, partitioning=None) for file in files]
        return cls.from_table(pa.concat_tables(tables, promote_options="default"))

    def numbers(self, name: str, wanted_by: str) -> Numbers:
        """A column of `OPTIONAL` as numbers, [N].

        Raises:
            UserError: It is missing or has nulls; names who wants it.
            NonFiniteError: A value is NaN or infinite.
        """
        values_N = self._column(name, wanted_by).to_numpy().astype(np.float64)
        if len(bad := np.flatnonzero(~np.isfinite(values_N))):
            raise NonFiniteError(f"{name}: not finite for pair_ids {_named(self.table['pair_id'].to_pylist(), bad)}")
        return values_N

    def aspect_weights(self, weights: Mapping[str, float]) -> Numbers:
        """The share of each pair's own aspect in the sum of all weights, [N].

        Raises:
            UserError: A pair has no aspect, or one without a weight.
        """
        aspects = self._column("aspect", "aspect_weights").to_pylist()
        if unknown := sorted(set(aspects) - set(weights)):
            raise invalid("aspect_weights", sorted(weights), f"a weight for every aspect of the pairs, also {unknown}")
        total = sum(weights.values())
        return np.array([weights[aspect] / total for aspect in aspects])

    def _column(self, name: str, wanted_by: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise UserError(f"training table: {wanted_by} needs the column {name!r}; got {self.table.column_names}")
        _refuse_nulls(self.table[name], name, self.table["pair_id"].to_pylist())
        return self.table[name]

    def __len__(self) -> int:
        return self.table.num_rows


def columns_for(options: DpoOptions, pairs: TrainingPairs, *, is_training: bool = True) -> dict[str, Numbers]:
    """The numbers beside tokens and log-probs that the loss (and, to train, the order) takes of every pair.

    Held-out pairs may lack those of the loss: they have then rewards and an accuracy but no loss.

    Raises:
        UserError: A column is missing or has nulls; or the loss has a reference and the table no log-probs of it.
        NonFiniteError: A value is NaN or infinite.
    """
    loss, wanted_by = LOSSES[options.loss], f"loss {options.loss!r}"
    if loss.uses_reference and pairs.reference_logps_N2 is None:
        raise UserError(f"training table: {wanted_by} needs the columns {list(REFERENCE)}")
    columns: dict[str, Numbers] = {}
    if is_training and options.order == "score":
        columns["score"] = pairs.numbers("score", "order 'score'")
    if not is_training and "preference_divergence" not in pairs.table.column_names:
        return columns
    if "preference_divergence" in loss.columns:
        columns["preference_divergence"] = pairs.numbers("preference_divergence", wanted_by)
    if "aspect_weight" in loss.columns:
        columns["aspect_weight"] = pairs.aspect_weights(options.aspect_weights or {})
    return columns


@dataclass(frozen=True)
class EncodedPairs:
    """Tokenised pairs in one flat integer buffer: 4 bytes a token, whatever the number of pairs."""

    pair_ids: list[str]
    tokens_T: npt.NDArray[np.int32]
    """Prompt, chosen and rejected of pair 0, then of pair 1, …"""
    offsets: npt.NDArray[np.int64]
    """Where each of the 3N pieces begins, and the end: [3N + 1]."""
    prompt_starts_N2: npt.NDArray[np.int32]
    """Prompt tokens that chosen and rejected go without (`truncation="left"`)."""
    reference_logps_N2: Numbers | None
    """None: not known, for a loss without reference."""
    dropped: dict[str, int]
    """Pairs left out, by reason."""
    num_truncated: int
    """Completions that were cut."""
    columns: dict[str, Numbers] = field(default_factory=dict)
    """Further numbers of every pair, [N] each: see `columns_for`."""

    def __len__(self) -> int:
        return len(self.pair_ids)

    @functools.cached_property
    def num_tokens_N(self) -> Indices:
        """Tokens of each pair's segment [prompt | chosen | rejected]."""
        return np.diff(self.offsets[::3])

    @functools.cached_property
    def response_tokens_N2(self) -> Indices:
        """Tokens of each pair's chosen and rejected response."""
        return np.diff(self.offsets).reshape(-1, 3)[:, 1:]

    @functools.cached_property
    def by_score_N(self) -> Indices:
        """The pairs by descending score, ties by pair_id."""
        return np.lexsort((np.array(self.pair_ids), -self.columns["score"]))

    def pieces(self, index: int) -> list[list[int]]:
        """Prompt, chosen and rejected tokens of one pair."""
        bounds = self.offsets[3 * index : 3 * index + 4]
        return [self.tokens_T[start:end].tolist() for start, end in itertools.pairwise(bounds)]

    def group(self, index: int) -> EncodedGroup:
        """One pair as a prompt with two completions, chosen first."""
        prompt, chosen, rejected = self.pieces(index)
        starts = tuple(self.prompt_starts_N2[index].tolist())
        return EncodedGroup(prompt, [chosen, rejected], ["ok", "ok"], 0, starts if any(starts) else ())


def encode_pairs(pairs: TrainingPairs, encoder: Encoder, columns: Mapping[str, Numbers] | None = None) -> EncodedPairs:
    """Tokenise every pair once, before the first step, so that N and the number of steps are known.

    A pair with a completion over the encoder's `max_length` is dropped as `too_long` and counted; `columns` are further
    numbers of every pair, kept for those that stay.

    Raises:
        UserError: No pair is left.
        TemplateError: As the encoder raises it.
    """
    tokens, offsets, starts, kept, num_truncated = array("i"), [0], [], [], 0
    for number, group in enumerate(_encoded(pairs, encoder)):
        if any(status != "ok" for status in group.status):
            continue
        for piece in (group.prompt_tokens, *group.completion_tokens):
            tokens.extend(piece)
            offsets.append(len(tokens))
        starts.append(group.prompt_starts or (0, 0))
        kept.append(number)
        num_truncated += group.num_truncated
    if not kept:
        raise UserError(f"training table: none of {len(pairs)} pairs fits max_length; raise it or set truncation")
    return EncodedPairs(
        pair_ids=pairs.table["pair_id"].take(pa.array(kept)).to_pylist(),
        tokens_T=np.frombuffer(tokens, dtype=np.int32),
        offsets=np.array(offsets, dtype=np.int64),
        prompt_starts_N2=np.array(starts, dtype=np.int32),
        reference_logps_N2=None if pairs.reference_logps_N2 is None else pairs.reference_logps_N2[kept],
        dropped={"too_long": len(pairs) - len(kept)},
        num_truncated=num_truncated,
        columns={name: values[kept] for name, values in (columns or {}).items()},
    )


def _encoded(pairs: TrainingPairs, encoder: Encoder, batch_size: int = 512) -> Iterator[EncodedGroup]:
    for batch in pairs.table.to_batches(max_chunksize=batch_size):
        conversations = []
        for row in batch.to_pylist():
            completions = [_messages(row[side], "assistant") for side in ("chosen", "rejected")]
            conversations.append((_messages(row["prompt"], "user"), completions))
        yield from encoder.encode_groups(conversations)


@functools.lru_cache(maxsize=2)
def epoch_order(num_pairs: int, *, seed: int, epoch: int, order: Order = "shuffled") -> Indices:
    """The order in which an epoch visits the pairs: a permutation keyed by (seed, epoch), or the table's own.

    With "score" these are places in the pairs sorted by it.
    """
    if order != "shuffled":
        return np.arange(num_pairs, dtype=np.int64)
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_pairs).astype(np.int64)


def num_steps(num_pairs: int, *, global_batch_pairs: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of the whole run: `max_steps`, or all epochs, an epoch's incomplete last batch being a step."""
    return num_epochs * -(-num_pairs // global_batch_pairs) if max_steps is None else max_steps


def global_batch(consumed_pairs: int, num_pairs: int, *, global_batch_pairs: int, seed: int, order: Order) -> Indices:
    """The pairs of the next optimizer step, [B], when `consumed_pairs` have been trained on; never spans two epochs."""
    epoch, start = divmod(consumed_pairs, num_pairs)
    return epoch_order(num_pairs, seed=seed, epoch=epoch, order=order)[start : start + global_batch_pairs]


def rank_share(batch_B: Indices, num_tokens_B: Indices, *, rank: int, world_size: int) -> Indices:
    """The pairs of a global batch that one worker takes, longest first; the shares partition the batch.

    Dealing the length-sorted pairs back and forth (0 1 2 2 1 0 …) evens out the tokens per worker: every step waits
    for the slowest, and the loss is weighted per pair, so which worker computes a pair cannot change the sum.
    """
    by_length = batch_B[np.argsort(-num_tokens_B, kind="stable")]
    position = np.arange(len(by_length)) % (2 * world_size)
    owner = np.where(position < world_size, position, 2 * world_size - 1 - position)
    return by_length[owner == rank]


def micro_batches(share: Indices, num_tokens: Indices, *, micro_batch_pairs: int, token_budget: int) -> list[Indices]:
    """Consecutive runs of a worker's share with at most so many pairs and, beyond the first pair, so many tokens."""
    runs: list[list[int]] = []
    tokens = 0
    for index, length in zip(share.tolist(), num_tokens.tolist()):
        if not runs or len(runs[-1]) == micro_batch_pairs or tokens + length > token_budget:
            runs.append([])
            tokens = 0
        runs[-1].append(index)
        tokens += length
    return [np.array(run, dtype=np.int64) for run in runs]


def _refuse_nulls(column: pa.ChunkedArray, name: str, pair_ids: list[str]) -> None:
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise UserError(f"training table: {name} is null in {len(rows)} rows, first: {_named(pair_ids, rows)}")


def _messages(value: Any, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _named(pair_ids: list[str], rows: Indices) -> str:
    return ", ".join(pair_ids[row] for row in rows[:NUM_OFFENDERS_SHOWN])
