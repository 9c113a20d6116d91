"""What one training is configured with: the options a user writes, and what the rest of the configuration says.

No torch here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefsel.config import DpoOptions, Optimization, RewardOptions


class RunConfig(Optimization):
    """What every training knows about the model it starts from and about its text."""

    max_length: int | None = Field(ge=2)
    """Longest prompt + completion in tokens, as in scoring; None: no limit."""
    template: str = "auto"
    """Chat template, as in scoring."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a completion over max_length, as in scoring; `drop` leaves its pair out and counts it."""
    revision: str | None = None
    """Exact revision of the model, needed for `trust_remote_code`."""
    trust_remote_code: bool = False
    """Run the model repository's own code."""


class DpoConfig(DpoOptions, RunConfig):
    """A training of a policy; lengths, template and truncation are those of the stored reference log-probs."""

    policy_is_reference: bool
    """Whether the stored reference log-probs come from the very model that training starts from; switches on the
    step-0 check (the loss is that of zero margins, ln 2 for DPO) and recomputes reference log-probs with the initial
    policy. Without effect for a loss that has no reference."""
    reference_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the stored log-probs were computed in; the self-checks allow for the coarser of it and `dtype`."""
    reference_revision: str | None = None
    """Exact revision of the reference, where it is loaded for the check."""
    reference_trust_remote_code: bool = False
    """Run the reference repository's own code."""
    reference_dir: str | None = None
    """Where the reference model lies when it is not the initial policy; read for the check and then dropped."""


class RewardConfig(RewardOptions, RunConfig):
    """A training of a Bradley–Terry reward model."""
