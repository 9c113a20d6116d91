"""Labels of the world: noisy per-aspect ratings of a corpus, and fresh aspect-labelled pairs for reward models.

A rating is the aspect in standard deviations plus noise, shifted to 3, rounded and cut to 1 … 5. An aspect of a row
*slips* when its annotator took best for worst: all its ratings r become 6 - r. No label is told the gold reward.

Three disjoint parts of all prompts, by hash: `corpus` is rated and selected from, `proxy` trains models, `heldout`
measures them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from prefsel.world.gold import ASPECTS, aspects
from prefsel.world.grammar import sample_prompt, sample_response, sample_style

Part = Literal["corpus", "proxy", "heldout"]

SLIP: Final = 0.1
"""Probability that an aspect of a row, or the label of a pair, is reversed."""
RATING_NOISE: Final = 0.5
"""Standard deviation of a rating's noise, in standard deviations of its aspect (which is one step of the scale)."""
SOURCE: Final = "world"


def part_of(prompt: str) -> Part:
    """The part a prompt belongs to: 30 % corpus, 60 % proxy, 10 % heldout."""
    tenth = int.from_bytes(blake2b(prompt.encode("utf-8"), digest_size=8).digest(), "big") % 10
    return "corpus" if tenth < 3 else "heldout" if tenth == 9 else "proxy"


def sample_prompts(rng: np.random.Generator, number: int, part: Part) -> list[str]:
    """So many different prompts of one part."""
    found: dict[str, None] = {}
    while len(found) < number:
        prompt = sample_prompt(rng)
        if part_of(prompt) == part:
            found[prompt] = None
    return list(found)


def rate(
    rng: np.random.Generator,
    prompt: str,
    responses: Sequence[str],
    *,
    noise: float = RATING_NOISE,
    slip: float = SLIP,
) -> list[dict[str, int]]:
    """Ratings 1 to 5 of every response by aspect.

    Args:
        rng: Source of noise and slips.
        prompt: What the responses answer.
        responses: All responses of one row: an aspect slips for all of them or none.
        noise: Standard deviation of the noise, in standard deviations of the aspect.
        slip: Probability that an aspect of this row is reversed.
    """
    values_RA = np.array([[aspects(prompt, response)[name] for name in ASPECTS] for response in responses])
    noisy_RA = 3.0 + values_RA + noise * rng.standard_normal(values_RA.shape)
    ratings_RA = np.clip(np.rint(noisy_RA), 1, 5).astype(int)
    has_slipped_A = rng.random(len(ASPECTS)) < slip
    ratings_RA = np.where(has_slipped_A, 6 - ratings_RA, ratings_RA)
    return [dict(zip(ASPECTS, row)) for row in ratings_RA.tolist()]


def corpus_row(rng: np.random.Generator, prompt: str, responses: Sequence[str]) -> dict[str, Any]:
    """A row as UltraFeedback writes it: `instruction` and rated `completions`, each with an overall score.

    The overall score (1 to 10) is a coarse judgement of its own: twice the mean rating with unit noise, drawn from the
    prompt, so that it takes nothing from `rng`.
    """
    rated = rate(rng, prompt, responses)
    noise = np.random.default_rng(list(prompt.encode())).standard_normal(len(rated))
    overall = np.clip(np.rint([2 * np.mean(list(row.values())) for row in rated] + noise), 1, 10)
    return {
        "source": SOURCE,
        "instruction": prompt,
        "completions": [
            {
                "response": response,
                "annotations": {name: {"Rating": str(value)} for name, value in ratings.items()},
                "overall_score": float(score),
            }
            for response, ratings, score in zip(responses, rated, overall)
        ],
    }


@dataclass(frozen=True)
class AspectPair:
    """Two responses of which a label prefers `chosen`, in one aspect."""

    prompt: str
    chosen: str
    rejected: str
    aspect: str
    has_slipped: bool


def label_pair(
    rng: np.random.Generator, prompt: str, first: str, second: str, *, slip: float = SLIP
) -> AspectPair | None:
    """The label of one random aspect, wrong with probability `slip`; None when the two tie in it."""
    aspect = ASPECTS[int(rng.integers(len(ASPECTS)))]
    difference = aspects(prompt, first)[aspect] - aspects(prompt, second)[aspect]
    has_slipped = bool(rng.random() < slip)
    if difference == 0:
        return None
    chosen, rejected = (first, second) if (difference > 0) != has_slipped else (second, first)
    return AspectPair(prompt, chosen, rejected, aspect, has_slipped)


def proxy_pairs(rng: np.random.Generator, number: int) -> list[AspectPair]:
    """Fresh labelled pairs on `proxy` prompts, written by two random writers each: `number` labels are their cost."""
    pairs: list[AspectPair] = []
    while len(pairs) < number:
        (prompt,) = sample_prompts(rng, 1, "proxy")
        first, second = (sample_response(rng, prompt, sample_style(rng)) for _ in range(2))
        pair = label_pair(rng, prompt, first, second)
        if pair is not None:
            pairs.append(pair)
    return pairs


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON object a line; dataclasses become objects. The file appears complete or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            value = row if isinstance(row, dict | str) else asdict(row)
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    partial.replace(path)
