"""Groups with what pairs are made by, aligned and checked: numbers of judges, generators, lengths, equal texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError, NonFiniteError, UserError
from prefsel.schema import REST

SHOWN = 5
"""Prompts that an error names."""

Numbers = Sequence[Sequence[float | None]]
"""Per group a list with one number, or None, per completion."""


class JudgedGroup(NamedTuple):
    """One prompt and its completions."""

    prompt_id: bytes
    ids: list[bytes]
    """The completion_ids."""
    texts: list[tuple[int, ...]]
    """Per completion what is equal where its text is."""
    values: dict[int, tuple[float, ...]]
    """The numbers of the judges, of every completion that has all of them, by its position."""
    generators: Sequence[str | None]
    lengths: Sequence[float | None]


def judged_groups(
    groups: pa.Table,
    columns: Mapping[str, Numbers],
    generators: Sequence[Sequence[str | None]] | None,
    lengths: Numbers | None,
) -> Iterator[JudgedGroup]:
    """The groups of a shard, in order; the arguments are those of `make_pairs`.

    Raises:
        UserError: Something is not aligned with the groups or their completions.
        NonFiniteError: A number is NaN or infinite.
        IntegrityError: A completion stands twice in its group.
    """
    prompts: list[bytes] = groups["prompt_id"].to_pylist()
    completions = groups["completions"].combine_chunks()
    flat = pc.list_flatten(completions)
    sizes = pc.list_value_length(completions).to_pylist()
    ids = _split(pc.struct_field(flat, "completion_id").to_pylist(), sizes)
    texts = _split(_texts(pc.struct_field(flat, "messages")), sizes)
    named = {"generators": generators, "lengths": lengths}
    numbers = {**columns, **({} if lengths is None else {"lengths": lengths})}
    for name, column in (*columns.items(), *named.items()):
        if column is not None:
            _check_aligned(name, column, prompts, sizes)
    for name, values in numbers.items():
        _check_finite(name, values, prompts)
    for row, prompt in enumerate(prompts):
        _check_distinct(prompt, ids[row])
        judged = zip(*(column[row] for column in columns.values()))
        yield JudgedGroup(
            prompt,
            ids[row],
            texts[row],
            {place: tuple(map(float, one)) for place, one in enumerate(judged) if None not in one},
            () if generators is None else generators[row],
            () if lengths is None else lengths[row],
        )


def _check_aligned(name: str, column: Sequence[Sequence[Any]], prompts: list[bytes], sizes: list[int]) -> None:
    if len(column) != len(prompts):
        raise UserError(f"{name}: got {len(column)} lists for {len(prompts)} groups; valid: one for each, in order")
    for prompt, values, size in zip(prompts, column, sizes):
        if values is None or len(values) != size:
            raise UserError(
                f"{name}: got {None if values is None else len(values)} values for the {size} completions of prompt_id "
                f"{prompt.hex()}; valid: one for each, None where there is none"
            )


def _check_finite(name: str, column: Numbers, prompts: list[bytes]) -> None:
    bad = [
        prompt.hex()
        for prompt, values in zip(prompts, column)
        if any(one is not None and not math.isfinite(one) for one in values)
    ]
    if bad:
        first = ", ".join(bad[:SHOWN])
        raise NonFiniteError(f"{name}: NaN or infinite in {len(bad)} groups, first prompt_ids {first}")


def _check_distinct(prompt: bytes, ids: list[bytes]) -> None:
    if len(set(ids)) < len(ids):
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise IntegrityError(f"groups: prompt_id {prompt.hex()} has completion_id {twice.hex()} more than once")


def _split(flat: list[Any], sizes: list[int]) -> list[list[Any]]:
    """One list after another, of the sizes given."""
    return [flat[start:end] for start, end in pairwise(np.cumsum([0, *sizes]).tolist())]


def _texts(messages: pa.Array) -> list[tuple[Any, ...]]:
    """For every completion what is equal where its text is: contents without outer white space, and `rest`.

    They are codes of Arrow's own dictionary: no text becomes a Python object.
    """
    flat = pc.list_flatten(messages)
    names = [field.name for field in flat.type if field.name in ("content", REST)]
    parts = [pc.utf8_trim_whitespace(pc.struct_field(flat, name)).dictionary_encode() for name in names]
    codes = list(zip(*(one.indices.to_pylist() for one in parts)))
    return [tuple(one) for one in _split(codes, pc.list_value_length(messages).to_pylist())]
