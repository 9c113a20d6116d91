"""How a prompt with K judged responses becomes pairs: one record per rule, applied in `pairs/pairing.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prefsel.config.options import Options


class JudgedPairing(Options):
    """What the rules that read the numbers of judges have in common.

    A response without a number takes part in no pair. Two responses of the same text are never paired.
    """

    require_all: bool = False
    """Drop a prompt whole when one of its responses has no number of a judge, as the authors of alignment potential do.
    Otherwise pairs are made of the responses that have one."""
    num_expected: int | None = Field(None, ge=2)
    """With `require_all`: how many responses a prompt must have; one with fewer is dropped whole. Null asks for none
    but the two of a pair."""

    @model_validator(mode="after")
    def _all_of_how_many(self) -> JudgedPairing:
        if self.num_expected is not None and not self.require_all:
            raise ValueError(f"num_expected: got {self.num_expected} without require_all; valid: with require_all only")
        return self


class BestWorst(JudgedPairing):
    """One pair per prompt: its best response against its worst."""

    kind: Literal["best_worst"] = "best_worst"
    """The best response against the worst."""


class BestRandom(JudgedPairing):
    """One pair per prompt: its best response against another one, drawn among those that are strictly worse."""

    kind: Literal["best_random"] = "best_random"
    """The best response against one drawn among the worse ones."""
    seed: int = 0
    """Seed of the draw. It follows from this and the pair_ids alone, so neither order nor sharding changes it."""


class AboveMargin(JudgedPairing):
    """Every two responses of a prompt that the judge holds far enough apart."""

    kind: Literal["above_margin"] = "above_margin"
    """Every two responses further apart than a margin."""
    margin: float = Field(0.0, ge=0, allow_inf_nan=False)
    """The judge's number of the chosen response must be larger by more than this, in the judge's own unit; 0 takes
    every two responses that are not tied."""
    max_pairs: int | None = Field(None, ge=1)
    """At most this many pairs of one prompt, those of the largest margins, ties by pair_id; null takes all."""


class Confidence(JudgedPairing):
    """Pairs that several judges, or several heads of one, agree on: the lower bound of the chosen response lies above
    the upper bound of the rejected one.

    The bounds of a response are the mean of its numbers ± `width` times their population standard deviation. So the
    judges must speak one scale.
    """

    kind: Literal["confidence"] = "confidence"
    """Two responses whose bounds over several judges do not overlap."""
    width: float = Field(1.0, ge=0, allow_inf_nan=False)
    """How many population standard deviations the bounds lie from the mean; 0 compares the means."""
    all: bool = False
    """Take every two responses whose bounds do not overlap, instead of the two with the widest gap between them."""
    max_pairs: int | None = Field(None, ge=1)
    """With `all`: at most this many pairs of one prompt, those with the widest gaps, ties by pair_id."""

    @model_validator(mode="after")
    def _most_of_all(self) -> Confidence:
        if self.max_pairs is not None and not self.all:
            raise ValueError(f"max_pairs: got {self.max_pairs} without all; valid: with all only")
        return self


class ByGenerator(Options):
    """Delta learning (2507.06187): the response of a strong model against that of a weak one, without any judge."""

    kind: Literal["by_generator"] = "by_generator"
    """What a strong model wrote against what a weak one wrote."""
    strong: str
    """The generator whose responses are chosen."""
    weak: str
    """The generator whose responses are rejected."""
    max_length_difference: int | None = Field(100, ge=0)
    """Most tokens by which the two responses may differ in length (100 is the authors' limit for chat); null sets no
    limit. With one, a response of unknown length takes part in no pair."""
    all: bool = False
    """Take every response of the one against every response of the other, instead of one pair per prompt, drawn."""
    seed: int = 0
    """Seed of the draw, as of `best_random`."""

    @model_validator(mode="after")
    def _two_generators(self) -> ByGenerator:
        if self.strong == self.weak:
            raise ValueError(f"weak: got {self.weak!r}, which is strong too; valid: the name of another generator")
        return self


Pairing = Annotated[BestWorst | BestRandom | AboveMargin | Confidence | ByGenerator, Field(discriminator="kind")]
"""How the responses to one prompt become pairs."""
