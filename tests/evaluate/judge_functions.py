"""Judges that users would write; `load_judge` imports them by name."""

from __future__ import annotations


def shorter(prompts, answers):
    return [-float(len(answer)) for answer in answers]


def shorter_of_two(prompts, answers_a, answers_b):
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(answers_a, answers_b)]


number = 3
