from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from prefsel.world.gold import claims
from prefsel.world.grammar import (
    ATTRIBUTES,
    CLOSERS,
    FACTS,
    ITEMS,
    OPENERS,
    Style,
    asked_items,
    sample_prompt,
    sample_response,
    sample_style,
    vocabulary,
)

PERFECT = Style(diligence=1, reliability=1, hype=0, drift=0, verbosity=0, courtesy=1)
PROMPT = "tell me about apple , lamp and river"


def texts(seed: int, number: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    prompts = [sample_prompt(rng) for _ in range(number)]
    return [(prompt, sample_response(rng, prompt, sample_style(rng))) for prompt in prompts]


def test_the_same_seed_writes_the_same_texts():
    assert texts(1, 20) == texts(1, 20)
    assert texts(1, 20) != texts(2, 20)


def test_every_item_has_three_facts_shared_with_no_twin_and_every_attribute_four_items():
    assert len(FACTS) == len(set(ITEMS)) == 64
    assert {len(facts) for facts in FACTS.values()} == {3}
    assert len(set(FACTS.values())) == 64
    assert set(Counter(name for facts in FACTS.values() for name in facts).values()) == {4}


def test_a_prompt_asks_for_two_to_four_different_items():
    prompts = [prompt for prompt, _ in texts(0, 200)]
    assert {len(asked_items(prompt)) for prompt in prompts} == {2, 3, 4}
    assert all(sum(word in ITEMS for word in prompt.split()) == len(asked_items(prompt)) for prompt in prompts)
    assert asked_items(PROMPT) == ["apple", "lamp", "river"]
    assert asked_items("nothing here") == []


def test_all_words_are_in_the_vocabulary_separated_by_single_spaces():
    words = vocabulary()
    assert len(words) == len(set(words))
    for prompt, response in texts(3, 200):
        for text in (prompt, response):
            assert text == " ".join(text.split())
            assert set(text.split()) <= set(words)
        assert response


def test_a_perfect_writer_answers_every_item_truly_and_politely():
    response = sample_response(np.random.default_rng(0), PROMPT, PERFECT).split()
    assert response[0] in OPENERS
    assert response[-2] in CLOSERS
    # opener . / the ITEM is ATTRIBUTE . three times / closer .
    assert len(response) == 2 + 3 * 5 + 2
    assert [response[at : at + 2] for at in (2, 7, 12)] == [["the", "apple"], ["the", "lamp"], ["the", "river"]]
    assert all(response[at] in FACTS[item] for at, item in ((5, "apple"), (10, "lamp"), (15, "river")))


@pytest.mark.parametrize(
    ("field", "value", "holds"),
    [
        ("reliability", 0.0, lambda claim: not claim.is_true),
        ("hype", 1.0, lambda claim: claim.is_overclaimed),
        ("hype", 0.0, lambda claim: not claim.is_overclaimed),
    ],
)
def test_a_style_decides_about_every_claim(field, value, holds):
    style = Style(**{**vars(PERFECT), field: value})
    rng = np.random.default_rng(4)
    found = [claim for _ in range(30) for claim in claims(sample_response(rng, PROMPT, style))]
    assert len(found) == 90
    assert all(holds(claim) for claim in found)


def test_verbosity_and_drift_lengthen_a_response():
    def mean_words(**changes):
        rng = np.random.default_rng(5)
        style = Style(**{**vars(PERFECT), **changes})
        return np.mean([len(sample_response(rng, PROMPT, style).split()) for _ in range(200)])

    assert mean_words() == 19
    # A geometric number of fillers of mean 0.5 / (1 - 0.5) = 1 after each of three claims.
    assert mean_words(verbosity=0.5) == pytest.approx(22, abs=0.5)
    # One more claim of five words after each.
    assert mean_words(drift=1.0) == 34


def test_a_silent_writer_still_says_something():
    style = Style(diligence=0, reliability=1, hype=0, drift=0, verbosity=0, courtesy=0)
    response = sample_response(np.random.default_rng(0), PROMPT, style).split()
    assert response[1] in ("apple", "lamp", "river")
    assert response[3] in ATTRIBUTES
