"""The prompt in an answer, or why there is none: examples by hand, and what must not be taken for such."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefsel.selfplay.rewritten import read_prompt

OLD = "Explain how a bicycle stays upright while it is moving."
NEW = "Explain how a bicycle stays upright while it is moving, and derive the speed above which it needs no rider."


@pytest.mark.parametrize(
    "answer",
    [
        NEW,
        f"  \n{NEW}\n\n",
        f'"{NEW}"',
        f"“{NEW}”",
        f"'{NEW}'",
        f"«{NEW}»",
        f"```\n{NEW}\n```",
        f"```text\n{NEW}\n```\n",
        f"~~~~\n{NEW}\n~~~~",
        f"<prompt>\n{NEW}\n</prompt>",
        f"Rewritten prompt: {NEW}",
        f"**New Prompt:**\n{NEW}",
        f"#Rewritten Prompt#:\n\n{NEW}",
        f"### Revised question:\n{NEW}",
        f'Rewritten prompt:\n```\n"{NEW}"\n```',
    ],
)
def test_wrapping_comes_off(answer: str) -> None:
    assert read_prompt(answer, OLD) == (NEW, None)


@pytest.mark.parametrize(
    "kept",
    [
        'Compare "tall" with "high" in the sentences of a bicycle review, one by one, in a table for learners.',
        '"Less is more": who said it first, in which building, and what did the neighbours reply to it then?',
        "Fix this:\n```python\nprint(1\n```\nand say which of its lines keeps a bicycle upright while moving.",
        "```python\nbalance(1\n```\nWhich bracket is missing above?\n```python\nbalance(2)\n```",
        "New prompts for a bicycle story: give me five of them, each with a hero who cannot ride at all.",
        "Question: how does a bicycle stay upright, and which of its parts could be left out without harm?",
        "“Wheel” or “tyre”: which of the two words came first, and how did it reach the language of the “cyclist”",
        "„Rad“ heißt wheel: what do a German rider and a German engineer understand by the compound “Fahrrad“",
        "'tis the season: write a carol on a bicycle that stays upright, rhyming 'wheel' with 'feel'",
    ],
)
def test_what_is_no_wrapping_stays(kept: str) -> None:
    assert read_prompt(kept, OLD) == (kept, None)


def test_wrapping_that_the_old_prompt_has_too_stays() -> None:
    old, new = "```python\nprint(1\n```", "```python\nprint((1\n```"
    assert read_prompt(new, old) == (new, None)
    assert read_prompt('"To be or not to be, that is"', '"To be or not to be"') == (
        '"To be or not to be, that is"',
        None,
    )
    assert read_prompt("<prompt>b c</prompt>", "<prompt>a b</prompt>").text == "<prompt>b c</prompt>"


@pytest.mark.parametrize("answer", ["", "  \n\t ", '""', "```\n\n```", "Rewritten prompt:", "<prompt>\n</prompt>"])
def test_empty(answer: str) -> None:
    assert read_prompt(answer, OLD) == (None, "empty")


@pytest.mark.parametrize(
    "answer",
    [
        f"Here is the rewritten prompt: {NEW}",
        f"Here's a more challenging version of the prompt:\n\n{NEW}",
        f"Sure! Here you go:\n{NEW}",
        f"Certainly, here is one:\n{NEW}",
        f"Of course!\n\n{NEW}",
        f"Okay, I have rewritten it.\n{NEW}",
        f"I have rewritten the given question as follows: {NEW}",
        f"Below is one possible rewrite.\n{NEW}",
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "As an AI language model, I do not ride bicycles, but I can imagine it well enough to answer.",
        f"<think>The user wants a harder one.</think>{NEW}",
        f"{NEW}\n\nNote: I made the prompt more specific.",
        f"{NEW}\n\n(This rewritten prompt asks for a derivation.)",
        f"{NEW}\n\nI added a requirement to the original question.",
        f"#The Given Prompt#: {OLD} {NEW}",
        f"Like the original prompt, but longer: {NEW}",
        f"<prompt>{OLD}</prompt>\n{NEW}",
        "The revised instruction is as follows.",
        "To make the prompt more complex, ask for reasons.",
        # written after the patterns, and not changed since
        f"Here’s an expanded version that digs a little deeper into this request:\n\n{NEW}",
        f"Absolutely! Below is a refined query for you.\n\n{NEW}",
        f"{NEW}\n\n**Explanation:** The rewrite keeps the input and adds a condition.",
        "I apologize, but I am unable to rewrite prompts of this kind.",
    ],
)
def test_talk_about_the_task_is_refused(answer: str) -> None:
    assert read_prompt(answer, OLD, length_factor=None) == (None, "meta_answer")


@pytest.mark.parametrize(
    "prompt",
    [
        "Here is a list of bicycles: Alpha, Beta, Gamma. Sort them by the number of letters in their names.",
        "Here is my revised version of the essay on bicycles. Mark every comma that should not be there.",
        "Sure footing matters on a bicycle: explain how a rider moves the weight in a curve on wet ground.",
        "I cannot get my bicycle to shift into third gear. List what could be wrong, the likeliest cause first.",
        "I can't create a folder called bicycle on my laptop. Which rights could be missing, and who grants them?",
        "Of course bicycles are older than cars. By how many years, and which patents tell us about it?",
        "I'm sorry for my late reply: turn this into a polite e-mail to a bicycle shop, in three sentences.",
        "As an AI researcher, how would you study how a bicycle stays upright with a learned controller?",
        "Okay, I understand balance now. Explain why the front wheel turns into a fall, step by step.",
        "I am a broke student and can't buy a bicycle. Where can I borrow one for a week, and on which terms?",
        "I'm annoyed that my bicycle won't stay upright on ice. Which tyres help, and why do they?",
        "Great inventions of the 19th century: rank the bicycle, the telegraph and the tin can by influence.",
        "Explain balance on a bicycle.\n\nNote: the answer must not use the word gyroscope, nor any formula.",
        "Write a new version of the fairy tale in which the wolf rides a bicycle and loses a wheel.",
        "Let me know which bicycle part fails first on cobblestones, and justify the choice with two numbers.",
        "I added 3 spokes to a wheel of 32. How many are there, and does the wheel still run true?",
    ],
)
def test_prompts_that_begin_alike_are_not(prompt: str) -> None:
    assert read_prompt(prompt, OLD) == (prompt, None)


@pytest.mark.parametrize(
    "run", ["\n", " ", "#", "*", "`", "~", '"', "the ", "# ", "\nnote: ", "\ni have made ", "here is "]
)
def test_a_policy_that_repeats_itself_is_read_in_no_time(run: str) -> None:
    """A pattern that looks at a run again from each of its places takes minutes here; all of them take 0.1 s."""
    text = f"Say {run * (60_000 // len(run))} it."
    assert read_prompt(text, OLD, length_factor=None).text == text
    assert read_prompt(f"```\n{text}\n```", OLD, length_factor=None).reason is None


def test_what_the_old_prompt_says_itself_is_no_sign() -> None:
    old = "Improve it: 'Here is the new prompt for you'. The given prompt must stay below 10 words."
    new = "Improve it twice: 'Here is the new prompt for you'. The given prompt must stay below 10 words and rhyme."
    assert read_prompt(new, old) == (new, None)
    assert read_prompt(f"Sure! Here you go: {new}", old).reason == "meta_answer"


@pytest.mark.parametrize("answer", [OLD, f" {OLD}\n", OLD.replace(" ", "\n\n"), f'"{OLD}"'])
def test_unchanged(answer: str) -> None:
    assert read_prompt(answer, OLD) == (None, "unchanged")
    assert read_prompt(answer, OLD.replace(" ", "  ")) == (None, "unchanged")


def test_another_case_is_a_change() -> None:
    assert read_prompt("say HELLO", "say hello").text == "say HELLO"


@pytest.mark.parametrize(("size", "is_kept"), [(2, False), (3, True), (49, True), (50, False), (300, False)])
def test_lengths_differ_by_less_than_the_factor(size: int, is_kept: bool) -> None:
    """Old: 10 characters. 5 × 2 is not above 10, and 5 × 10 is not above 50."""
    assert read_prompt("b" * size, "a" * 10) == (("b" * size, None) if is_kept else (None, "length_ratio"))
    assert read_prompt("b" * size, "a" * 10, length_factor=None).text == "b" * size


def test_the_factor_is_a_number_of_the_configuration() -> None:
    assert read_prompt("b" * 15, "a" * 10, length_factor=1.5).reason == "length_ratio"
    assert read_prompt("b" * 14, "a" * 10, length_factor=1.5).text == "b" * 14


@given(st.text(alphabet="abc ", min_size=1, max_size=30), st.text(alphabet="xyz ", min_size=1, max_size=30))
def test_plain_text_comes_back_as_it_is(answer: str, old: str) -> None:
    text, reason = read_prompt(answer, old)
    new, was = answer.strip(), old.strip()
    if not new:
        assert reason == "empty"
    elif len(new) * 5 <= len(was) or len(was) * 5 <= len(new):
        assert reason == "length_ratio"
    else:
        assert (text, reason) == (new, None)
