"""The training table and its tokens.

Shapes: N pairs.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.config.losses import WEIGHTS
from prefsel.errors import NonFiniteError, UserError, invalid
from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.train.pair_source import REFERENCE_COLUMNS

TEXT = ("pair_id", "prompt", "chosen", "rejected")
SIDES = ("chosen", "rejected")
OPTIONAL = ("prompt_id", "preference_divergence", "aspect", "score", "weight")
"""Read where the objective, the loss or the order needs them: the prompt's id, PD of a pair, the aspect it is labelled
with, the selection's score, the weight of the pair."""
NUM_OFFENDERS_SHOWN = 5

Indices = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs with the log-probs their reference model gave them; the reference itself is never loaded to train."""

    table: pa.Table
    """Columns `TEXT`: pair_id as hex strings, messages as lists of {role, content}; and of `REFERENCE_COLUMNS` and
    `OPTIONAL` those that were given."""
    reference_logps_N2: Numbers | None
    """Stored reference log-probs, chosen then rejected, nats, summed over the response; None: the table has none."""

    @classmethod
    def from_table(cls, table: pa.Table) -> TrainingPairs:
        """Check and adopt a table that has at least `TEXT`; pair ids may be hex strings or 16 raw bytes.

        The columns `REFERENCE_COLUMNS` may be absent together, for a loss without reference.

        Raises:
            UserError: A column is missing, a value is null, or a pair_id occurs twice.
            NonFiniteError: A reference log-prob is NaN or infinite.
        """
        has_reference = any(name in table.column_names for name in REFERENCE_COLUMNS)
        needed = (*TEXT, *(REFERENCE_COLUMNS if has_reference else ()))
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
        logps_N2 = np.stack([table[name].to_numpy().astype(np.float64) for name in REFERENCE_COLUMNS], axis=1)
        if len(bad := np.flatnonzero(~np.isfinite(logps_N2).all(axis=1))):
            raise NonFiniteError(f"{' or '.join(REFERENCE_COLUMNS)}: not finite for pair_ids {_named(pair_ids, bad)}")
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
        return cls.from_table(pa.concat_tables(tables, promote_options="permissive"))

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

    def weights(self, weighting: str) -> Numbers:
        """The weight of every pair, [N].

        Args:
            weighting: `loss`, for weights from 0, or `label`, for probabilities.

        Raises:
            UserError: The column is missing or has nulls; a weight is below 0, or above 1 with `label`; or all are 0.
            NonFiniteError: A weight is NaN or infinite.
        """
        weight_N, (highest, valid) = self.numbers("weight", f"weighting {weighting!r}"), WEIGHTS[weighting]
        if len(bad := np.flatnonzero((weight_N < 0) | (weight_N > highest))):
            named = _named(self.table["pair_id"].to_pylist(), bad)
            raise UserError(
                f"weight: got {weight_N[bad[0]]:g} and others in {len(bad):,} of {len(weight_N):,} pairs, "
                f"first {named}; valid: {valid}"
            )
        if weighting == "loss" and len(weight_N) and not weight_N.any():
            raise UserError(f"weight: got 0 for all {len(weight_N):,} pairs; valid: some above 0")
        return weight_N

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

    def prompt_ids(self, wanted_by: str) -> list[bytes]:
        """The 16 raw bytes of every pair's prompt_id, whether the table has bytes or hex strings.

        Raises:
            UserError: The column is missing, has nulls, or holds something else.
        """
        values = self._column("prompt_id", wanted_by).to_pylist()
        try:
            raw = [bytes.fromhex(value) if isinstance(value, str) else value for value in values]
            return pa.array(raw, pa.binary(16)).to_pylist()
        except (ValueError, TypeError) as error:  # Arrow's own errors are among these
            valid = "32 hex digits, or 16 bytes, in every row"
            raise invalid("training table: prompt_id", values[0], valid) from error

    def text_lengths(self) -> Numbers:
        """Characters of every chosen and rejected completion, [N, 2]."""
        lengths = []
        for batch in self.table.select(list(SIDES)).to_batches(max_chunksize=512):
            for row in batch.to_pylist():
                lengths.append(
                    [sum(len(m["content"] or "") for m in _messages(row[side], "assistant")) for side in SIDES]
                )
        return np.array(lengths, dtype=np.float64)

    def _column(self, name: str, wanted_by: str) -> pa.ChunkedArray:
        if name not in self.table.column_names:
            raise UserError(f"training table: {wanted_by} needs the column {name!r}; got {self.table.column_names}")
        _refuse_nulls(self.table[name], name, self.table["pair_id"].to_pylist())
        return self.table[name]

    def __len__(self) -> int:
        return self.table.num_rows


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
    rows_N: Indices
    """Their rows in the table they were read from."""
    columns: dict[str, Numbers] = field(default_factory=dict)
    """Further numbers of every pair, [N] each."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first pair of every reason in `dropped`, and what about it."""

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

    def pieces(self, index: int) -> list[list[int]]:
        """Prompt, chosen and rejected tokens of one pair."""
        bounds = self.offsets[3 * index : 3 * index + 4]
        return [self.tokens_T[start:end].tolist() for start, end in itertools.pairwise(bounds)]

    def group(self, index: int) -> EncodedGroup:
        """One pair as a prompt with two completions, chosen first."""
        prompt, chosen, rejected = self.pieces(index)
        starts = tuple(self.prompt_starts_N2[index].tolist())
        return EncodedGroup(prompt, [chosen, rejected], ["ok", "ok"], 0, starts if any(starts) else ())


