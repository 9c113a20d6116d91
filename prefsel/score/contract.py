"""What a kind of scorer must be for the rest of the package: one record per shard, and a way to make it in an actor.

    Job ──load──▶ Ready ──begin(shard, groups)──▶ Compute ──()──▶ one Scored per job

A new kind of scorer is a record in `config/scorers.py`, a file with a loader beside this one, and a line in `kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from prefsel.workspace.catalog import ShardRef


class Scored(Protocol):
    """The numbers of one shard and what happened on the way; `engine.ScoredShard` is one."""

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
        """prompt_ids (hex) of the groups for which the model gave NaN or infinity."""

    @property
    def padded_because(self) -> str:
        """Why rows were padded rather than packed; empty when they were packed."""

    @property
    def template_error(self) -> str:
        """The first of the template errors that are counted in `dropped`."""


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
    engines: Sequence[OnDevice]
    """What runs the models; empty where no F_min is counted to hold against the device."""
