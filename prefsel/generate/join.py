"""Answers of several models to the same prompts → one group per prompt, in the order of the models."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from prefsel.schema import RESPONSES


def join_answers(answered: Sequence[pa.Table]) -> tuple[pa.Table, int]:
    """The groups of several models joined by prompt; what two of them answered alike is that of the first.

    Args:
        answered: Of each model, groups with the columns `GENERATED`, all of one schema.

    Returns:
        The groups of every prompt that one of them answered, in the order of the first table and then of the others,
        and how many responses were left out because they came before.
    """
    rows: dict[bytes, dict[str, list[object]]] = {}
    first: dict[bytes, dict[str, object]] = {}
    doubles = 0
    for table in answered:
        for row in table.to_pylist():
            first.setdefault(row["prompt_id"], row)
            found = rows.setdefault(row["prompt_id"], {"ids": [], "completions": [], RESPONSES: []})
            for completion, response in zip(row["completions"], row[RESPONSES]):
                if completion["completion_id"] in found["ids"]:
                    doubles += 1
                    continue
                found["ids"].append(completion["completion_id"])
                found["completions"].append(completion)
                found[RESPONSES].append(response)
    joined = [
        first[prompt] | {"completions": found["completions"], RESPONSES: found[RESPONSES]}
        for prompt, found in rows.items()
    ]
    return pa.Table.from_pylist(joined, schema=answered[0].schema), doubles
