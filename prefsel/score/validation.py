"""Validation pairs → a folder of tangents: mean gradients of their DPO loss, by stratum, preconditioned where asked."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file
from torch import Tensor

from prefsel.config import Tangent
from prefsel.errors import UserError, invalid
from prefsel.models.architecture import model_shape
from prefsel.models.chat import Encoder
from prefsel.models.loading import check_vocabulary, context_length, load_causal, load_tokenizer
from prefsel.models.packing import flops_min
from prefsel.models.tangent import fisher_diagonal, precondition, save_tangent, validation_gradient
from prefsel.train.data import TrainingPairs, encode_pairs

TOKEN_BUDGET = 4096
"""Tokens of one forward and backward pass; a backward keeps every activation of its row."""


def compute_tangent(spec: Tangent, loading: dict[str, Any], table: pa.Table, folder: Path) -> dict[str, Any]:
    """Compute a tangent and write it.

    Args:
        spec: What is asked.
        loading: Arguments of `load_causal` with `path`, and of `Encoder`.
        table: Validation pairs, with reference log-probs and the column `spec.by`.
        folder: Receives the directions.

    Returns:
        Facts: `num_pairs` and `dropped`, per direction its pairs, mean loss and norm, FLOPs, seconds.

    Raises:
        UserError: A stratum without a pair, or a preconditioner whose moments the model does not have.
        NonFiniteError: A loss or gradient is NaN or infinite.
    """
    started = time.monotonic()
    loading = dict(loading)
    path = loading.pop("path")
    encoding = {key: loading.pop(key) for key in ("template", "max_length", "truncation")}
    chosen, dropped = _wanted_pairs(spec, table)
    tokenizer = load_tokenizer(path, revision=loading["revision"], trust_remote_code=loading["trust_remote_code"])
    limit = encoding["max_length"] or context_length(path, loading["revision"], loading["trust_remote_code"])
    encoder = Encoder(tokenizer, encoding["template"], limit, encoding["truncation"])
    pairs = encode_pairs(TrainingPairs.from_table(chosen), encoder, strict=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal(path, **(loading | {"dtype": spec.dtype, "device": device}))
    check_vocabulary(tokenizer, model, path=path)
    strata = _strata_of(spec, chosen, pairs.pair_ids)
    groups = [pairs.group(number) for number in range(len(pairs))]
    reference_N2 = pairs.reference_logps_N2
    assert reference_N2 is not None, "the table has the reference's log-probs"
    found = validation_gradient(model, groups, reference_N2, beta=spec.beta, strata=strata, token_budget=TOKEN_BUDGET)
    directions, moment = found.directions, second_moment(spec, Path(path))
    passes = 3
    if spec.preconditioner == "fisher":
        moment, passes = fisher_diagonal(model, groups, reference_N2, beta=spec.beta), 6
    if moment is not None:
        directions = {name: precondition(one, moment, spec.damping) for name, one in directions.items()}
    named = dict(zip(spec.directions, directions.values()))
    facts = {
        "beta": spec.beta,
        "preconditioner": spec.preconditioner,
        "num_pairs": len(pairs),
        "pairs": dict(zip(spec.directions, found.num_pairs.values())),
        "losses": dict(zip(spec.directions, found.losses.values())),
    }
    save_tangent(folder, named, facts)
    flops = passes * flops_min(groups, model_shape(model))
    counts = {reason: count for reason, count in {**dropped, **pairs.dropped}.items() if count}
    return facts | {"dropped": counts, "flops_train": flops, "seconds": time.monotonic() - started}


def _wanted_pairs(spec: Tangent, table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The pairs that count, in the order of their strata, then ids; and how many were left out.

    Raises:
        UserError: A stratum without a pair.
    """
    dropped = {}
    if spec.by is not None:
        known = table.filter(pc.is_in(table[spec.by], value_set=pa.array(spec.values, pa.string())))
        dropped["other_stratum"] = table.num_rows - known.num_rows
        there = set(pc.unique(known[spec.by]).to_pylist())
        if lacking := [value for value in spec.values if value not in there]:
            valid = sorted(str(value) for value in pc.unique(table[spec.by]).to_pylist())
            raise invalid(f"tangents.{spec.name}.values", lacking, valid)
        table = known
    table = table.sort_by("pair_id")
    if spec.max_pairs is not None and table.num_rows > spec.max_pairs:
        dropped["over_max_pairs"] = table.num_rows - spec.max_pairs
        table = table.slice(0, spec.max_pairs)
    if spec.by is not None:
        place = pc.index_in(table[spec.by], value_set=pa.array(spec.values, pa.string())).to_numpy()
        table = table.take(pa.array(np.argsort(place, kind="stable")))
    return table, dropped


def _strata_of(spec: Tangent, table: pa.Table, pair_ids: list[str]) -> list[str] | None:
    """The stratum of every encoded pair; None: there is one."""
    if spec.by is None:
        return None
    by_id = dict(zip(table["pair_id"].to_pylist(), table[spec.by].to_pylist()))
    strata = [by_id[one] for one in pair_ids]
    if lost := [value for value in spec.values if value not in strata]:
        raise UserError(f"tangents.{spec.name}: no validation pair of {lost} is left (too long, or over max_pairs)")
    return strata


def second_moment(spec: Tangent, model: Path) -> dict[str, Tensor] | None:
    """Adam's second moments of the warm-up, where the tangent is divided by them.

    Raises:
        UserError: The model was not trained with `keep_optimizer_state`.
    """
    if spec.preconditioner != "adam":
        return None
    file = model / "optimizer" / "exp_avg_sq.safetensors"
    if not file.is_file():
        raise UserError(f"tangents.{spec.name}: {spec.model!r} has no Adam state; train it with keep_optimizer_state")
    return load_file(file)
