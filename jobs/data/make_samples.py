"""Write small preference data in four formats, the same bytes every time; the first file is the one beside this script.

    python jobs/data/make_samples.py --into FOLDER

Questions of daily life, one to three turns, and answers of varied quality put together from `topics.yaml`. An answer's
score counts what it covers, less what only fills it or stands in the wrong order, with some noise; the label follows
the score. Every file has faults that found data has.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import yaml

Messages = list[dict[str, str]]
Row = dict[str, Any] | str
"""An object becomes one line of JSON; a string is a line as it stands."""
T = TypeVar("T")


class Answer(NamedTuple):
    """A text and what it is worth."""

    text: str
    score: float
    """From 1 to 10 in halves."""


TOPICS: Final = yaml.safe_load(Path(__file__).with_name("topics.yaml").read_text(encoding="utf-8"))

GREETINGS: Final = ["", "", "", "Hi! ", "Hello, ", "Quick question: ", "Please help. ", "Guten Tag! ", "hey 🙂 "]
REASONS: Final = [
    "",
    "I have never done this before.",
    "I only have one evening for it.",
    "It should not cost much.",
    "My neighbour told me three different things.",
    "The instructions I found are far too long.",
    "I tried it last year and gave up half-way.",
    "I live in a small flat on the fourth floor, without a balcony, and my tools fit into a shoe box.",
    "We are five people, two of them children, so please keep it practical and tell me what can go wrong.",
    "I would like to understand the reasons as well, because I forget steps that I do not understand.",
]
OPENINGS: Final = ["", "", "Gladly. ", "Good question! ", "Here is what works: ", "That is easier than it looks. "]
CLOSINGS: Final = ["", "", " Good luck!", " Write again if you get stuck.", " Take your time."]
FILLERS: Final = [
    "There are many ways to see this.",
    "As everybody knows, it depends on many things.",
    "This is a very important question, and it is good that you ask it.",
    "Some people do it in another way, and others do not do it at all.",
    "In general one should always be careful in general.",
    "I could say a lot more about this.",
    "It is what it is.",
]

NUM_CONVERSATIONS: Final = 320
NUM_PAIRS: Final = 90
NUM_TRANSCRIPTS: Final = 90
NUM_RANKED: Final = 45
NUM_RANKED_ANSWERS: Final = 4


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of them; from `random()` alone, which gives the same numbers in every version of Python."""
    return items[int(rng.random() * len(items))]


