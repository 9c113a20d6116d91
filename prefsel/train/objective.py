"""What the training loop knows about what it trains: an objective, the pairs it prepared, and the run around them.

Shapes: N pairs, B draws of a global batch, P pairs of a micro-batch, C = 2P completions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from prefsel.models.chat import Encoder
from prefsel.models.packing import ModelShape
from prefsel.models.pair_batch import Batch
from prefsel.train.data import EncodedPairs, Indices, Numbers, TrainingPairs
from prefsel.train.draws import Draws
from prefsel.train.run_config import RunConfig

Record = dict[str, Any]
"""One line of a training's history, plain JSON: an `event`, the `step`, and numbers."""
Report = Callable[[Record, Path | None], None]
"""Told about every record and, where one was just saved, its checkpoint."""


@dataclass(frozen=True)
class Corpus:
    """The pairs of a training, as tokens: which are drawn from, and which are evaluated on."""

    pairs: EncodedPairs
    draws: Draws
    """Which of `pairs` every epoch visits."""
    eval_pairs: EncodedPairs
    """What `eval_indices` count: other pairs, or the same."""
    eval_indices: Indices
    """The pairs evaluated on; empty: there is no evaluation."""
    dropped: Mapping[str, int]
    """Pairs that are not trained on, by reason."""
    digest: str
    """Of everything in the data that moves a weight: a checkpoint is continued only where it is the same."""
    prompt_ids: Sequence[bytes] | None = None
    """Prompts to write beside the exported weights, so that the model never scores them; None: none are written."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the objective has to say about them."""


@dataclass(frozen=True)
class Measured:
    """What one pass over a batch found, the same on every worker."""

    numbers: Mapping[str, Numbers]
    """Name → one number per draw, [B], in the order of the batch."""
    flops_forward: float
    """Of the forward passes, weightless ones of idle workers left out."""


@dataclass(frozen=True)
class Probe:
    """A few sequences whose outputs are compared between the engine and the exported model."""

    batch: Batch | Tensor
    """What the engine is called with: a batch of completions, or plain token ids, [1, T]."""
    sequences: list[list[int]]
    """The token ids of the same sequences; the exported model is called with one at a time."""


@dataclass(frozen=True)
class Run:
    """What stays fixed while training: objective, engine, and this worker's place among the others."""

    objective: Objective
    engine: Any
    """DeepSpeed's, around an `engine.EngineModule`."""
    device: Any
    rank: int
    world_size: int
    num_steps: int
    padding_reason: str | None
    """Why batches are padded, one completion per row; None: they are packed."""
    pad_token_id: int
    shape: ModelShape
    """What the FLOPs of a pass follow from; adapters are not counted."""


class Objective(Protocol):
    """What a training is for: how pairs become numbers to learn from, and what the result is.

    `preference.Preference` trains a policy with any loss of `LOSSES`, `reward.BradleyTerry` a reward model. The loop
    does the rest: batches, accumulation, schedule, records, checkpoints, export.
    """

    @property
    def config(self) -> RunConfig:
        """The run's options."""

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads the exported folder."""

    def prepare(self, pairs: TrainingPairs, eval_pairs: TrainingPairs | None, encoder: Encoder) -> Corpus:
        """Tokenise and check the pairs, and decide which are drawn and which held out."""

    def load_model(self, model_dir: str, tokenizer: Any, device: Any) -> nn.Module:
        """The initial model in training mode; may settle the tokenizer's pad token."""

    def supports_packing(self, model: nn.Module) -> tuple[bool, str]:
        """Whether packed rows give exactly the model's outputs, and if not, why."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """One number per completion of the batch, [C] float64 with gradient."""

    def losses(self, outputs_P2: Tensor, pairs: EncodedPairs, indices_P: Indices) -> Tensor:
        """The loss of every pair, [P], from its outputs, chosen first."""

    def measures(self, outputs_B2: Numbers, pairs: EncodedPairs, indices_B: Indices) -> dict[str, Numbers]:
        """What is recorded of every pair, [B] each: `loss` (where it has one), `accuracy`, `margin`, …"""

    def start_record(self, run: Run, corpus: Corpus) -> Record:
        """Checks before the first step, as the first record of the history; raises where one fails."""

    def evaluation(self, pairs: EncodedPairs, indices_B: Indices, measured: Measured) -> Record:
        """What an evaluation says about held-out pairs; `margins`, if there, are those of single pairs, in order."""

    def probe(self, run: Run, corpus: Corpus) -> Probe:
        """What the exported model is compared on."""

    def finish(self, run: Run, corpus: Corpus, history: list[Record], output_dir: Path) -> Record:
        """What the result says besides what every training says; may write more beside the model."""


def digest_of(pair_ids: Iterable[str], parts: Iterable[bytes]) -> str:
    """blake2b-128 over the ids and the bytes that follow."""
    digest = hashlib.blake2b("".join(pair_ids).encode(), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def mean_record(pairs: EncodedPairs, indices_B: Indices, measured: Measured) -> Record:
    """Means over a batch of everything measured, its tokens, pairs and FLOPs."""
    return {
        **{name: float(values_B.mean()) for name, values_B in measured.numbers.items()},
        "num_tokens": int(pairs.num_tokens_N[indices_B].sum()),
        "num_pairs": len(indices_B),
        "flops_forward": measured.flops_forward,
    }
