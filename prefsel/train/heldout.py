"""What a policy thought of every held-out pair before and after its training: one small table beside the model.

It lies in a folder of its own, `evaluations/<model>@<fp>/`, so that a model's content is its weights and nothing else:
what is computed from a model is named by that content.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.workspace.folders import read_seal, read_sealed, seal_files
from prefsel.workspace.storage import Storage

FILE = "margins.parquet"
MARGINS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        # beta · [(log π − log π_ref)(y_w) − (log π − log π_ref)(y_l)], in nats; of a loss without reference its reward.
        ("before", pa.float64()),
        ("after", pa.float64()),
    ]
)
"""Identifiers are 32 hex digits."""


def split_margins(
    history: Sequence[Mapping[str, Any]], pair_ids: Sequence[str], prompt_ids: Mapping[str, str]
) -> tuple[list[dict[str, Any]], pa.Table | None]:
    """A training's history without the margins of single pairs, and these as a table.

    Args:
        history: Records of a training; its first and last evaluation hold `margins`.
        pair_ids: The held-out pairs, in the order of the margins.
        prompt_ids: Their prompts.

    Returns:
        The other records and numbers; the table, schema `MARGINS`, None where one of the two evaluations has none (a
        run that continues a checkpoint of an older version).
    """
    kept = [{key: value for key, value in record.items() if key != "margins"} for record in history]
    evaluations = [record for record in history if record["event"] == "eval"]
    ends = [evaluations[place].get("margins") for place in (0, -1)] if evaluations else []
    if not pair_ids or not ends or None in ends:
        return kept, None
    columns = [pair_ids, [prompt_ids[one] for one in pair_ids], *ends]
    return kept, pa.table(dict(zip(MARGINS.names, columns)), schema=MARGINS)


def margins_folder(model: str) -> str:
    """Where the margins of the model in the folder `models/<name>@<fp>` lie."""
    return f"evaluations/{model.removeprefix('models/')}"


def save_margins(storage: Storage, model: str, margins: pa.Table) -> None:
    """Write the margins of a model and seal them; before the model itself is sealed, which ends its training."""
    sink = io.BytesIO()
    pq.write_table(margins, sink)
    seal_files(storage, margins_folder(model), {FILE: sink.getvalue()}, {"num_pairs": margins.num_rows})


def read_margins(storage: Storage, model: str) -> pa.Table | None:
    """The margins of a model; None where it was not evaluated pair by pair."""
    folder = margins_folder(model)
    seal = read_seal(storage, folder)
    return None if seal is None else pq.read_table(io.BytesIO(read_sealed(storage, folder, FILE, seal["files"][FILE])))
