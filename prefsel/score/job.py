"""What the actors of a scorer are told: plain values, small enough to travel, and how models are found on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefsel.config import CrossFit, PooledScorer
from prefsel.errors import UserError
from prefsel.pairs.reader import PairReader
from prefsel.workspace.folders import fetch_folder
from prefsel.workspace.storage import Storage


@dataclass(frozen=True)
class Job:
    """What an actor needs to build its scorer; pickles small."""

    scorer: PooledScorer
    models: tuple[tuple[int | None, dict[str, Any]], ...]
    """The fold (None: all prompts) and the loading arguments of each model."""
    label: str = ""
    policy: dict[str, Any] | None = None
    """Loading arguments of the policy that generates."""
    beside: dict[str, Any] | None = None
    """Loading arguments of the model that its own is compared with."""
    cross_fit: CrossFit | None = None
    own_aspect: str | None = None
    """Of a training without folds: the aspect that its model was trained on."""
    tangent: str = ""
    """Folder of the tangent."""
    reader: PairReader | None = None
    """Of pairs with the reference's log-probs, where the scorer needs them."""
    reference: str = ""
    carried: str = ""
    """Folder, without the source, of numbers that completions have from other shards; empty where there are none."""
    names: tuple[str, ...] = ()
    """Of the columns, as far as numbers are carried over."""
    is_trained: bool = False
    """Whether the models come from a training: they may have prompts that they must not score."""

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that one copy of its model takes; 0 where it runs none."""
        return int(self.models[0][1]["gpus_per_replica"]) if self.models else 0

    def loading(self, storage: Storage, number: int = 0) -> dict[str, Any]:
        """Loading arguments of one model, on this machine.

        Raises:
            UserError: its record names no model.
        """
        if not self.models:
            record = type(self.scorer)
            raise UserError(
                f"scorers.{self.label}: kind {self.scorer.kind!r} loads a model, and names none; return its name from "
                f"`models` of the record {record.__name__} in {record.__module__}"
            )
        return local(self.models[number][1], storage)


def local(settings: Mapping[str, Any], storage: Storage) -> dict[str, Any]:
    """Loading arguments with the path of a model made here as a folder of this machine."""
    settings = dict(settings)
    made_here = settings.pop("made_here")
    return settings | ({"path": str(fetch_folder(storage, settings["path"]))} if made_here else {})
