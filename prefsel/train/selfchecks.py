"""What must be true before the first step: the loss is that of zero margins (ln 2 for DPO), and the stored reference
log-probs are the reference's. A loss without reference has nothing to check."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from prefsel.config import DpoOptions
from prefsel.errors import IntegrityError
from prefsel.models.loading import load_causal
from prefsel.train.batch import PairInputs, Record, Run, evaluate, held_out_record, next_batch, pair_logps, pair_losses
from prefsel.train.data import EncodedPairs, Indices
from prefsel.train.deepspeed_config import DpoConfig
from prefsel.train.export import DTYPES, Policy
from prefsel.train.losses import LOSSES

STEP0_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""|loss − expected| before the first step. In bf16 a summed log-prob carries about 1 nat of noise, times DPO's slope of
beta / 2 per nat; a steeper loss is allowed as much more."""
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
    step0, reference_error = check_step0_loss(run, train), check_reference(run, train)
    checks = {
        **step0,
        "uses_reference": LOSSES[run.config.loss].uses_reference,
        "reference_relative_error": reference_error,
        "reference_tolerance": tolerance(REFERENCE_TOLERANCE, run.config),
        "padding_reason": run.padding_reason,
    }
    records: list[Record] = [{"event": "self_check", "step": 0, **checks}]
    if held_out:
        records.append(held_out_record(run, held_out, {"step": 0, "epoch": 0.0, "consumed_pairs": 0}))
    return records


def check_step0_loss(run: Run, train: EncodedPairs) -> dict[str, float | None]:
    """The loss of the first global batch before any update: that of zero margins when the policy is the reference.

    Returns:
        `step0_loss`, `step0_expected` and `step0_tolerance`; the first two are None (not checked) when the policy is
        another model than the reference, or the loss has no reference.

    Raises:
        IntegrityError: It differs from the expected one by more than the tolerance.
    """
    config, limit = run.config, tolerance(STEP0_TOLERANCE, run.config)
    if not (config.policy_is_reference and LOSSES[config.loss].uses_reference):
        return {"step0_loss": None, "step0_expected": None, "step0_tolerance": limit}
    batch_B = next_batch(config, train, 0)
    expected, slope = loss_at_reference(config, train, batch_B)
    limit *= max(1.0, slope / (0.5 * config.beta))
    loss = evaluate(run, train, batch_B)["loss"]
    if not abs(loss - expected) <= limit:
        raise IntegrityError(
            f"step-0 loss: got {loss:.6f}; with policy_is_reference it must be {expected:.6f}, the loss "
            f"{config.loss!r} of zero margins, within {limit:g}. {LIKELY_CAUSES}"
        )
    return {"step0_loss": loss, "step0_expected": expected, "step0_tolerance": limit}


def loss_at_reference(options: DpoOptions, pairs: EncodedPairs, batch_B: Indices) -> tuple[float, float]:
    """The mean loss of a batch whose policy is its reference, and how steep it is: mean |change| per nat of chosen."""
    inputs = PairInputs.of(pairs, batch_B)
    assert inputs.reference_N2 is not None, "only asked of losses with a reference"
    with torch.enable_grad():
        policy_B2 = inputs.reference_N2.clone().requires_grad_()
        losses_B = pair_losses(options, policy_B2, inputs)
        (slope_B2,) = torch.autograd.grad(losses_B.sum(), policy_B2)
    return losses_B.mean().item(), slope_B2[:, 0].abs().mean().item()


@torch.no_grad()
def check_reference(run: Run, train: EncodedPairs) -> float | None:
    """Recompute the reference log-probs of a few pairs, from the shortest to the longest, and compare.

    Returns:
        The largest relative error, or None (not checked) when the loss has no reference or its model is not at hand.

    Raises:
        IntegrityError: An error above `REFERENCE_TOLERANCE`; names the first pairs.
    """
    config, num_checked = run.config, min(run.config.reference_check_pairs, len(train))
    if num_checked == 0 or not (config.policy_is_reference or config.reference_dir):
        return None
    if not LOSSES[config.loss].uses_reference:
        return None
    assert train.reference_logps_N2 is not None, "checked when the pairs were read"
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
