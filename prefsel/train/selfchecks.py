"""What must be true before the first step: the loss is ln 2, and the stored reference log-probs are the reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from prefsel.errors import IntegrityError
from prefsel.models.loading import load_causal
from prefsel.train.batch import Record, Run, evaluate, next_batch, pair_logps
from prefsel.train.data import EncodedPairs
from prefsel.train.deepspeed_config import DpoConfig
from prefsel.train.export import DTYPES, Policy

STEP0_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""|loss − ln 2| before the first step. In bf16 a summed log-prob carries about 1 nat of noise, times beta / 2."""
REFERENCE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""|recomputed − stored| / max(1, |stored|). bf16 keeps 8 bits, and packing changes the order of its sums."""
LIKELY_CAUSES = (
    "Likely causes: another tokenizer, chat template, dtype, max_length or truncation than in scoring; another model."
)


def tolerance(limits: Mapping[str, float], config: DpoConfig) -> float:
    """The limit of the coarser of the two dtypes that the compared numbers were computed in."""
    return limits["fp32" if config.dtype == config.reference_dtype == "fp32" else "bf16"]


def start_records(run: Run, train: EncodedPairs, held_out: EncodedPairs | None) -> list[Record]:
    """The self-checks, then the evaluation of the untrained policy."""
    step0_loss, reference_error = check_step0_loss(run, train), check_reference(run, train)
    checks = {
        "step0_loss": step0_loss,
        "step0_tolerance": tolerance(STEP0_TOLERANCE, run.config),
        "reference_relative_error": reference_error,
        "reference_tolerance": tolerance(REFERENCE_TOLERANCE, run.config),
        "padding_reason": run.padding_reason,
    }
    records: list[Record] = [{"event": "self_check", "step": 0, **checks}]
    if held_out:
        records.append({"event": "eval", "step": 0, "epoch": 0.0, "consumed_pairs": 0, **evaluate(run, held_out)})
    return records


def check_step0_loss(run: Run, train: EncodedPairs) -> float | None:
    r"""The loss of the first global batch before any update: ln 2 when the policy is the reference.

    Returns:
        The loss, or None (not checked) when the policy is another model than the reference.

    Raises:
        IntegrityError: It differs from ln 2 by more than `STEP0_TOLERANCE`.
    """
    if not run.config.policy_is_reference:
        return None
    loss, limit = evaluate(run, train, next_batch(run.config, train, 0))["loss"], tolerance(STEP0_TOLERANCE, run.config)
    if not abs(loss - math.log(2.0)) <= limit:
        raise IntegrityError(
            f"step-0 loss: got {loss:.6f}; with policy_is_reference it must be ln 2 = {math.log(2.0):.6f} "
            f"within {limit:g}. {LIKELY_CAUSES}"
        )
    return float(loss)


@torch.no_grad()
def check_reference(run: Run, train: EncodedPairs) -> float | None:
    """Recompute the reference log-probs of a few pairs, from the shortest to the longest, and compare.

    Returns:
        The largest relative error, or None (not checked) when the reference model is not at hand.

    Raises:
        IntegrityError: An error above `REFERENCE_TOLERANCE`; names the first pairs.
    """
    config, num_checked = run.config, min(run.config.reference_check_pairs, len(train))
    if num_checked == 0 or not (config.policy_is_reference or config.reference_dir):
        return None
    spread = np.linspace(0, len(train) - 1, num_checked).round().astype(np.int64)
    checked = np.argsort(train.num_tokens_N, kind="stable")[spread]
    reference = run.engine
    if not config.policy_is_reference:
        reference = Policy(
            load_causal(
                str(config.reference_dir),
                dtype=DTYPES[config.dtype],
                device=run.device,
                revision=config.reference_revision,
                trust_remote_code=config.reference_trust_remote_code,
            )
        )
    reference.eval()
    # The same pairs on every worker: a few sequences are cheaper than agreeing on who failed.
    recomputed_N2 = (
        torch.cat([pair_logps(reference, run, train, checked[[i]]) for i in range(num_checked)]).cpu().numpy()
    )
    stored_N2 = train.reference_logps_N2[checked]
    error_N = (np.abs(recomputed_N2 - stored_N2) / np.maximum(1.0, np.abs(stored_N2))).max(axis=1)
    bad = np.flatnonzero(~(error_N <= tolerance(REFERENCE_TOLERANCE, config)))
    if len(bad):
        shown = "; ".join(
            f"pair_id {train.pair_ids[checked[i]]} stored {stored_N2[i].tolist()}, got {recomputed_N2[i].tolist()}"
            for i in bad[:3]
        )
        raise IntegrityError(
            f"reference log-probs: {len(bad)} of {num_checked} recomputed pairs differ by more than "
            f"{tolerance(REFERENCE_TOLERANCE, config):g} relative: {shown}. {LIKELY_CAUSES}"
        )
    return float(error_N.max())
