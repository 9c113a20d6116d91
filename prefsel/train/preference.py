"""The preference objective: a policy trained on pairs with stored reference log-probs, by any loss of `LOSSES`.

Shapes: N pairs, B of a global batch, P of a micro-batch, C completions of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prefsel.config import DpoOptions
from prefsel.config.losses import loss_named
from prefsel.errors import UserError
from prefsel.models.architecture import supports_packing, unwrapped
from prefsel.models.chat import Encoder
from prefsel.models.logps import packed_logps
from prefsel.models.packing import PackedBatch
from prefsel.models.padded import PaddedBatch, padded_logps
from prefsel.models.pair_batch import Batch
from prefsel.train.data import EncodedPairs, Indices, Numbers, TrainingPairs, encode_pairs
from prefsel.train.draws import every_pair_once
from prefsel.train.initial import load_policy
from prefsel.train.losses import loss_function, preference_stats
from prefsel.train.objective import Corpus, Measured, Probe, Record, Run, digest_of, mean_record
from prefsel.train.optimizer_state import export_optimizer_state
from prefsel.train.pair_source import REFERENCE_COLUMNS
from prefsel.train.run_config import DpoConfig
from prefsel.train.selfchecks import self_check

NUM_PROBE_TOKENS = 256
"""Tokens of the first pair whose logits are compared after the export."""


@dataclass(frozen=True)
class Preference:
    """An `Objective`: its outputs are response log-probs, its model is a causal language model, with adapters if asked.

    Held-out pairs may lack `preference_divergence`: then their `loss` is None. They have no weights.
    """

    config: DpoConfig
    auto_class = AutoModelForCausalLM

    def prepare(self, pairs: TrainingPairs, eval_pairs: TrainingPairs | None, encoder: Encoder) -> Corpus:
        """Every pair is trained on; held out are others, or none.

        Raises:
            UserError: A column of the loss or the order is missing or has nulls; no pair is left.
            NonFiniteError: A number is NaN or infinite.
        """
        train = encode_pairs(pairs, encoder, _columns_for(self.config, pairs), strict=False)
        held_out, eval_indices = train, np.arange(0)
        if eval_pairs is not None and len(eval_pairs):
            columns = _columns_for(self.config, eval_pairs, is_training=False)
            held_out = encode_pairs(eval_pairs, encoder, columns, strict=False)
            eval_indices = np.arange(len(held_out))
        members = np.arange(len(train))
        if self.config.order == "score":  # descending, ties by pair_id
            members = np.lexsort((np.array(train.pair_ids), -train.columns["score"]))
        parts = [] if train.reference_logps_N2 is None else [train.reference_logps_N2.tobytes()]
        parts += [name.encode() + train.columns[name].tobytes() for name in sorted(train.columns)]
        return Corpus(
            pairs=train,
            draws=every_pair_once(members, seed=self.config.seed, is_shuffled=self.config.order == "shuffled"),
            eval_pairs=held_out,
            eval_indices=eval_indices,
            dropped=train.dropped,
            digest=digest_of(train.pair_ids, parts),
        )

    def load_model(self, model_dir: str, tokenizer: Any, device: Any) -> nn.Module:
        """The initial policy; see `load_policy`."""
        return load_policy(self.config, model_dir, device)

    def supports_packing(self, model: nn.Module) -> tuple[bool, str]:
        """Whether packed rows give exactly the model's log-probs, and if not, why."""
        return supports_packing(model)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probs of the batch's completions, nats, summed over the response, [C] float64."""
        if isinstance(batch, PaddedBatch):
            return padded_logps(model, batch)
        if self.config.zero_stage == 3 and dist.get_world_size() > 1:
            return _with_equal_head_calls(model, batch)
        return packed_logps(model, batch)

    def losses(self, outputs_P2: Tensor, pairs: EncodedPairs, indices_P: Indices) -> Tensor:
        """The configured loss of every pair."""
        return pair_losses(self.config, outputs_P2, PairInputs.of(pairs, indices_P, outputs_P2.device))

    def measures(self, outputs_B2: Numbers, pairs: EncodedPairs, indices_B: Indices) -> dict[str, Numbers]:
        """`loss`, unless the pairs lack one of its columns, and `preference_stats`."""
        policy_B2, inputs = torch.from_numpy(outputs_B2), PairInputs.of(pairs, indices_B)
        found = pair_stats(self.config, policy_B2, inputs)
        if set(loss_named(self.config.loss).columns) <= set(pairs.columns):
            found = {"loss": pair_losses(self.config, policy_B2, inputs), **found}
        return {name: values_B.detach().numpy() for name, values_B in found.items()}

    def start_record(self, run: Run, corpus: Corpus) -> Record:
        """The self-checks; see `selfchecks`."""
        return self_check(self.config, run, corpus)

    def evaluation(self, pairs: EncodedPairs, indices_B: Indices, measured: Measured) -> Record:
        """Means over the pairs, and `margins`, those of every pair."""
        margins = measured.numbers["margin"].tolist()
        return {"loss": None, **mean_record(pairs, indices_B, measured), "margins": margins}

    def probe(self, run: Run, corpus: Corpus) -> Probe:
        """The first tokens of the first pair: their logits are compared."""
        tokens = [token for piece in corpus.pairs.pieces(0)[:2] for token in piece][:NUM_PROBE_TOKENS]
        return Probe(torch.tensor([tokens]), [tokens])

    def finish(self, run: Run, corpus: Corpus, history: list[Record], output_dir: Path) -> Record:
        """`held_out_ids`, the pairs that `margins` of evaluations are of; `optimizer_dir`, Adam's moments, None unless
        kept.
        """
        found: Record = {"held_out_ids": [corpus.eval_pairs.pair_ids[index] for index in corpus.eval_indices]}
        if not self.config.keep_optimizer_state:
            return found | {"optimizer_dir": None}
        rate = [record["lr"] for record in history if record["event"] == "step"][-1]
        folder = export_optimizer_state(self.config, run.engine, output_dir, step=run.num_steps, learning_rate=rate)
        return found | {"optimizer_dir": str(folder)}