def encode_pairs(
    pairs: TrainingPairs, encoder: Encoder, columns: Mapping[str, Numbers] | None = None, *, strict: bool = True
) -> EncodedPairs:
    """Tokenise every pair once, before the first step, so that N and the number of steps are known.

    Args:
        pairs: The table.
        encoder: The tokenizer with its template and length limit.
        columns: Further numbers of every pair, [N] each, kept for those that stay.
        strict: False: a pair whose response the template cannot tell from its prompt is dropped, as far as these are at
            most half.

    Returns:
        The pairs that fit and can be told apart. Of the others `dropped` counts those with a completion over
        `max_length` as `too_long`, those whose two completions are the same tokens as `same_tokens`, and without
        `strict` those that the template fails for as `template_error`.

    Raises:
        UserError: No pair is left, or the template fails for more than half of them.
        TemplateError: As the encoder raises it, with `strict`.
    """
    if not len(pairs):
        raise UserError("training table: it has no row")
    tokens, offsets, starts, kept, num_truncated = array("i"), [0], [], [], 0
    dropped = Counter(dict.fromkeys(("too_long",) if strict else ("too_long", "template_error"), 0))
    first: dict[str, tuple[int, str]] = {}
    for number, group in enumerate(_encoded(pairs, encoder, strict=strict)):
        if reason := _reason(group):
            dropped[reason] += 1
            if reason not in first:
                first[reason] = number, _about(reason, group)
            continue
        for piece in (group.prompt_tokens, *group.completion_tokens):
            tokens.extend(piece)
            offsets.append(len(tokens))
        starts.append(group.prompt_starts or (0, 0))
        kept.append(number)
        num_truncated += group.num_truncated
    if 2 * dropped["template_error"] > len(pairs):
        raise UserError(f"{dropped['template_error']} of {len(pairs)} pairs: {encoder.tolerated}")
    if not kept:
        if dropped["too_long"] == len(pairs):
            raise UserError(f"training table: none of {len(pairs)} pairs fits max_length; raise it or set truncation")
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise UserError(f"training table: none of {len(pairs)} pairs can be trained on under this template: {counts}")
    rows_N = np.array(kept, dtype=np.int64)
    return EncodedPairs(
        pair_ids=pairs.table["pair_id"].take(pa.array(rows_N)).to_pylist(),
        tokens_T=np.frombuffer(tokens, dtype=np.int32),
        offsets=np.array(offsets, dtype=np.int64),
        prompt_starts_N2=np.array(starts, dtype=np.int32),
        reference_logps_N2=None if pairs.reference_logps_N2 is None else pairs.reference_logps_N2[rows_N],
        dropped=dict(dropped),
        num_truncated=num_truncated,
        rows_N=rows_N,
        columns={name: values[rows_N] for name, values in (columns or {}).items()},
        examples={reason: f"pair {pairs.table['pair_id'][row]}: {about}" for reason, (row, about) in first.items()},
    )


def _reason(group: EncodedGroup) -> str | None:
    """What a pair is left out for; None: it stays."""
    bad = [status for status in group.status if status != "ok"]
    return bad[0] if bad else "same_tokens" if group.same_as else None


def _about(reason: str, group: EncodedGroup) -> str:
    if reason == "too_long":
        return f"a completion over max_length, behind {len(group.prompt_tokens):,} tokens of the prompt"
    return next((note.example for note in group.notes if note.kind == reason), "")


def _encoded(pairs: TrainingPairs, encoder: Encoder, *, strict: bool, batch_size: int = 512) -> Iterator[EncodedGroup]:
    for batch in pairs.table.to_batches(max_chunksize=batch_size):
        conversations = []
        for row in batch.to_pylist():
            completions = [_messages(row[side], "assistant") for side in SIDES]
            conversations.append((_messages(row["prompt"], "user"), completions))
        yield from encoder.encode_groups(conversations, strict=strict)


def _refuse_nulls(column: pa.ChunkedArray, name: str, pair_ids: list[str]) -> None:
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
        raise UserError(f"training table: {name} is null in {len(rows)} rows, first: {_named(pair_ids, rows)}")


def _messages(value: Any, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _named(pair_ids: list[str], rows: Indices) -> str:
    return ", ".join(pair_ids[row] for row in rows[:NUM_OFFENDERS_SHOWN])
