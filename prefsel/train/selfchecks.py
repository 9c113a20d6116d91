"""What must be true before the first step: the loss is that of zero margins (ln 2 for DPO), and the stored reference
log-probs are the reference's. A loss without reference has nothing to check."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from prefsel.config.losses import loss_named
from prefsel.errors import IntegrityError
from prefsel.models.loading import load_causal
from prefsel.models.pair_batch import pair_logps
from prefsel.train.batch import evaluate, pair_outputs
from prefsel.train.data import EncodedPairs
from prefsel.train.draws import next_batch
from prefsel.train.objective import Corpus, Record, Run
from prefsel.train.run_config import DpoConfig

STEP0_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""|loss − expected| before the first step. In bf16 a summed log-prob carries about 1 nat of noise, times DPO's slope of
beta / 2 per nat; a steeper loss is allowed as much more."""
REFERENCE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""|recomputed − stored| / max(1, |stored|). bf16 keeps 8 bits, and packing changes the order of its sums."""
LIKELY_CAUSES = (
    "Likely causes: another tokenizer, chat template, dtype, max_length or truncation than in scoring; another model."
)


def _tolerance(limits: Mapping[str, float], config: DpoConfig) -> float:
    """The limit of the coarser of the two dtypes that the compared numbers were computed in."""
    return limits["fp32" if config.dtype == config.reference_dtype == "fp32" else "bf16"]


def self_check(config: DpoConfig, run: Run, corpus: Corpus) -> Record:
    """Both checks as a record.

    Raises:
        IntegrityError: One fails.
    """
    return {
        "event": "self_check",
        "step": 0,
        **_check_step0_loss(config, run, corpus),
        "uses_reference": loss_named(config.loss).uses_reference,
        "reference_relative_error": _check_reference(config, run, corpus.pairs),
        "reference_tolerance": _tolerance(REFERENCE_TOLERANCE, config),
        "padding_reason": run.padding_reason,
    }


def _check_step0_loss(config: DpoConfig, run: Run, corpus: Corpus) -> dict[str, float | None]:
    """The loss of the first global batch before any update: that of zero margins when the policy is the reference.

    Returns:
        `step0_loss`, `step0_expected` and `step0_tolerance`; the first two are None (not checked) when the policy is
        another model than the reference, or the loss has no reference.

    Raises:
        IntegrityError: It differs from the expected one by more than the tolerance.
    """
    limit = _tolerance(STEP0_TOLERANCE, config)
    if not (config.policy_is_reference and loss_named(config.loss).uses_reference):
        return {"step0_loss": None, "step0_expected": None, "step0_tolerance": limit}
    batch_B = next_batch(corpus.draws, 0, config.global_batch_pairs)
    reference_N2 = corpus.pairs.reference_logps_N2
    assert reference_N2 is not None, "checked when the pairs were read"
    expected, slope = _loss_at_reference(
        lambda policy_B2: run.objective.losses(policy_B2, corpus.pairs, batch_B),
        torch.from_numpy(reference_N2[batch_B]),
    )
    limit *= max(1.0, slope / (0.5 * config.beta))
    loss = evaluate(run, corpus.pairs, batch_B)["loss"]
    if not abs(loss - expected) <= limit:
        raise IntegrityError(
            f"step-0 loss: got {loss:.6f}; with policy_is_reference it must be {expected:.6f}, the loss "
            f"{config.loss!r} of zero margins, within {limit:g}. {LIKELY_CAUSES}"
        )
    return {"step0_loss": loss, "step0_expected": expected, "step0_tolerance": limit}


def _loss_at_reference(losses: Callable[[Tensor], Tensor], reference_B2: Tensor) -> tuple[float, float]:
    """The mean loss of a batch whose policy is its reference, and how steep it is: mean |change| per nat of chosen."""
    with torch.enable_grad():
        policy_B2 = reference_B2.clone().requires_grad_()
        losses_B = losses(policy_B2)
        (slope_B2,) = torch.autograd.grad(losses_B.sum(), policy_B2)
    return losses_B.mean().item(), slope_B2[:, 0].abs().mean().item()


@torch.no_grad()
def _check_reference(config: DpoConfig, run: Run, train: EncodedPairs) -> float | None:
    """Recompute the reference log-probs of a few pairs, from the shortest to the longest, and compare.

    Returns:
        The largest relative error, or None (not checked) when the loss has no reference or its model is not at hand.

    Raises:
        IntegrityError: An error above `REFERENCE_TOLERANCE`; names the first pairs.
    """
    num_checked = min(config.reference_check_pairs, len(train))
    if num_checked == 0 or not (config.policy_is_reference or config.reference_dir):
        return None
    if not loss_named(config.loss).uses_reference:
        return None
    assert train.reference_logps_N2 is not None, "checked when the pairs were read"
    spread = np.linspace(0, len(train) - 1, num_checked).round().astype(np.int64)
    checked = np.argsort(train.num_tokens_N, kind="stable")[spread]
    # The same pairs on every worker: a few sequences are cheaper than agreeing on who failed.
    if config.policy_is_reference:
        run.engine.eval()
        found = [pair_outputs(run, train, checked[[i]])[0] for i in range(num_checked)]
    else:
        reference = load_causal(
            str(config.reference_dir),
            dtype=config.dtype,
            device=run.device,
            revision=config.reference_revision,
            trust_remote_code=config.reference_trust_remote_code,
        )
        found = [pair_logps(reference, [train.group(int(i))]) for i in checked]
    recomputed_N2 = torch.cat(found).cpu().numpy()
    stored_N2 = train.reference_logps_N2[checked]
    error_N = (np.abs(recomputed_N2 - stored_N2) / np.maximum(1.0, np.abs(stored_N2))).max(axis=1)
    bad = np.flatnonzero(~(error_N <= _tolerance(REFERENCE_TOLERANCE, config)))
    if len(bad):
        shown = "; ".join(
            f"pair_id {train.pair_ids[checked[i]]} stored {stored_N2[i].tolist()}, got {recomputed_N2[i].tolist()}"
            for i in bad[:3]
        )
        raise IntegrityError(
            f"reference log-probs: {len(bad)} of {num_checked} recomputed pairs differ by more than "
            f"{_tolerance(REFERENCE_TOLERANCE, config):g} relative: {shown}. {LIKELY_CAUSES}"
        )
    return float(error_N.max())
