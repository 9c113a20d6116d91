"""What a kind of scorer must be for the rest of the package: one record per shard, and a way to make it in an actor.

    Job ──load──▶ Ready ──begin(shard, groups)──▶ Compute ──()──▶ one Scored per job

A new kind of scorer is a record in `config/scorers.py`, a file with a loader beside this one, and a line in `kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import PrefselError
from prefsel.score.job import Job
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.storage import Storage


class Scored(Protocol):
    """The numbers of one shard and what happened on the way; `ScoredShard` is one."""

    @property
    def columns(self) -> Mapping[str, Sequence[Any]]:
        """Per column and group one number per completion, or None, in the order of the groups table. Of a scorer whose
        unit is pairs: per column one number per pair."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows without a number, by reason."""

    @property
    def counters(self) -> dict[str, float]:
        """What adds up over shards: `trunk_tokens`, `seconds_model`, …"""

    @property
    def facts(self) -> dict[str, float]:
        """What does not add up over shards: of those ending in `_least` the smallest counts, of others the largest."""

    @property
    def poisoned(self) -> list[str]:
        """prompt_ids (hex) of the groups, or pair_ids of the pairs, for which the model gave NaN or infinity."""

    @property
    def padded_because(self) -> str:
        """Why rows were padded rather than packed; empty when they were packed."""

    @property
    def template_error(self) -> str:
        """The first of the template errors that are counted in `dropped`."""


@dataclass(frozen=True)
class TemplateUse:
    """What a chat template did with the completions of a shard, or of several."""

    name: str
    """As the configuration calls it."""
    ending: str | None
    """What it writes after an answer; None where that is not known."""
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Key of `reasons.TEMPLATE_NOTES` → completions, and the first example."""

    def with_note(self, kind: str, count: int, example: str) -> TemplateUse:
        """The same with some more completions of a kind; the first example stays."""
        known, first = self.notes.get(kind, (0, example))
        return replace(self, notes={**self.notes, kind: (known + count, first)})

    def joined(self, other: TemplateUse | None) -> TemplateUse:
        """The same with what another one has seen."""
        found = self
        for kind, (count, example) in (other.notes if other else {}).items():
            found = found.with_note(kind, count, example)
        return found


def join_uses(many: Iterable[TemplateUse | None]) -> TemplateUse | None:
    """What several shards, or parts of one, say of their template; None: nothing."""
    return reduce(lambda left, right: left.joined(right) if left else right, many, None)


@dataclass(frozen=True)
class ScoredShard:
    """Columns of one shard, and what happened on the way; see `Scored`. Without a model, `columns` is enough."""

    columns: Mapping[str, Sequence[Any]]
    """Per column and group one number per completion, in the order of the table; None: dropped or absent."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Completions without a number, by reason."""
    counters: dict[str, float] = field(default_factory=dict)
    """What adds up over shards: trunk_tokens, head_rows, padding_tokens, flops_min, flops_model, seconds_model, …"""
    poisoned: list[str] = field(default_factory=list)
    """prompt_ids (hex) of the groups that the model could not score."""
    padded_because: str = ""
    """Why rows were padded rather than packed; empty when they were packed."""
    template_error: str = ""
    """The first of the template errors that are counted in `dropped`."""
    facts: dict[str, float] = field(default_factory=dict)
    """What does not add up over shards: of those ending in `_least` the smallest counts, of others the largest."""
    template: TemplateUse | None = None
    """What the chat template did; None where there is none."""
    same_as: dict[int, Sequence[int | None]] = field(default_factory=dict)
    """Groups of which some completions are the same tokens → for each completion the first one with its tokens, None
    where that is itself."""


Compute = Callable[[], Sequence[Scored]]
Begin = Callable[[ShardRef, pa.Table], Compute]
"""(shard, its groups) → what runs the models on them, and gives one `Scored` per job. Tokenising begins with the first
call and needs no model; the second one does. Two shards may be begun at once, one is computed at a time."""


class OnDevice(Protocol):
    """A model's place and precision, which the device's peak is measured at."""

    device: Any
    dtype: Any


@dataclass(frozen=True)
class Ready:
    """The models of a job, loaded."""

    begin: Begin
    engines: Sequence[OnDevice] = ()
    """What runs the models; empty where no F_min is counted to hold against the device."""


class Loader(Protocol):
    """How the scorer of a job is made in an actor, once: what a line of `kinds.KINDS` names."""

    def __call__(self, job: Job, storage: Storage, /) -> Ready:
        """Load what the job needs.

        Args:
            job: The record of the scorer, `job.scorer`, and where its models lie.
            storage: The workspace.

        Raises:
            UserError: a model cannot be loaded.
        """


def check_scored(job: Job, loader: str, groups: pa.Table, scored: Any) -> None:
    """Refuse what a kind of scorer made of a shard, unless it has every part and one number per completion.

    A completion, or a pair, that lacks a number must be counted in `dropped`: else it is lost without a word.

    Args:
        job: Of the scorer.
        loader: Where its loader lies, for the error.
        groups: Of the shard; schema `GROUPS`.
        scored: What it made; of a scorer whose unit is pairs, how many there are is not looked at.

    Raises:
        PrefselError: names the kind, its loader, what was got and what is valid.
    """
    who = f"score {job.label}: kind {job.scorer.kind!r}, loaded by {loader}"
    parts = [name for name, part in vars(Scored).items() if isinstance(part, property)]
    if lacking := [name for name in parts if not hasattr(scored, name)]:
        raise PrefselError(f"{who}: gave a {type(scored).__name__} without {', '.join(lacking)}; valid: a ScoredShard")
    if job.scorer.unit == "pairs":
        _require_counted(who, list(zip(*scored.columns.values())), scored.dropped, "pairs")
        return
    sizes = pc.list_value_length(groups["completions"]).to_pylist()
    for name, column in scored.columns.items():
        if [len(row) for row in column] != sizes:
            got = next((n for n, (row, size) in enumerate(zip(column, sizes)) if len(row) != size), None)
            where = f"{len(column)} groups of {len(sizes)}" if got is None else f"{len(column[got])} in group {got}"
            raise PrefselError(f"{who}: column {name!r} has {where}; valid: one number or None per completion")
    flat = [list(chain.from_iterable(column)) for column in scored.columns.values()]
    _require_counted(who, list(zip(*flat)), scored.dropped, "completions")


def _require_counted(who: str, rows: Sequence[tuple[Any, ...]], dropped: Mapping[str, int], unit: str) -> None:
    lacking = [number for number, row in enumerate(rows) if any(value is None for value in row)]
    if len(lacking) > (counted := sum(dropped.values())):
        raise PrefselError(
            f"{who}: gave None for {len(lacking)} {unit}, first number {lacking[0]} of the shard, and counted "
            f"{counted} in dropped ({dict(dropped)}); valid: every one that lacks a number is counted, by reason"
        )
