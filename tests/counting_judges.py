"""Judges that count a word; workers import them from this folder."""

from __future__ import annotations


def goods(prompts, answers):
    return [float(answer.split().count("good")) for answer in answers]


def more_goods(prompts, answers_a, answers_b):
    both = zip(goods(prompts, answers_a), goods(prompts, answers_b))
    return [0.5 if a == b else float(a > b) for a, b in both]


def undecided(prompts, answers):
    return [float("nan")] * len(answers)
