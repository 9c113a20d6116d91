r"""How much answers repeat themselves and each other: numbers of words and n-grams, from texts alone.

A word is what stands between white space, as it is written; an n-gram is n of them in a row, within one answer.

    distinct-n         different n-grams / n-grams, over the answers to one prompt, and over all answers
    self-similarity    mean over pairs of answers to a prompt of \(|G_i \cap G_j| / |G_i \cup G_j|\), G the set of the
                       answer's bigrams with a mark before its first word and one behind its last
    repetition         share of the 4-grams of an answer that stand in it before
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefsel.evaluate.bootstrap import NUM_DRAWS, bootstrap_estimate
from prefsel.evaluate.intervals import Estimate, Values

LONGEST = 4
"""distinct-1 to distinct-4."""
REPEATED = 4
"""Words of the n-grams that `repetition` counts."""
_START, _END = object(), object()


@dataclass(frozen=True)
class PromptDiversity:
    """Of the answers to one prompt; O(answers) numbers, so those of all prompts fit on one machine."""

    distinct: tuple[float | None, ...]
    """distinct-1 to distinct-4 over its answers; None where no answer has so many words."""
    self_similarity: float | None
    """None of a single answer."""
    repetition: tuple[float | None, ...]
    """Of each answer; None where it has fewer than four words."""
    words: tuple[int, ...]
    """Of each answer."""


@dataclass(frozen=True)
class Diversity:
    """Of the answers to all prompts: means with percentile intervals over prompts, None where nothing has a value."""

    distinct: tuple[Estimate | None, ...]
    """distinct-1 to distinct-4, each prompt's over its answers. It falls with the number of answers: compare models
    with equally many."""
    corpus_distinct: tuple[float | None, ...]
    """distinct-1 to distinct-4 over all answers. It falls with their number and length."""
    self_similarity: Estimate | None
    """0 where no two answers share a bigram, 1 where all are the same; over prompts of two answers and more."""
    repetition: Estimate | None
    """Over the answers of four words and more."""
    words: Estimate
    num_empty: int
    """Answers without a word."""


def prompt_diversity(answers: Sequence[str]) -> PromptDiversity:
    """The numbers of one prompt's answers, at least one."""
    texts = [answer.split() for answer in answers]
    edged = [set(_ngrams([_START, *words, _END], 2)) for words in texts]
    pairs = [len(one & other) / len(one | other) for one, other in itertools.combinations(edged, 2)]
    return PromptDiversity(
        tuple(distinct([gram for words in texts for gram in _ngrams(words, n)]) for n in range(1, LONGEST + 1)),
        sum(pairs) / len(pairs) if pairs else None,
        tuple(_repeated(words) for words in texts),
        tuple(map(len, texts)),
    )


def distinct(ngrams: Sequence[object]) -> float | None:
    """The share of different ones; None without any.

    Source: Li et al. 2016 (arXiv 1510.03055), section 5.2, for n-grams of any length.
    """
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def corpus_distinct(answers: Sequence[str]) -> tuple[float | None, ...]:
    """distinct-1 to distinct-4 over all answers, exactly: a number per word and n-gram, not its text, is kept."""
    known: dict[str, int] = {}
    word_T = np.array([known.setdefault(word, len(known)) for text in answers for word in text.split()], np.int64)
    answer_T = np.repeat(np.arange(len(answers)), [len(text.split()) for text in answers])
    found: list[float | None] = []
    gram_T = word_T
    for n in range(1, LONGEST + 1):
        if n > 1:
            # An n-gram is an (n − 1)-gram and the word behind it, where both lie in one answer.
            is_whole = answer_T[: len(answer_T) - n + 1] == answer_T[n - 1 :]
            gram_T = gram_T[: len(is_whole)] * max(1, len(known)) + word_T[n - 1 :]
            kept = gram_T[is_whole]
        else:
            kept = gram_T
        found.append(len(np.unique(kept)) / len(kept) if len(kept) else None)
        gram_T = np.unique(gram_T, return_inverse=True)[1]
    return tuple(found)


def diversity(answers: Mapping[str, Sequence[str]], *, seed: int = 0, num_draws: int = NUM_DRAWS) -> Diversity:
    """The numbers of a model's answers.

    Args:
        answers: Prompt → its answers, at least one each; at least one prompt.
        seed: Of the draws of the intervals.
        num_draws: Of each interval.
    """
    of_prompts = {prompt: prompt_diversity(answers[prompt]) for prompt in sorted(answers)}

    def mean(values: Mapping[str, Sequence[float | None]]) -> Estimate | None:
        rows = [(prompt, value) for prompt, many in values.items() for value in many if value is not None]
        names = [f"{number:09d}" for number in range(len(rows))]
        found = Values(names, [prompt for prompt, _ in rows], np.array([value for _, value in rows], np.float64))
        return bootstrap_estimate([found], seed=seed, num_draws=num_draws)

    words = mean({prompt: one.words for prompt, one in of_prompts.items()})
    assert words is not None, "every prompt has an answer"
    return Diversity(
        tuple(mean({p: [one.distinct[n]] for p, one in of_prompts.items()}) for n in range(LONGEST)),
        corpus_distinct([text for prompt in of_prompts for text in answers[prompt]]),
        mean({p: [one.self_similarity] for p, one in of_prompts.items()}),
        mean({p: one.repetition for p, one in of_prompts.items()}),
        words,
        sum(number == 0 for one in of_prompts.values() for number in one.words),
    )


def _repeated(words: Sequence[str]) -> float | None:
    share = distinct(_ngrams(words, REPEATED))
    return None if share is None else 1 - share


def _ngrams(words: Sequence[object], n: int) -> list[tuple[object, ...]]:
    return list(zip(*(words[start:] for start in range(n))))
