from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.evaluate.diversity import corpus_distinct, diversity, prompt_diversity

TEXT = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=9).map(" ".join)


def grams(text: str, n: int) -> list[str]:
    """By a loop over the places of the text."""
    words = text.split()
    return [" ".join(words[start : start + n]) for start in range(len(words)) if start + n <= len(words)]


def test_two_answers_that_can_be_checked_by_eye() -> None:
    found = prompt_diversity(["a b a b", "a b"])
    # Words a b a b a b: 2 of 6. Bigrams ab ba ab ab: 2 of 4. Trigrams aba bab: 2 of 2. One 4-gram.
    assert found.distinct == (2 / 6, 2 / 4, 2 / 2, 1.0)
    # {⊢a ab ba b⊣} and {⊢a ab b⊣}
    assert found.self_similarity == 3 / 4
    assert found.repetition == (0.0, None)
    assert found.words == (4, 2)


def test_repetition_is_the_share_of_4_grams_that_stood_before() -> None:
    # x y x y x y x y: 4-grams xyxy yxyx xyxy yxyx xyxy; three of five repeat.
    assert prompt_diversity(["x y " * 4]).repetition == (pytest.approx(3 / 5),)
    assert prompt_diversity(["one two three four five six"]).repetition == (0.0,)


def test_the_same_answer_and_other_answers() -> None:
    assert prompt_diversity(["yes", "yes", "yes"]).self_similarity == 1.0
    assert prompt_diversity(["yes", "no"]).self_similarity == 0.0
    assert prompt_diversity(["", ""]).self_similarity == 1.0
    assert prompt_diversity(["yes"]).self_similarity is None
    assert prompt_diversity([""]).distinct == (None,) * 4


@given(st.lists(TEXT, min_size=1, max_size=5))
def test_distinct_n_is_a_loop_over_n_grams(texts: list[str]) -> None:
    naive = []
    for n in range(1, 5):
        every = [gram for text in texts for gram in grams(text, n)]
        naive.append(len(set(every)) / len(every) if every else None)
    assert prompt_diversity(texts).distinct == tuple(naive)
    assert corpus_distinct(texts) == tuple(naive)


@given(st.lists(TEXT, min_size=2, max_size=4))
def test_self_similarity_is_a_loop_over_pairs(texts: list[str]) -> None:
    sets = [set(grams(f"⊢ {text} ⊣", 2)) for text in texts]
    shares = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i in range(len(sets)) for j in range(i)]
    assert prompt_diversity(texts).self_similarity == pytest.approx(sum(shares) / len(shares))


def test_a_model_that_says_less_and_again_is_seen() -> None:
    varied = {f"{n}": [f"the {n} is {k} and {k + n} of {n * k} things we know" for k in range(4)] for n in range(30)}
    stuck = {f"{n}": ["the thing is the thing is the thing is the thing"] * 4 for n in range(30)}
    one, other = diversity(varied), diversity(stuck)
    assert one.self_similarity.high < 0.5  # type: ignore[union-attr,operator]
    assert other.self_similarity.mean == 1.0  # type: ignore[union-attr]
    assert one.distinct[1].low > other.distinct[1].high  # type: ignore[union-attr,operator]
    assert one.corpus_distinct[1] > 10 * other.corpus_distinct[1]  # type: ignore[operator]
    # the thing is the | thing is the thing | is the thing is, and again: 8 4-grams, three of them new.
    assert other.repetition.mean == pytest.approx(5 / 8)  # type: ignore[union-attr]
    assert one.repetition.mean == 0.0  # type: ignore[union-attr]
    assert (other.words.mean, other.num_empty) == (11.0, 0)
    assert (one.words.num_items, one.words.num_prompts) == (120, 30)


def test_empty_answers_count_as_answers() -> None:
    found = diversity({"a": ["", "one two"], "b": [""]})
    assert found.num_empty == 2
    assert found.words.mean == pytest.approx(2 / 3)
    assert found.repetition is None
    assert found.distinct[0].num_prompts == 1  # type: ignore[union-attr]
