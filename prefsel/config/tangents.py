"""Tangents: directions along which log-probs are differentiated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prefsel.config.lookup import Lookup, require_model, require_reference, require_single, require_validation
from prefsel.config.options import Dtype, Name, Options
from prefsel.errors import invalid


class Tangent(Options):
    """A direction in the space of a model's weights: the mean DPO gradient of the validation pairs, or what a diagonal
    makes of it. Along it `directional_logps` gives the influence of every pair."""

    name: Name
    model: str
    """The warm-up θ: an entry of `models` or of `train`."""
    reference: str
    """The model whose stored log-probs are the reference."""
    beta: float = Field(0.1, gt=0)
    """Of the validation loss. The influence of a pair is exact for this beta; a metric that has another is refused."""
    preconditioner: Literal["none", "adam", "fisher"] = "none"
    """Divide by `sqrt(second moment) + damping`: that of the warm-up's Adam (which must be a training with
    `keep_optimizer_state`), or the mean squared validation gradient over pairs (empirical Fisher)."""
    damping: float = Field(1e-8, gt=0)
    """OPEN: no source gives one; relative to the largest root of the second moment it should stay small."""
    by: Literal["aspect", "source"] | None = None
    """One direction per stratum of the validation pairs."""
    values: list[str] = []
    """The strata: values of `by`."""
    max_pairs: int | None = Field(None, ge=1)
    """Use at most this many validation pairs, the first by hash of their pair_id."""
    dtype: Dtype = "fp32"

    @model_validator(mode="after")
    def _strata_named(self) -> Tangent:
        if bool(self.by) != bool(self.values):
            raise ValueError("by and values go together: the strata must be known before the data is read")
        return self

    @property
    def directions(self) -> list[str]:
        """Names of the directions, which name columns: the tangent's own, or `<name>-<stratum>`."""
        return [f"{self.name}-{value}" for value in self.values] or [self.name]

    def check(self, config: Lookup) -> None:
        """Refuse what cannot be differentiated in this configuration.

        Raises:
            UserError: names the field, the value and the valid ones.
        """
        field = f"tangents.{self.name}"
        require_model(config, f"{field}.model", self.model, "policy")
        require_reference(config, f"{field}.reference", self.reference)
        for key, name in (("model", self.model), ("reference", self.reference)):
            require_single(config, f"{field}.{key}", name)
        if self.preconditioner == "adam":
            self.require_adam(config)
        require_validation(config, field)

    def require_adam(self, config: Lookup) -> None:
        """Refuse a model without the moments of its optimizer; errors as `check`."""
        kept = [spec.name for spec in config.train if spec.keep_optimizer_state]
        if self.model not in kept:
            valid = kept or "none: no training has keep_optimizer_state"
            raise invalid(f"tangents.{self.name}.model", self.model, valid)
