"""A metric, a format and a kind of scorer, each of which fails at its work: for the messages that tell of it."""

from __future__ import annotations

from typing import Any, Literal

from prefsel.config import Options, PooledScorer
from prefsel.ingest.example import Completion, Example, Preference
from prefsel.metrics import Metric, Need
from prefsel.plugins import ScorerKind, register_format, register_metric, register_scorer


class Careless(Options):
    rm: str


def columns(params: Careless) -> tuple[str, ...]:
    return (f"rm_{params.rm}_chosen",)


def score(columns: Any, params: Careless, fitted: Any) -> Any:
    return columns["typo"]


def never(columns: Any, params: Careless, fitted: Any) -> Any:
    raise AssertionError("its round fails before")


def counted(columns: Any, params: Careless, fitted: Any) -> dict[str, Need]:
    return {"mean": columns["typo of a round"]}


def adapt(row: Any, options: Any) -> Example:
    sides = [Completion([{"role": "assistant", "content": row[side]}], {"gold": 1.0}) for side in "ab"]
    return Example([{"role": "user", "content": row["q"]}], sides, [Preference(0, 1, None, None)])


class Words(PooledScorer):
    kind: Literal["careless"] = "careless"

    @property
    def label(self) -> str:
        return "words"

    def models(self, config: Any) -> list[str]:
        return []

    def columns(self, config: Any, heads: Any) -> list[str]:
        return ["rm_words"]

    def recipe_settings(self) -> dict[str, Any]:
        return self.model_dump()

    def check(self, config: Any) -> None:
        pass


def load(job: Any, storage: Any) -> Any:
    return [job][1]


register_metric(Metric("careless", Careless, columns, score, "nowhere"))
register_metric(Metric("careless_rounds", Careless, columns, never, "nowhere", rounds=lambda params: (counted,)))
register_format("careless", adapt)
register_scorer(ScorerKind(Words, load))
