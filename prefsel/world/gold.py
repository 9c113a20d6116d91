r"""The gold reward: what a response is worth, computed from its words alone.

Four aspects, each standardised by the mean and standard deviation it has over the grammar's own responses:

    coverage     share of the asked items that got a claim             conflicts with conciseness: claims take words
    sobriety     minus the share of its claims that are false or over-claimed
    courtesy     half for an opening word, half for a closing word
    conciseness  minus the number of words

    gold = 1.0 coverage + 1.0 sobriety + 0.6 courtesy + 0.6 conciseness

Every text scores: what is no well-formed claim is just words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from prefsel.world.grammar import ATTRIBUTES, CLOSERS, FACTS, HYPE, IS, OPENERS, THE, asked_items

ASPECTS: Final = ("coverage", "sobriety", "courtesy", "conciseness")
WEIGHTS: Final = {"coverage": 1.0, "sobriety": 1.0, "courtesy": 0.6, "conciseness": 0.6}

# Mean and standard deviation over 20 000 grammar responses (seed 0): constants, so that gold never depends on a sample.
MOMENTS: Final = {
    "coverage": (0.754, 0.292),
    "sobriety": (-0.486, 0.383),
    "courtesy": (0.501, 0.422),
    "conciseness": (-16.8, 7.64),
}

_ATTRIBUTES: Final = frozenset(ATTRIBUTES)
_HYPE: Final = frozenset(HYPE)


class Claim(NamedTuple):
    """One `the ITEM is [hype] ATTRIBUTE` of a response."""

    item: str
    is_true: bool
    is_overclaimed: bool


def claims(response: str) -> Iterator[Claim]:
    """The well-formed claims of a response, in order."""
    words = response.split()
    for start in range(len(words) - 3):
        the, item, verb = words[start : start + 3]
        if the != THE or verb != IS or item not in FACTS:
            continue
        end = start + 3
        while end < len(words) and words[end] in _HYPE:
            end += 1
        if end < len(words) and words[end] in _ATTRIBUTES:
            yield Claim(item, words[end] in FACTS[item], is_overclaimed=end > start + 3)


def raw_aspects(prompt: str, response: str) -> dict[str, float]:
    """The four aspects in their own units: a share, minus a share, 0 / 0.5 / 1, minus a number of words."""
    made = list(claims(response))
    words = response.split()
    asked = asked_items(prompt)
    covered = {claim.item for claim in made}.intersection(asked)
    polite = (bool(words) and words[0] in OPENERS) + (any(word in CLOSERS for word in words[-2:]))
    return {
        # Nothing asked, nothing missed.
        "coverage": len(covered) / len(asked) if asked else 1.0,
        "sobriety": -sum(claim.is_overclaimed or not claim.is_true for claim in made) / max(len(made), 1),
        "courtesy": polite / 2,
        "conciseness": -float(len(words)),
    }


def aspects(prompt: str, response: str) -> dict[str, float]:
    """The four aspects in standard deviations of the grammar's responses, larger is better."""
    raw = raw_aspects(prompt, response)
    return {name: (raw[name] - mean) / std for name, (mean, std) in MOMENTS.items()}


def gold(prompt: str, response: str) -> float:
    """The weighted sum of the four aspects; 0 on average over the grammar's responses."""
    return weighted(aspects(prompt, response))


def weighted(scores: dict[str, float]) -> float:
    """The gold reward of four standardised aspects."""
    return sum(weight * scores[name] for name, weight in WEIGHTS.items())
