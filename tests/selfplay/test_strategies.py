"""Strategies: five files of this package, and those of a user; prompts come through them untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prefsel.config.evolve import STRATEGIES, Evolve
from prefsel.errors import UserError
from prefsel.selfplay import strategies as module
from prefsel.selfplay.strategies import PLACE, Strategy, load_strategies, strategy_prompt, user_turn

PLAIN = Strategy(name="plain", kind="depth", template="Before {prompt} after {{x}} $y")


def test_every_shipped_strategy_is_a_file_and_the_other_way_round() -> None:
    folder = Path(module.__file__).parent / "strategies"
    assert {file.name for file in folder.iterdir()} == {f"{name}.yaml" for name in STRATEGIES}
    loaded = load_strategies(STRATEGIES)
    assert tuple(one.name for one in loaded) == STRATEGIES
    assert [one.name for one in loaded if one.kind == "breadth"] == ["breadth"]


def test_depth_strategies_keep_the_input_add_a_few_words_and_want_the_prompt_alone() -> None:
    for one in load_strategies(STRATEGIES):
        assert "nothing else: no heading, no quotation marks, no remark" in one.template
        assert ("word for word" in one.template) == (one.kind == "depth")
        assert ("between 10 and 20 words" in one.template) == (one.kind == "depth")


def test_shipped_strategies_ask_for_different_things() -> None:
    assert len({one.template for one in load_strategies(STRATEGIES)}) == 5


@given(st.text(min_size=1).filter(lambda text: bool(text.strip())))
def test_a_prompt_comes_through_untouched(text: str) -> None:
    for strategy in [PLAIN, *load_strategies(STRATEGIES)]:
        [asked] = strategy_prompt(strategy, [{"role": "user", "content": text}])
        before, after = strategy.template.split(PLACE)
        assert asked == {"role": "user", "content": before + text + after}


@pytest.mark.parametrize("text", ["{prompt}", "{{ 7*7 }}", "{% for x in y %}", "${name} $$ %s %(x)s {0}", "\\1 \\g<0>"])
def test_template_language_in_a_prompt_means_nothing(text: str) -> None:
    [asked] = strategy_prompt(PLAIN, [{"role": "user", "content": text}])
    assert asked["content"] == f"Before {text} after {{{{x}}}} $y"


def test_the_last_turn_is_rewritten_and_the_conversation_stays_around_it() -> None:
    prompt = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Why?", "name": "Ada"},
    ]
    asked = strategy_prompt(PLAIN, prompt)
    assert asked[:3] == prompt[:3]
    assert asked[3] == {"role": "user", "content": "Before Why? after {{x}} $y", "name": "Ada"}
    assert prompt[3]["content"] == "Why?"
    assert user_turn(prompt) == "Why?"


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "It"}],
        [{"role": "user", "content": "x"}, {"role": "tool", "content": "7"}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user", "content": None}],
    ],
)
def test_a_prompt_that_does_not_end_with_the_user_has_nothing_to_rewrite(prompt: list[dict[str, str]]) -> None:
    assert user_turn(prompt) is None
    with pytest.raises(UserError, match=r"prompt: got .*; valid: messages that end with a text of the user"):
        strategy_prompt(PLAIN, prompt)


def test_a_strategy_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nkind: depth\ntemplate: 'Say {prompt} in Latin.'\n")
    [breadth, own] = load_strategies(Evolve(strategies=["breadth", str(file)]).strategies)
    assert (breadth.name, own) == ("breadth", Strategy(name="own", kind="depth", template="Say {prompt} in Latin."))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: own\nkind: depth\ntemplate: Say it.\n", "template: got .*{prompt} 0 times; valid: exactly once"),
        ("name: own\nkind: depth\ntemplate: '{prompt} {prompt}'\n", "{prompt} 2 times; valid: exactly once"),
        ("name: own\nkind: depth\ntemplate: ' {prompt} '\n", "asks for nothing"),
        ("name: own\nkind: wide\ntemplate: 'x {prompt}'\n", "kind"),
        ("name: own\ntemplate: 'x {prompt}'\n", "kind: required, but missing"),
        ("name: own\nkind: depth\ntemplate: 'x {prompt}'\nmore: 1\n", "more: unknown key"),
        ("name: breadth\nkind: depth\ntemplate: 'x {prompt}'\n", "strategies: got 'breadth'"),
        ("- 1\n", "own.yaml"),
        ("", "own.yaml"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_strategy_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_strategies(["breadth", str(tmp_path / "own.yaml")])


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategies: .*none\.yaml: No such file"):
        load_strategies([str(tmp_path / "none.yaml")])


def test_the_record_has_all_five_and_the_authors_numbers() -> None:
    record = Evolve()
    assert (record.share, record.strategies, record.length_factor) == (0.25, [*STRATEGIES], 5.0)
    assert (record.temperature, record.top_p) == (0.8, 0.95)
    assert Evolve(length_factor=None).length_factor is None


@pytest.mark.parametrize(
    "options",
    [
        {"strategies": ["deeper"]},
        {"strategies": []},
        {"strategies": ["deepen", "deepen"]},
        {"share": 0},
        {"share": 1.5},
        {"length_factor": 1},
        {"length_factor": float("inf")},
        {"top_p": 0},
        {"max_new_tokens": 0},
        {"temperature": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Evolve.model_validate(options)
