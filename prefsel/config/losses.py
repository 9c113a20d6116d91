"""Every preference loss by its configuration name: where its function lies and what it is called with. No torch here.

A loss is one function, by custom in `prefsel/train/losses.py`, and one line in `LOSSES`. The configuration checks its
options by the line; only the workers that train import the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prefsel.errors import invalid
from prefsel.plugins.contracts import LOSS_COLUMNS
from prefsel.plugins.registry import Registry


@dataclass(frozen=True)
class Loss:
    """A preference loss, as the configuration and the training loop know it.

    The function is called with the policy's log-probs of chosen and rejected, [N] each; then those of the reference,
    unless it has none; then by name with `beta`, the response lengths, columns and options stated here. It returns one
    loss per pair, [N].
    """

    function: str | Callable[..., Any]
    """The function, or where it lies, as `package.module:function`: then torch is imported only to train."""
    uses_reference: bool = True
    """Whether the reference's log-probs follow the policy's; without, a training names no `reference`."""
    uses_lengths: bool = False
    """Whether it takes `num_tokens_chosen` and `num_tokens_rejected`, [N] each."""
    columns: tuple[str, ...] = ()
    """Names in `LOSS_COLUMNS`: numbers of every pair, [N] each, that it takes by these names."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Parameter → the field of `DpoOptions` whose value it is."""
    params: Mapping[str, float | str] = field(default_factory=dict)
    """Further parameters with their defaults, which a training sets in `loss_params`."""

    def parameters(self, options: Any) -> dict[str, float | str]:
        """What the options of a training, a `DpoOptions`, say about the parameters of the function."""
        named = {name: getattr(options, given) for name, given in self.options.items()}
        return {"beta": options.beta, **named, **self.params, **options.loss_params}

    def compares_means(self, options: Any) -> bool:
        """Whether it compares log-probs per token."""
        return self.uses_lengths and self.parameters(options).get("reduction", "mean") == "mean"


def _ours(name: str) -> str:
    return f"prefsel.train.losses:{name}"


LOSSES: Final[Registry[Loss]] = Registry(
    "losses",
    {
        "dpo": Loss(_ours("dpo_loss"), options={"label_smoothing": "label_smoothing"}),
        "robust_dpo": Loss(_ours("robust_dpo_loss"), options={"label_smoothing": "label_smoothing"}),
        "ipo": Loss(_ours("ipo_loss"), uses_lengths=True, options={"reduction": "ipo_reduction"}),
        "hinge": Loss(_ours("hinge_loss")),
        "simpo": Loss(_ours("simpo_loss"), uses_reference=False, uses_lengths=True, options={"gamma": "simpo_gamma"}),
        "length_normalised_dpo": Loss(_ours("length_normalised_dpo_loss"), uses_lengths=True),
        "dfpo": Loss(_ours("dfpo_loss"), columns=("preference_divergence",), options={"num_aspects": "num_aspects"}),
        "weighted_dfpo": Loss(_ours("weighted_dfpo_loss"), columns=("preference_divergence", "aspect_weight")),
    },
)
"""Every loss the training loop offers, those of plugins included."""


def loss_named(name: str) -> Loss:
    """The loss of a configuration name; everything that needs a loss asks here.

    Raises:
        UserError: There is none of that name.
    """
    if name not in LOSSES:
        raise invalid("loss", name, LOSSES)
    return LOSSES[name]


def used_options(loss: Loss) -> set[str]:
    """The fields of `DpoOptions` that belong to a loss, besides `beta`."""
    return {*loss.options.values(), *(LOSS_COLUMNS[name] for name in loss.columns if name in LOSS_COLUMNS)}


def losses_with(option: str) -> list[str]:
    """Names of the losses of this package that an option of `DpoOptions` belongs to."""
    return [name for name, loss in LOSSES.builtin.items() if option in used_options(loss)]


WEIGHTS: Final = {
    "loss": (math.inf, "from 0"),
    "label": (1.0, "from 0 to 1, as weighting 'label' takes them for probabilities"),
}
"""By what weights do, the largest one there may be (the smallest is 0), and both in words."""


def cannot_exchange(loss: Loss, options: Any) -> str:
    """Why a loss with chosen and rejected exchanged is not that of the turned label; empty where it is.

    Args:
        loss: Any.
        options: Of the training, a `DpoOptions`.
    """
    if loss.columns:
        return f"which takes {', '.join(loss.columns)} of the pair as labelled"
    if smoothing := loss.parameters(options).get("label_smoothing"):
        return f"which assumes already that a share of {smoothing:g} of the labels is turned (label_smoothing)"
    return ""