def _with_equal_head_calls(model: nn.Module, row: PackedBatch) -> Tensor:
    """Log-probs where every call of a module gathers its weights from all workers: all call the head equally often.

    The head runs once per chunk of response tokens; workers with fewer chunks call it again with weight zero. The extra
    calls come last in the forward pass and so first in the backward pass, as other workers' last chunks. The workers
    agree on the number of calls just before the first: between two calls it would deadlock.
    """
    sample: list[Tensor] = []
    num_extra: list[int] = []

    def agree(module: nn.Module, arguments: tuple[Tensor]) -> None:
        if not sample:
            num_calls = -(-row.head_rows // len(arguments[0]))
            most = torch.tensor(num_calls, device=arguments[0].device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            sample.append(arguments[0][:1])
            num_extra.append(int(most) - num_calls)

    head = unwrapped(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(agree, prepend=True)
    logps_C = packed_logps(model, row)
    hook.remove()
    for _ in range(num_extra[0]):
        logps_C = logps_C + 0.0 * head(sample[0]).double().sum()
    return logps_C


# --------------------------------------------------------------------------------------------- pairs → loss


@dataclass(frozen=True)
class PairInputs:
    """What is known of N pairs before the policy sees them; float64."""

    reference_N2: Tensor | None
    """Log-probs of chosen and rejected under the reference; None: not known."""
    num_tokens_N2: Tensor
    """Response tokens of chosen and rejected."""
    columns: Mapping[str, Tensor]
    """Further numbers, [N] each, by name."""

    @classmethod
    def of(cls, pairs: EncodedPairs, indices_N: Indices, device: torch.device | str = "cpu") -> PairInputs:
        """Those of some pairs."""

        def put(values: Any) -> Tensor:
            return torch.from_numpy(values[indices_N].astype(np.float64)).to(device)

        return cls(
            reference_N2=None if pairs.reference_logps_N2 is None else put(pairs.reference_logps_N2),
            num_tokens_N2=put(pairs.response_tokens_N2),
            columns={name: put(values) for name, values in pairs.columns.items()},
        )

    def exchanged(self) -> PairInputs:
        """With the two sides exchanged, for a loss that takes no number of the pair as labelled."""
        reference_N2 = None if self.reference_N2 is None else self.reference_N2.flip(1)
        return replace(self, reference_N2=reference_N2, num_tokens_N2=self.num_tokens_N2.flip(1))


def pair_losses(options: DpoOptions, policy_N2: Tensor, inputs: PairInputs) -> Tensor:
    r"""The configured loss of every pair, [N], from the policy's log-probs of chosen and rejected, [N, 2].

    Where pairs have weights it is \(w\,\ell(+)\), or with `weighting: label` \(w\,\ell(+) + (1 - w)\,\ell(-)\), with
    \(\ell(-)\) the loss of the turned label: chosen and rejected exchanged. Weights are no function of the policy.

    Raises:
        UserError: The loss gives something else than one value per pair.
    """
    losses_N = _losses_as_given(options, policy_N2, inputs)
    if (weight_N := inputs.columns.get("weight")) is None:
        return losses_N
    if options.weighting == "loss":
        return weight_N * losses_N
    return weight_N * losses_N + (1.0 - weight_N) * _losses_as_given(options, policy_N2.flip(1), inputs.exchanged())


def _losses_as_given(options: DpoOptions, policy_N2: Tensor, inputs: PairInputs) -> Tensor:
    """The configured loss without weights; errors as `pair_losses`."""
    loss = loss_named(options.loss)
    logps = list(policy_N2.unbind(1))
    if loss.uses_reference:
        assert inputs.reference_N2 is not None, "checked before the first step"
        logps += inputs.reference_N2.unbind(1)
    columns = {name: inputs.columns[name] for name in loss.columns}
    if loss.uses_lengths:
        columns |= dict(zip(("num_tokens_chosen", "num_tokens_rejected"), inputs.num_tokens_N2.unbind(1)))
    losses_N = loss_function(options.loss)(*logps, **columns, **loss.parameters(options))
    shape = tuple(losses_N.shape) if isinstance(losses_N, Tensor) else type(losses_N).__name__
    if shape != (len(policy_N2),):
        raise UserError(f"loss {options.loss!r}: gave {shape}; valid: ({len(policy_N2)},), one per pair")
    return losses_N


def pair_stats(options: DpoOptions, policy_N2: Tensor, inputs: PairInputs) -> dict[str, Tensor]:
    """`preference_stats` of the rewards that the loss compares: with a reference or without, summed or per token."""
    loss = loss_named(options.loss)
    reference_N2 = inputs.reference_N2 if loss.uses_reference else torch.zeros_like(policy_N2)
    assert reference_N2 is not None, "checked before the first step"
    if loss.compares_means(options):
        policy_N2, reference_N2 = policy_N2 / inputs.num_tokens_N2, reference_N2 / inputs.num_tokens_N2
    return preference_stats(*policy_N2.unbind(1), *reference_N2.unbind(1), beta=options.beta)


def _columns_for(options: DpoOptions, pairs: TrainingPairs, *, is_training: bool = True) -> dict[str, Numbers]:
    """The numbers beside tokens and log-probs that the loss (and, to train, the order) takes of every pair.

    Held-out pairs may lack those of the loss: they have then rewards and an accuracy but no loss.

    Raises:
        UserError: A column is missing or has nulls; or the loss has a reference and the table no log-probs of it.
        NonFiniteError: A value is NaN or infinite.
    """
    loss, wanted_by = loss_named(options.loss), f"loss {options.loss!r}"
    if loss.uses_reference and pairs.reference_logps_N2 is None:
        raise UserError(f"training table: {wanted_by} needs the columns {list(REFERENCE_COLUMNS)}")
    columns: dict[str, Numbers] = {}
    if is_training and options.order == "score":
        columns["score"] = pairs.numbers("score", "order 'score'")
    if is_training and options.weight is not None:
        columns["weight"] = pairs.weights(options.weighting)
    if not is_training and "preference_divergence" not in pairs.table.column_names:
        return columns
    if "preference_divergence" in loss.columns:
        columns["preference_divergence"] = pairs.numbers("preference_divergence", wanted_by)
    if "aspect_weight" in loss.columns:
        columns["aspect_weight"] = pairs.aspect_weights(options.aspect_weights or {})
    return columns
