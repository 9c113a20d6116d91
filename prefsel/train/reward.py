"""The reward objective: a Bradley–Terry model of labelled pairs, with the two remedies against length bias.

    pairs ─┬─► held-out prompts ─► accuracy and calibration, before and after
           └─► draws, balanced by length ─► rewards of chosen and rejected ─► loss, with a length penalty

Shapes: N pairs, B draws of a global batch, P pairs of a micro-batch, C completions of a batch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from prefsel.errors import UserError
from prefsel.ingest.identity import HOLDOUT, split_of
from prefsel.models.chat import Encoder
from prefsel.models.packing import PackedBatch
from prefsel.models.padded import padded_rewards
from prefsel.models.pair_batch import Batch, pair_batch
from prefsel.models.reward import packed_rewards, supports_packed_rewards
from prefsel.numbers.agreement import agreement
from prefsel.train.calibration import holdout_report
from prefsel.train.data import EncodedPairs, Indices, Numbers, TrainingPairs, encode_pairs
from prefsel.train.draws import balanced_by_length
from prefsel.train.initial import load_reward_start
from prefsel.train.objective import Corpus, Measured, Probe, Record, Run, digest_of
from prefsel.train.reward_losses import debiased_margins, length_penalised_loss
from prefsel.train.run_config import RewardConfig

SALT = "reward-holdout"
"""Of the split: another one than the corpus's, so that the two splits are independent."""
NUM_PROBE_PAIRS = 4
"""Pairs whose rewards are compared after the export, the shortest ones: they are run one by one on a CPU."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BradleyTerry:
    """An `Objective`: its outputs are rewards, its model is a classifier with one output.

    It holds prompts out itself, and writes every prompt it saw beside the weights.
    """

    config: RewardConfig
    auto_class = AutoModelForSequenceClassification

    def prepare(self, pairs: TrainingPairs, eval_pairs: TrainingPairs | None, encoder: Encoder) -> Corpus:
        """Some prompts are held out by their hash; the pairs of the others are drawn, balanced by length.

        Pairs whose response the template cannot tell from its prompt are left out and counted.

        Raises:
            UserError: `eval_pairs` are given; the table has no prompt_id; no pair is left to train on, or the template
                fails for more than half of them.
        """
        if eval_pairs is not None:
            raise UserError("eval_pairs: a reward model holds prompts out itself; set holdout instead")
        config = self.config
        prompt_ids = pairs.prompt_ids("a reward model")
        encoded = encode_reward_pairs(pairs, encoder, config)
        ids = [prompt_ids[row] for row in encoded.rows_N]
        is_held_out_N = split_of(ids, holdout=config.holdout, proxy=0, salt=SALT) == HOLDOUT
        if is_held_out_N.all():
            raise UserError(f"holdout: got {config.holdout}, which leaves none of {len(ids)} pairs to train on")
        held_out, difference_N = np.flatnonzero(is_held_out_N), encoded.columns["length_difference"]
        draws, facts = balanced_by_length(
            np.flatnonzero(~is_held_out_N),
            difference_N,
            tau=config.length_balance_tau,
            seed=config.seed,
            is_shuffled=config.order == "shuffled",
        )
        if dist.get_rank() == 0:
            for warning in facts["warnings"]:
                logger.warning("%s", warning)
        arrays = (encoded.tokens_T, encoded.offsets, difference_N, is_held_out_N)
        return Corpus(
            pairs=encoded,
            draws=draws,
            eval_pairs=encoded,
            eval_indices=held_out if len(held_out) > 1 else held_out[:0],
            dropped={**encoded.dropped, "reward_holdout": len(held_out)},
            digest=digest_of(encoded.pair_ids, (array.tobytes() for array in arrays)),
            prompt_ids=ids,
            facts=facts,
        )

    def load_model(self, model_dir: str, tokenizer: Any, device: Any) -> nn.Module:
        """The initial classifier; see `load_reward_start`."""
        return load_reward_start(self.config, model_dir, tokenizer, device)

    def supports_packing(self, model: nn.Module) -> tuple[bool, str]:
        """Whether packed rows give exactly the classifier's rewards, and if not, why."""
        return supports_packed_rewards(model)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Rewards of the batch's completions, [C] float64; the model's own dtype decides what the head rounds to."""
        if isinstance(batch, PackedBatch):
            return packed_rewards(model, batch)[:, 0]
        return padded_rewards(model, batch)[:, 0]

    def losses(self, outputs_P2: Tensor, pairs: EncodedPairs, indices_P: Indices) -> Tensor:
        """`length_penalised_loss` of every pair."""
        difference_P = torch.from_numpy(pairs.columns["length_difference"][indices_P]).to(outputs_P2.device)
        margins_P = outputs_P2[:, 0] - outputs_P2[:, 1]
        return length_penalised_loss(margins_P, difference_P, rho=self.config.length_penalty_rho)

    def measures(self, outputs_B2: Numbers, pairs: EncodedPairs, indices_B: Indices) -> dict[str, Numbers]:
        """Loss, accuracy and margin, which is debiased as the loss has it; rewards, and whether chosen is as long."""
        difference_B = pairs.columns["length_difference"][indices_B]
        margins_B = outputs_B2[:, 0] - outputs_B2[:, 1]
        margin_B = debiased_margins(margins_B, difference_B, rho=self.config.length_penalty_rho)
        return {
            "loss": np.logaddexp(0.0, -margin_B),
            "accuracy": agreement(margin_B),
            "margin": margin_B,
            "reward_chosen": outputs_B2[:, 0],
            "reward_rejected": outputs_B2[:, 1],
            "longer_chosen": (difference_B >= 0).astype(np.float64),
        }

    def start_record(self, run: Run, corpus: Corpus) -> Record:
        """How the pairs are drawn."""
        return {"event": "sampling", "step": 0, **corpus.facts, "padding_reason": run.padding_reason}

    def evaluation(self, pairs: EncodedPairs, indices_B: Indices, measured: Measured) -> Record:
        """`holdout_report`, its main numbers on top."""
        found = holdout_report(measured.numbers["margin"], pairs.columns["length_difference"][indices_B])
        assert found is not None, "a single held-out pair is not evaluated"
        return {**{name: found[name] for name in ("loss", "accuracy", "margin", "num_pairs")}, "holdout": found}

    def probe(self, run: Run, corpus: Corpus) -> Probe:
        """The shortest pairs as one batch, and each of its completions with its prompt as a sequence of its own."""
        shortest = np.argsort(corpus.pairs.num_tokens_N, kind="stable")[:NUM_PROBE_PAIRS]
        groups = [corpus.pairs.group(int(index)) for index in shortest]
        batch = pair_batch(groups, is_packed=run.padding_reason is None, pad_token_id=run.pad_token_id)
        starts = [group.prompt_starts or (0, 0) for group in groups]
        sequences = [
            groups[group].prompt_tokens[starts[group][side] :] + groups[group].completion_tokens[side]
            for group, side in batch.completion_index
        ]
        return Probe(batch, sequences)

    def finish(self, run: Run, corpus: Corpus, history: list[Record], output_dir: Path) -> Record:
        """`sampling`, as in the first record; `holdout_before` and `holdout_after`, None with fewer than two pairs."""
        evaluations = [record["holdout"] for record in history if record["event"] == "eval"]
        before, after = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        return {"sampling": dict(corpus.facts), "holdout_before": before, "holdout_after": after}


def encode_reward_pairs(pairs: TrainingPairs, encoder: Encoder, config: RewardConfig) -> EncodedPairs:
    """The pairs' tokens, with the column `length_difference`: |y_w| − |y_l| in the configured unit, [N].

    Tokens are counted after truncation, the end of turn included. Errors as `encode_pairs`.
    """
    columns = {}
    if config.length_unit == "characters":
        columns["length_difference"] = -np.diff(pairs.text_lengths(), axis=1)[:, 0]
    encoded = encode_pairs(pairs, encoder, columns, strict=False)
    if config.length_unit == "tokens":
        lengths_N2 = encoded.response_tokens_N2.astype(np.float64)
        encoded.columns["length_difference"] = -np.diff(lengths_N2, axis=1)[:, 0]
    return encoded
