"""Sequences that begin alike, laid out as a trie: a token that several of them share is there once.

    sequences   s s s a a a · x x        tokens     s s s a a a x x y b b
                s s s a a a · y          positions  0 1 2 3 4 5 6 7 6 3 4
                s s s b b                segments       └─s─┘ └─a─┘ └x┘ y └b┘

A segment attends to its ancestors in full and to itself causally, so its hidden states are those of every sequence that
goes through it. A prompt with its responses is the smallest case; a system prompt, the earlier turns of a dialogue and
responses that begin alike are the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Key = tuple[int, int]
"""(group in the sequence of groups, completion in the group)."""
Range = tuple[int, int]
"""First and one past the last row."""

MIN_SHARED = 16
"""Fewer common tokens are not worth a segment of their own, except a group's own prompt: every segment costs calls. On
four responses each to 60 prompts of QA-Feedback, an eighth of them shared, 4 to 32 took the same time, 0.91 of none."""


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one of its responses."""

    key: Key
    tokens: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of the same sequences."""

    start: int
    end: int
    context: tuple[Range, ...]
    """The rows of its ancestors, the root's first; neighbours are one range."""


@dataclass(frozen=True)
class SequencePath:
    """Where a sequence lies."""

    key: Key
    prompt_length: int
    rows: tuple[Range, ...]
    """Its rows in order; neighbours are one range."""

    def response_rows(self, *, before: int = 0) -> npt.NDArray[np.int64]:
        """The rows of the response tokens; with `before=1` the rows of the tokens before each of them."""
        skipped, end = self.prompt_length - before, sum(end - start for start, end in self.rows) - before
        found, depth = [np.empty(0, np.int64)], 0
        for start, stop in self.rows:
            first, last = max(start, start + skipped - depth), min(stop, start + end - depth)
            found.append(np.arange(first, last))
            depth += stop - start
        return np.concatenate(found)


@dataclass(frozen=True)
class Trie:
    """Tokens of sequences without repetition, one segment after another; children follow their parents."""

    tokens: list[int]
    positions: list[int]
    """Of each token in its own sequences."""
    segments: list[Segment]
    paths: list[SequencePath]
    """One per sequence."""


def lay_out(entries: Sequence[TokenSequence]) -> Trie:
    """Sequences as a trie: never more tokens than the prompts once with their responses, whatever they share."""
    trie = Trie([], [], [], [])
    left: list[tuple[list[TokenSequence], int, tuple[Range, ...]]] = []
    if entries:
        left.append((sorted(entries, key=lambda entry: (entry.tokens, entry.key)), 0, ()))
    while left:  # sequences alike up to `depth`, whose rows are `context`; the last come first: a child follows
        among, depth, context = left.pop()
        first, members, others = among[0], among[:1], list[TokenSequence]()
        rest = first.prompt_length - depth
        least = depth + (min(MIN_SHARED, rest) if rest > 0 else MIN_SHARED)
        for place, entry in enumerate(among[1:], start=1):
            if entry.tokens[depth:least] != first.tokens[depth:least]:
                others += among[place:]  # sorted: what follows has no more in common with the first
                break
            (members if _is_shared(first, entry, depth) else others).append(entry)
        if others:
            left.append((others, depth, context))
        # In sorted order the first and the last of several have in common what all have.
        end = common_length(first.tokens, members[-1].tokens)
        rows = _append(trie, first.tokens, depth, end, context)
        while members and len(members[0].tokens) == end:
            trie.paths.append(SequencePath(members[0].key, members[0].prompt_length, rows))
            members = members[1:]
        if members:
            left.append((members, end, rows))
    return trie


def _append(trie: Trie, tokens: list[int], depth: int, end: int, context: tuple[Range, ...]) -> tuple[Range, ...]:
    """Append a segment, if it has a token; returns the rows of a sequence up to its end."""
    if end == depth:
        return context
    start = len(trie.tokens)
    trie.tokens.extend(tokens[depth:end])
    trie.positions.extend(range(depth, end))
    trie.segments.append(Segment(start, len(trie.tokens), context))
    if context and context[-1][1] == start:
        return (*context[:-1], (context[-1][0], len(trie.tokens)))
    return (*context, (start, len(trie.tokens)))


def _is_shared(first: TokenSequence, other: TokenSequence, depth: int) -> bool:
    """Whether what two sequences have in common behind `depth` is a segment: enough of it, or the rest of their prompt.

    Of another group all responses join or none does: those that did not would have to repeat their prompt.
    """
    rest, enough = other.prompt_length - depth, MIN_SHARED
    if first.key[0] == other.key[0] and rest > 0:
        enough = min(enough, rest)
    elif 0 < rest < MIN_SHARED:
        return False
    enough += depth
    return len(other.tokens) >= enough and first.tokens[depth:enough] == other.tokens[depth:enough]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences share; by bisection, each step one comparison of slices."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