def answer(rng: random.Random, lines: Sequence[str]) -> Answer:
    """An answer that covers more or less of `lines`, with more or less around it; one in five is a single sentence."""
    if rng.random() < 0.2:
        return Answer(pick(rng, lines), 3.0)
    care = rng.random()
    kept = [line for line in lines if rng.random() < 0.25 + 0.75 * care] or [pick(rng, lines)]
    is_mixed = len(kept) > 2 and rng.random() < 0.5 * (1 - care)
    if is_mixed:
        kept = kept[len(kept) // 2 :] + kept[: len(kept) // 2]
    num_fillers = sum(rng.random() < 0.8 * (1 - care) for _ in range(4))
    for _ in range(num_fillers):
        place = int(rng.random() * (len(kept) + 1))
        kept = [*kept[:place], pick(rng, FILLERS), *kept[place:]]
    if len(kept) > 3 and rng.random() < 0.4:
        body = "\n" + "\n".join(f"{number}. {line}" for number, line in enumerate(kept, 1))
    else:
        body = " ".join(kept)
    covered = (len(kept) - num_fillers) / len(lines)
    noise = rng.random() + rng.random() - 1
    value = 1.5 + 8 * covered - num_fillers - 1.5 * is_mixed + noise
    text = (pick(rng, OPENINGS) + body + pick(rng, CLOSINGS)).strip()
    return Answer(text, min(max(round(2 * value) / 2, 1.0), 10.0))


def conversation(rng: random.Random, num_turns: int) -> tuple[Messages, list[str]]:
    """A conversation that ends with a question, and the sentences that answer it."""
    topic = pick(rng, TOPICS)
    question = f"{pick(rng, GREETINGS)}How do I {topic['task']}? {pick(rng, REASONS)}".strip()
    if rng.random() < 0.08:
        question += f"\n\nA friend wrote this to me, is it right?\n\n{answer(rng, topic['steps']).text}"
    messages = [{"role": "user", "content": question}]
    lines = topic["steps"]
    follow_ups = topic["more"] if rng.random() < 0.5 else topic["more"][::-1]
    for following in follow_ups[: num_turns - 1]:
        messages.append({"role": "assistant", "content": answer(rng, lines).text})
        messages.append({"role": "user", "content": following["question"]})
        lines = following["answer"]
    return messages, lines


def two_answers(rng: random.Random, lines: Sequence[str]) -> tuple[Answer, Answer]:
    """Two answers of different score, the better one first."""
    while True:
        first, second = answer(rng, lines), answer(rng, lines)
        if first.score != second.score:
            return (first, second) if first.score > second.score else (second, first)


def questions(rng: random.Random, number: int, turns: Sequence[int]) -> list[tuple[Messages, list[str]]]:
    """So many conversations that differ from each other, their lengths drawn from `turns`."""
    found: dict[str, tuple[Messages, list[str]]] = {}
    while len(found) < number:
        messages, lines = conversation(rng, pick(rng, turns))
        found.setdefault(json.dumps(messages), (messages, lines))
    return list(found.values())


def conversations(rng: random.Random) -> list[Row]:
    """`prompt` as messages, `chosen` and `rejected` as text, with scores; every seventh prompt has a second pair.

    Faults: a pair that comes again with its label turned, one that comes three times, an empty answer, an answer
    preferred to itself, and a line that is cut off.
    """
    rows: list[Row] = []
    for number, (prompt, lines) in enumerate(questions(rng, NUM_CONVERSATIONS, (1, 1, 1, 2, 2, 3))):
        for _ in range(2 if number % 7 == 0 else 1):
            better, worse = two_answers(rng, lines)
            rows.append({"prompt": prompt} | sides(better, worse))
    contradicted, repeated = rows[20], rows[40]
    assert isinstance(contradicted, dict)
    turned = {"chosen": contradicted["rejected"], "rejected": contradicted["chosen"]}
    scores = {"score_chosen": contradicted["score_rejected"], "score_rejected": contradicted["score_chosen"]}
    rows.insert(70, contradicted | turned | scores)
    rows[90:90] = [repeated, repeated]
    rows.insert(110, contradicted | {"chosen": "  "})
    rows.insert(130, contradicted | {"chosen": contradicted["rejected"]})
    rows.insert(150, json.dumps(contradicted)[:-40])
    return rows


def pairs(rng: random.Random) -> list[Row]:
    """`prompt`, `chosen` and `rejected` as text, scored. Faults: two empty answers, three preferred to themselves."""
    rows: list[Row] = []
    for number, (prompt, lines) in enumerate(questions(rng, NUM_PAIRS, (1,))):
        better, worse = two_answers(rng, lines)
        if number in (11, 42):
            worse = Answer("", 1.0)
        if number in (17, 23, 71):
            worse = better
        rows.append({"prompt": prompt[0]["content"]} | sides(better, worse))
    return rows


def transcripts(rng: random.Random) -> list[Row]:
    """`chosen` and `rejected` as whole transcripts of one to three turns. Faults: three without an answer."""
    rows: list[Row] = []
    for number, (prompt, lines) in enumerate(questions(rng, NUM_TRANSCRIPTS, (1, 2, 2, 3))):
        better, worse = two_answers(rng, lines)
        chosen = "" if number in (5, 31, 64) else better.text
        rows.append({"chosen": transcript(prompt, chosen), "rejected": transcript(prompt, worse.text)})
    return rows


def ranked(rng: random.Random) -> list[Row]:
    """`question`, four `completions`, and a `preference` for every two of them; two answers are alike now and then."""
    rows: list[Row] = []
    for number, (prompt, lines) in enumerate(questions(rng, NUM_RANKED, (1,))):
        answers = [answer(rng, lines) for _ in range(NUM_RANKED_ANSWERS)]
        if number % 15 == 0:
            answers[3] = answers[1]
        labels = []
        for first in range(NUM_RANKED_ANSWERS):
            for second in range(first + 1, NUM_RANKED_ANSWERS):
                difference = answers[first].score - answers[second].score
                labels.append(0 if abs(difference) < 1 else 1 if difference > 0 else 2)
        texts = [one.text for one in answers]
        rows.append({"question": prompt[0]["content"], "completions": texts, "preference": labels})
    return rows


def sides(better: Answer, worse: Answer) -> dict[str, Any]:
    """The fields of a labelled pair."""
    return {
        "chosen": better.text,
        "rejected": worse.text,
        "score_chosen": better.score,
        "score_rejected": worse.score,
    }


def transcript(prompt: Messages, response: str) -> str:
    """A conversation as HH-RLHF writes it."""
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [*prompt, {"role": "assistant", "content": response}]
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


FILES: Final[dict[str, Callable[[random.Random], list[Row]]]] = {
    "conversations.jsonl": conversations,
    "pairs.jsonl": pairs,
    "transcripts.jsonl": transcripts,
    "ranked.jsonl": ranked,
}


def write(folder: Path) -> None:
    """Write every file into `folder`."""
    for seed, (name, make) in enumerate(FILES.items()):
        (folder / name).write_text(lines_of(make(random.Random(seed))), encoding="utf-8", newline="\n")


def lines_of(rows: Iterable[Row]) -> str:
    """One line per row."""
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, help="the folder they go to; it must exist")
    write(parser.parse_args().into)
