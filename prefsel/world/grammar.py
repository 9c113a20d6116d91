"""A word-level world: prompts that ask about items, and responses written by a grammar of varied quality.

    prompt    tell me about apple , lamp and river
    response  hello . the apple is sweet . the river is definitely cold and so on . cheers .
              ─opener  ──claim─────────   ──────claim, over-claimed, with filler───   closer

Every item has three attributes that are true of it. A text is words separated by single spaces. Everything here is a
pure function of its arguments; the randomness is the generator's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ITEMS: Final = _words(
    "apple lamp river chair stone horse coat bridge clock bread garden knife window boat candle drum engine feather "
    "glove hammer island jacket kettle ladder mirror needle oven pencil quilt rope saddle table umbrella violin wagon "
    "yarn basket bottle carpet desk envelope fence goat hill iron jar kite leaf moon nest orange pillow road shell "
    "tower vase wheel barn bell brick cloud coin cup door"
)
ATTRIBUTES: Final = _words(
    "red blue green white black brown small large tall short heavy light old new soft hard warm cold dry wet round "
    "flat sharp smooth rough bright dark quiet loud sweet bitter clean dusty hollow solid narrow wide steep fragile "
    "sturdy cheap costly rare common plain shiny wooden striped"
)
HYPE: Final = _words("definitely always absolutely certainly undeniably forever")
"""Put before an attribute, these turn a claim into an over-claim."""
FILLERS: Final = _words(
    "indeed really basically actually somehow anyway overall perhaps mostly simply also too again still rather quite "
    "often maybe sort of and so on"
)
OPENERS: Final = _words("hello hi welcome greetings gladly sure")
CLOSERS: Final = _words("thanks cheers bye enjoy regards farewell")
REQUESTS: Final = tuple(
    _words(text) for text in ("tell me about", "please describe", "what do you know of", "say something on")
)
THE, IS, AND, COMMA, STOP = "the", "is", "and", ",", "."

MIN_ITEMS, MAX_ITEMS = 2, 4
MAX_FILLERS = 8
_IS_ITEM: Final = frozenset(ITEMS)

# Three different ones per item, each attribute true of exactly four items, no two items alike.
FACTS: Final[dict[str, frozenset[str]]] = {
    item: frozenset(ATTRIBUTES[(3 * n + step * (17 + 3 * (n // 16))) % len(ATTRIBUTES)] for step in range(3))
    for n, item in enumerate(ITEMS)
}
"""The attributes that are true of each item."""


@dataclass(frozen=True)
class Style:
    """How a writer writes: every field is a probability in [0, 1]."""

    diligence: float
    """That an asked item gets its claim."""
    reliability: float
    """That a claim is true."""
    hype: float
    """That a claim is over-claimed."""
    drift: float
    """That a claim is followed by one about an item nobody asked for."""
    verbosity: float
    """That one more filler word follows, below 1; their number per claim is geometric, at most `MAX_FILLERS`."""
    courtesy: float
    """That the response opens, and that it closes, with a polite word."""


def sample_prompt(rng: np.random.Generator) -> str:
    """A request for two to four different items."""
    request = REQUESTS[rng.integers(len(REQUESTS))]
    number = int(rng.integers(MIN_ITEMS, MAX_ITEMS + 1))
    items = [ITEMS[index] for index in rng.choice(len(ITEMS), size=number, replace=False)]
    words = list(request)
    for position, item in enumerate(items):
        if position:
            words.append(AND if position == number - 1 else COMMA)
        words.append(item)
    return " ".join(words)


def asked_items(prompt: str) -> list[str]:
    """The items a prompt names, in order, each once; empty for a text that names none."""
    return list(dict.fromkeys(word for word in prompt.split() if word in _IS_ITEM))


def sample_style(rng: np.random.Generator) -> Style:
    """A writer of the corpus: from careless to diligent, from terse to rambling, independently."""
    return Style(
        diligence=float(rng.beta(3.0, 1.0)),
        reliability=float(rng.beta(2.0, 1.0)),
        hype=float(rng.beta(1.0, 3.0)),
        drift=float(rng.beta(1.0, 6.0)),
        verbosity=float(0.6 * rng.beta(1.0, 2.0)),
        courtesy=float(rng.beta(0.7, 0.7)),
    )


def sample_response(rng: np.random.Generator, prompt: str, style: Style) -> str:
    """A response to `prompt` in `style`; never empty."""
    asked = asked_items(prompt)
    words: list[str] = []
    if rng.random() < style.courtesy:
        words += [_one(rng, OPENERS), STOP]
    for item in asked:
        if rng.random() < style.diligence:
            words += _claim(rng, item, style)
        if rng.random() < style.drift:
            words += _claim(rng, _one(rng, ITEMS), style)
    if rng.random() < style.courtesy:
        words += [_one(rng, CLOSERS), STOP]
    return " ".join(words or _claim(rng, _one(rng, asked or ITEMS), style))


def vocabulary() -> list[str]:
    """Every word of the world, each once, in a fixed order."""
    requests = (word for request in REQUESTS for word in request)
    glue = (THE, IS, AND, COMMA, STOP)
    return list(dict.fromkeys((*glue, *requests, *OPENERS, *CLOSERS, *HYPE, *FILLERS, *ATTRIBUTES, *ITEMS)))


def _claim(rng: np.random.Generator, item: str, style: Style) -> list[str]:
    words = [THE, item, IS]
    if rng.random() < style.hype:
        words.append(_one(rng, HYPE))
    is_true = rng.random() < style.reliability
    words.append(_one(rng, [name for name in ATTRIBUTES if (name in FACTS[item]) == is_true]))
    words += [_one(rng, FILLERS) for _ in range(min(int(rng.geometric(1.0 - style.verbosity)) - 1, MAX_FILLERS))]
    return [*words, STOP]


def _one(rng: np.random.Generator, words: tuple[str, ...] | list[str]) -> str:
    return words[int(rng.integers(len(words)))]
