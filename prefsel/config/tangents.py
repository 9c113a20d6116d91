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
    """Name of the tangent, by which scorers and metrics mean it."""
    model: str
    """The warm-up model θ at which the gradient is taken: an entry of `models` or of `train`."""
    reference: str
    """The model whose stored log-probs are the reference of the validation loss; a `causal_logps` scorer must make
    them."""
    beta: float = Field(0.1, gt=0)
    """β of the validation loss. The influence of a pair is exact for this β, and a metric with another one is
    refused."""
    preconditioner: Literal["none", "adam", "fisher"] = "none"
    """`none` keeps the plain gradient. `adam` divides it by √(second moment) + damping, with the moments of the
    warm-up's Adam, which must be a training with `keep_optimizer_state`; `fisher` does so with the mean squared
    validation gradient over pairs (empirical Fisher)."""
    damping: float = Field(1e-8, gt=0)
    """Added to the root of the second moment before dividing; it should be small beside the largest root. OPEN: no
    source gives a value."""
    by: Literal["aspect", "source"] | None = None
    """Column whose values part the validation pairs into strata, with one direction each; null means one direction."""
    values: list[str] = []
    """The strata: values of `by`. They must be named, because columns are named after them before any data is read."""
    max_pairs: int | None = Field(None, ge=1)
    """Use at most this many validation pairs, the first by hash of their pair_id; null means all."""
    dtype: Dtype = "fp32"
    """Number format of the weights while the gradient is taken; finite differences need `fp32`."""

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
