"""What one reward-model training is configured with. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefsel.config import RewardOptions


class RewardConfig(RewardOptions):
    """The options a user writes, and what the rest of the configuration says about the model."""

    max_length: int | None = Field(ge=2)
    """Longest prompt + completion in tokens, as the model will score with; None: no limit."""
    template: str = "auto"
    """Chat template, as in scoring."""
    truncation: Literal["drop", "right", "left"] = "drop"
    """What happens to a completion over max_length; `drop` leaves its pair out and counts it."""
    revision: str | None = None
    """Exact revision of the model, needed for `trust_remote_code`."""
    trust_remote_code: bool = False
    """Run the model repository's own code."""
