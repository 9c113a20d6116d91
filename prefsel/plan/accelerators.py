"""What one GPU of each kind holds and does, by the name that Ray calls the kind by (`accelerator_type`).

    FLOPs ÷ (peak × share) = seconds          memory_gib ≥ what a replica needs: it fits

A share is useful work over the maker's dense 16-bit peak: the least floating-point operations that the groups need,
over what the device's matrix units could have done in that time. `measured` says whether somebody ran this package on
such a device; the others are stated, and on the careful side.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from prefsel.errors import invalid


@dataclass(frozen=True)
class Share:
    """Which part of the peak one kind of work gets."""

    of_peak: float
    """Above 0, at most 1."""
    measured: bool
    source: str
    """Where the number comes from, a sentence."""


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU."""

    name: str
    """As Ray's `accelerator_type`, which nodes announce as the resource `accelerator_type:<name>`."""
    memory_gib: float
    """What a process can use of it, which is less than the maker's round number."""
    peak_tflops: float
    """Matrix products of 16-bit numbers, dense, 1e12 floating-point operations a second."""
    scoring: Share
    training: Share
    has_bf16: bool = True
    """Whether its matrix units take bf16; without, `dtype: fp16`."""


FORWARD = (
    "stated: a published training of packed prompt trees reached 44 % of the peak of an H100, a forward pass alone "
    "gets no less; a quarter is taken off"
)
BACKWARD = "stated: as scoring, less a tenth of it for the optimizer step and the exchange between workers"
SMALL = "stated: as for larger GPUs, less a fifth for a power limit below what the peak needs"


def _shares(scoring: float, source: str = FORWARD) -> tuple[Share, Share]:
    return Share(scoring, False, source), Share(0.9 * scoring, False, BACKWARD)


ACCELERATORS = MappingProxyType(
    {
        one.name: one
        for one in (
            Accelerator("T4", 14.5, 65, *_shares(0.26, SMALL), has_bf16=False),
            Accelerator("L4", 22.0, 121, *_shares(0.26, SMALL)),
            Accelerator("A10G", 22.0, 70, *_shares(0.26, SMALL)),
            Accelerator("L40S", 44.3, 362, *_shares(0.26, SMALL)),
            Accelerator("A100-40G", 39.3, 312, *_shares(0.33)),
            Accelerator("A100-80G", 79.1, 312, *_shares(0.33)),
            Accelerator("H100", 79.1, 989, *_shares(0.33)),
            Accelerator("H200", 139.7, 989, *_shares(0.33)),
            Accelerator("B200", 178.0, 2250, *_shares(0.26)),
            Accelerator("AMD-Instinct-MI300X-OAM", 191.0, 1307, *_shares(0.26)),
        )
    }
)
"""By name, each maker's from small to large. Ray also calls both A100s `A100`, which says nothing of their
memory, so it is not among them."""


def find_accelerator(name: str, *, field: str = "--accelerator") -> Accelerator:
    """One kind of GPU.

    Raises:
        UserError: it is not in the table; names those that are.
    """
    if name not in ACCELERATORS:
        raise invalid(field, name, ACCELERATORS)
    return ACCELERATORS[name]


def smallest_for(memory_gib: float, dtype: str = "fp32") -> Accelerator | None:
    """The kind of GPU with the least memory that holds so much and takes the dtype, of two the slower; None: none."""
    able = [one for one in ACCELERATORS.values() if one.has_bf16 or dtype != "bf16"]
    fitting = [one for one in able if one.memory_gib >= memory_gib]
    return min(fitting, key=lambda one: (one.memory_gib, one.peak_tflops), default=None)
