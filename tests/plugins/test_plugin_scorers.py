"""Kinds of scorers from elsewhere beside those of this package, in one union of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag, TypeAdapter

from prefsel.config import Options, PooledScorer
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.plugins import ScorerKind, register_scorer, registry
from prefsel.plugins.scorers import BUILT_IN, ELSEWHERE, plugin_scorer, scorer_origin


class First(Options):
    kind: Literal["first"]


class Second(Options):
    kind: Literal["second"]
    width: int = 1


Own = Annotated[First | Second, Field(discriminator="kind")]
Entry = Annotated[
    Annotated[Own, Tag(BUILT_IN)]
    | Annotated[SerializeAsAny[PooledScorer], BeforeValidator(plugin_scorer), Tag(ELSEWHERE)],
    Discriminator(scorer_origin(("first", "second"))),
]


class Words(PooledScorer):
    kind: Literal["words"]
    name: str = "w"
    factor: float = 1.0
    part: Own | None = None

    @property
    def label(self) -> str:
        return self.name

    def models(self, config: Any) -> list[str]:
        return []

    def columns(self, config: Any, heads: Any) -> list[str]:
        return [f"rm_{self.name}"]

    def recipe_settings(self) -> dict[str, Any]:
        return self.model_dump()

    def check(self, config: Any) -> None:
        pass


def load(job: Any, storage: Any) -> Any:
    return job, storage


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers."""
    monkeypatch.setitem(registry._REGISTERED, "scorers", {})


def test_an_entry_becomes_the_record_of_its_kind() -> None:
    register_scorer(ScorerKind(Words, load))
    entries = TypeAdapter(list[Entry])
    found = entries.validate_python([{"kind": "second"}, {"kind": "words", "factor": 2.0}, First(kind="first")])
    assert [type(one) for one in found] == [Second, Words, First]
    assert entries.validate_python(found) == found  # records, too
    dumped = entries.dump_python(found)
    assert dumped[1]["factor"] == 2.0  # nothing of it is lost when it is written
    plugin = registry.find("scorers", "words")
    assert plugin is not None
    assert plugin.found.load("job", "storage") == ("job", "storage")
    assert list(registry.code_of("scorers", "words")) == ["code"]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (
            {"kind": "words", "facter": 2},
            "scorers.0.facter: unknown key; did you mean 'factor'",
        ),
        ({"kind": "words", "factor": "two"}, "scorers.0.factor: got 'two'; input should be a valid number"),
        ({"kind": "word"}, "scorers.0.kind: got 'word'; did you mean 'words'.*valid: causal_logps, .*, words"),
        ({"name": "w"}, "scorers.w.kind: required, but missing; valid: causal_logps, .*, words"),
        ({"kind": "words", "part": {}}, "scorers.0.part.kind: required, but missing; valid: first, second"),
        ({"kind": "words", "part": {"kind": "secnd"}}, "scorers.0.part.kind: got 'secnd'; did you mean 'second'"),
        (
            {"kind": "words", "part": {"kind": "second", "widht": 2}},
            "scorers.0.part.widht: unknown key; did you mean",
        ),
    ],
)
def test_a_wrong_entry(entry: dict[str, Any], told: str) -> None:
    register_scorer(ScorerKind(Words, load))
    with pytest.raises(UserError, match=told):
        parse_config({"name": "x", "sources": [{"name": "s", "paths": ["a.jsonl"]}], "scorers": [entry]})


def test_unknown_kinds_stay_those_of_the_union() -> None:
    with pytest.raises(ValueError, match="'first', 'second'"):
        TypeAdapter(Entry).validate_python({"kind": "wrods"})


class Free(Words):
    kind: str  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (Words, "it has no record, it has no load|got a class Words: it has no record"),
        (ScorerKind(Words, lambda job: None), r"load must be callable with \(job, storage\)"),
        (ScorerKind(dict, load), r"record: got <class 'dict'>; valid: a subclass of prefsel.config.PooledScorer"),
        (ScorerKind(Free, load), r"record Free: its kind is None"),
    ],
)
def test_a_wrong_scorer(wrong: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        register_scorer(wrong)


def test_a_kind_of_this_package_cannot_be_replaced() -> None:
    class Again(Words):
        kind: Literal["first"]  # type: ignore[assignment]

    register_scorer(ScorerKind(Again, load))
    with pytest.raises(UserError, match="scorer 'first': several things have this name: built in; registered by"):
        TypeAdapter(Entry).validate_python({"kind": "first"})
