from __future__ import annotations

import numpy as np
import pytest

from prefsel.world.gold import ASPECTS, Claim, aspects, claims, gold, raw_aspects
from prefsel.world.grammar import FACTS, sample_prompt, sample_response, sample_style

PROMPT = "tell me about apple , lamp and river"

# Worked by hand: apple is red, cold or solid; lamp is white, round or steep; chair is never red.
WRITTEN = [
    # two of three items; one of two claims is over-claimed; both polite words; 15 words
    ("hello . the apple is red . the lamp is definitely white . thanks .", (2 / 3, -1 / 2, 1.0, -15)),
    # one item of three; false; only an opening
    ("hi . the apple is blue .", (1 / 3, -1.0, 0.5, -7)),
    # an over-claim that is also false counts once; the same item twice covers once; only a closing
    ("the lamp is always red . the lamp is round . bye .", (1 / 3, -1 / 2, 0.5, -13)),
    # claims about items that nobody asked for cover nothing but must be true
    ("the chair is red so on .", (0.0, -1.0, 0.0, -7)),
    # no claim: nothing covered, nothing false; a closer in the middle closes nothing
    ("thanks for nothing at all", (0.0, 0.0, 0.0, -5)),
    ("", (0.0, 0.0, 0.0, 0)),
    ("the apple is definitely", (0.0, 0.0, 0.0, -4)),
    ("the apple is is red", (0.0, 0.0, 0.0, -5)),
    ("the lamp the is white", (0.0, 0.0, 0.0, -5)),
]


@pytest.mark.parametrize(("response", "expected"), WRITTEN)
def test_raw_aspects_of_written_responses(response, expected):
    assert FACTS["apple"] == {"red", "cold", "solid"}
    assert FACTS["lamp"] == {"white", "round", "steep"}
    assert "red" not in FACTS["chair"]
    assert raw_aspects(PROMPT, response) == dict(zip(ASPECTS, map(pytest.approx, expected)))


def test_gold_by_hand():
    response = WRITTEN[0][0]
    by_hand = {
        "coverage": (2 / 3 - 0.754) / 0.292,
        "sobriety": (-0.5 + 0.486) / 0.383,
        "courtesy": (1 - 0.501) / 0.422,
        "conciseness": (-15 + 16.8) / 7.64,
    }
    assert aspects(PROMPT, response) == pytest.approx(by_hand)
    # -0.2991 - 0.0366 + 0.6 * (1.1825 + 0.2356)
    assert gold(PROMPT, response) == pytest.approx(0.5152, abs=1e-4)


def test_claims_are_found_between_other_words():
    text = "well the apple is red the lamp is always undeniably blue . the moon is wet"
    assert list(claims(text)) == [
        Claim("apple", True, False),
        Claim("lamp", False, True),
        Claim("moon", "wet" in FACTS["moon"], False),
    ]


@pytest.mark.parametrize("response", ["the", "the apple", "is is is", "\n\t", "🙂 the apple is", "<|end|>" * 3])
def test_any_text_scores(response):
    assert np.isfinite(gold(PROMPT, response))
    assert np.isfinite(gold("", response))
    assert raw_aspects("", response)["coverage"] == 1.0


def sampled(number: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    prompts = [sample_prompt(rng) for _ in range(number)]
    scored = [aspects(prompt, sample_response(rng, prompt, sample_style(rng))) for prompt in prompts]
    return np.array([[row[name] for name in ASPECTS] for row in scored])


def test_the_aspects_of_the_grammar_are_standardised():
    values_NA = sampled(4000, seed=77)
    np.testing.assert_allclose(values_NA.mean(axis=0), 0.0, atol=0.06)
    np.testing.assert_allclose(values_NA.std(axis=0), 1.0, atol=0.06)


def test_coverage_and_conciseness_conflict():
    correlation_AA = np.corrcoef(sampled(2000, seed=8).T)
    assert correlation_AA[ASPECTS.index("coverage"), ASPECTS.index("conciseness")] < -0.4


def test_a_better_response_earns_more_in_each_aspect_alone():
    base = "the apple is red . the lamp is white ."
    assert gold(PROMPT, "the apple is red . the chair is brown .") < gold(PROMPT, base)
    assert gold(PROMPT, "the apple is red . the lamp is blue .") < gold(PROMPT, base)
    assert gold(PROMPT, base + " indeed so on") < gold(PROMPT, base)
    assert gold(PROMPT, base + " thanks .") > gold(PROMPT, base)
