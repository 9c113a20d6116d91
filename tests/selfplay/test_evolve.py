"""New prompts: what they are made of, what refuses them, and in which order."""

from __future__ import annotations

import itertools
import unicodedata
from typing import Any

import pytest

from prefsel.errors import UserError
from prefsel.ingest.identity import prompt_id
from prefsel.reasons import LOST
from prefsel.selfplay.evolve import REASONS, Evolved, Excluded, evolved_prompt, first_of_each, text_key
from prefsel.selfplay.strategies import Strategy

DEEPEN = Strategy(name="deepen", kind="depth", template="Deepen: {prompt}")
PARENT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name a prime above ten."}]
ANSWER = "Name a prime above ten and prove that it is one."
NOBODY = Excluded.of([])


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def made(answer: str = ANSWER, parent: Any = PARENT, **changed: Any) -> Evolved | str:
    options = {"length_factor": 5.0, "excluded": NOBODY, "is_seen": lambda one: False, "fits": lambda one: True}
    return evolved_prompt(parent, DEEPEN, answer, **{**options, **changed})


def test_a_new_prompt_knows_where_it_comes_from() -> None:
    messages = [PARENT[0], {"role": "user", "content": ANSWER}]
    assert made() == Evolved(messages, prompt_id(messages), prompt_id(PARENT), "deepen")
    assert PARENT[1]["content"] == "Name a prime above ten."


@pytest.mark.parametrize(
    ("reason", "answer"),
    [
        ("empty", " \n"),
        ("empty", "```\n```"),
        ("meta_answer", f"Here is the rewritten prompt: {ANSWER}"),
        ("meta_answer", "I'm sorry, I can't do that."),
        ("unchanged", "Name a  prime above ten."),
        ("length_ratio", "Why?"),
        ("length_ratio", "Name a prime. " * 20),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_reason(reason: str, answer: str) -> None:
    assert made(answer) == reason


def test_the_length_limit_can_be_left_out() -> None:
    assert isinstance(made("Why?", length_factor=None), Evolved)


def test_what_was_seen_is_refused() -> None:
    new = prompt_id([PARENT[0], {"role": "user", "content": ANSWER}])
    assert made(is_seen={new}.__contains__) == "seen_prompt"
    assert isinstance(made(is_seen={prompt_id(PARENT), prompt_id(user(ANSWER))}.__contains__), Evolved)


@pytest.mark.parametrize(
    "excluded",
    [
        [PARENT[0], {"role": "user", "content": ANSWER}],
        user(ANSWER),
        user(ANSWER.upper()),
        user(f"  {ANSWER.replace(' ', chr(10))}\t"),
        [{"role": "system", "content": "Another."}, *user(ANSWER)],
    ],
)
def test_evaluation_prompts_are_refused_whatever_their_case_space_or_system_text(excluded: Any) -> None:
    assert made(excluded=Excluded.of([user("something else"), excluded])) == "excluded_prompt"


@pytest.mark.parametrize("other", [f"{ANSWER}!", ANSWER.replace("prime", "square"), "Name a prime above ten."])
def test_other_evaluation_prompts_are_no_hindrance(other: str) -> None:
    assert isinstance(made(excluded=Excluded.of([user(other)])), Evolved)


def test_an_id_alone_excludes() -> None:
    new = prompt_id([PARENT[0], {"role": "user", "content": ANSWER}])
    assert made(excluded=Excluded({new}, set())) == "excluded_prompt"


def test_every_turn_of_the_user_counts_and_turns_stay_apart() -> None:
    first = [*user("a b"), {"role": "assistant", "content": "x"}, *user("c")]
    assert text_key(first) == text_key([*user("A  b"), {"role": "assistant", "content": "y"}, *user("C")])
    different = [first, user("c"), user("a b c"), [*user("a"), *user("b c")], [*user("c"), *user("a b")]]
    assert len({text_key(one) for one in different}) == len(different)
    assert text_key(user("STRASSE")) == text_key(user("straße"))


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_the_encoding_of_a_text_makes_no_new_prompt(form: Any) -> None:
    text = "Où est la ﬁn du café №１ ?"
    assert text_key(user(unicodedata.normalize(form, text))) == text_key(user(text))
    hidden = Excluded.of([user(unicodedata.normalize("NFC", ANSWER + " é"))])
    answer = unicodedata.normalize("NFD", ANSWER + " é")
    assert made(answer, excluded=hidden) == "excluded_prompt"


def test_the_judge_is_asked_about_the_new_prompt_and_a_stub() -> None:
    asked: list[Any] = []

    def fits(messages: list[dict[str, Any]]) -> bool:
        asked.append(messages)
        return False

    assert made(fits=fits) == "too_long_for_judge"
    [[system, said, stub]] = asked
    assert (system, said) == (PARENT[0], {"role": "user", "content": ANSWER})
    assert stub["role"] == "assistant"
    assert stub["content"]


def test_the_first_reason_counts_and_the_judge_is_asked_last() -> None:
    def never(messages: Any) -> bool:
        raise AssertionError("the judge is asked about prompts that are refused anyway")

    everything = {"excluded": Excluded.of([user(ANSWER)]), "is_seen": lambda one: True, "fits": never}
    assert made(**everything) == "excluded_prompt"
    assert made(**{**everything, "excluded": NOBODY}) == "seen_prompt"
    assert made("", **everything) == "empty"


def test_every_reason_has_its_words() -> None:
    assert set(REASONS) <= LOST.keys()


def test_a_parent_without_a_turn_of_the_user_is_our_mistake() -> None:
    with pytest.raises(UserError, match="parent: got 'assistant'"):
        made(parent=[*PARENT, {"role": "assistant", "content": "Eleven"}])


def test_equal_new_prompts_stay_once_whatever_their_order() -> None:
    def one(name: str, parent: int, strategy: str) -> Evolved:
        return Evolved(user(name), prompt_id(user(name)), bytes([parent]) * 16, strategy)

    evolved = [one("a", 2, "breadth"), one("a", 1, "reasoning"), one("a", 1, "deepen"), one("b", 3, "breadth")]
    expected = sorted([evolved[2], evolved[3]], key=lambda found: found.prompt_id)
    for order in itertools.permutations(evolved):
        assert first_of_each(order) == expected
    assert first_of_each([]) == []
