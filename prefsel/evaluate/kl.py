r"""How far a policy has moved from its reference: KL(policy ‖ reference) on the policy's own answers, teacher forced.

    own answers ─▶ packed or padded rows ─▶ both models' logits at every response token
                       ├─▶ exact:        \(\sum_t \sum_v \pi_t(v) \log (\pi_t(v) / q_t(v))\)
                       └─▶ Monte Carlo:  \(\sum_t \log (\pi_t(y_t) / q_t(y_t))\)

with \(\pi_t(v) = \pi(v \mid x, y_{<t})\). Over answers sampled at T = 1 both have the expectation
\(KL(\pi(\cdot \mid x) \,\|\, q(\cdot \mid x))\). The exact one has the expectation of each token in place of its
draw, so it is never negative and varies far less.

Shapes: R response tokens of a batch, V vocabulary, C completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefsel.errors import UserError
from prefsel.models.architecture import in_evaluation_mode, supports_packing, unwrapped
from prefsel.models.chat import EncodedGroup, Encoder, Truncation
from prefsel.models.head import chunk_rows
from prefsel.models.loading import check_vocabulary
from prefsel.models.logps import PADDED_LOGITS_BYTES, Route, logps_route, model_device, packed_hidden, routed
from prefsel.models.neighbours import padding_matters
from prefsel.models.packing import PackedBatch, pack
from prefsel.models.padded import PaddedBatch, pad, padded_logps, response_logits, response_targets

HEAD_ROWS = 512
"""Rows whose logits of both models exist at once: half of those of one model's log-probs."""


def policy_kl(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    groups: Any,
    *,
    token_budget: int,
    template: str = "auto",
    max_length: int | None = None,
    truncation: Truncation = "drop",
) -> dict[str, list[Any]]:
    """KL(policy ‖ reference) of every completion of every group, exact per token and by Monte Carlo.

    Args:
        policy: A causal language model, whose answers the completions are; scored without dropout.
        reference: Another one over the same tokens.
        tokenizer: Of both.
        groups: As `prefsel.models.score_groups`. The texts are tokenised anew and end with the template's end of turn,
            also where a sample was cut off.
        token_budget: Most tokens of a row.
        template: As `score_groups`.
        max_length: As `score_groups`.
        truncation: As `score_groups`.

    Returns:
        Columns as of `score_groups`, with `kl` and `log_ratio` in place of `logps`: nats, summed over the response.

    Raises:
        UserError: As `score_groups`; or the models have other vocabularies.
        NonFiniteError: A number is NaN or infinite, as where the reference excludes a token that the policy may say;
            names the prompts.
    """
    check_vocabulary(tokenizer, policy)
    encoder = Encoder(tokenizer, template, max_length, truncation)
    with in_evaluation_mode(policy), in_evaluation_mode(reference):
        route = kl_route(policy, reference, getattr(tokenizer, "pad_token_id", None))
        columns, values = routed(policy, encoder, groups, route, token_budget)
    kl, log_ratio = ([[None if v is None else v[place] for v in row] for row in values] for place in (0, 1))
    return {**columns, "kl": kl, "log_ratio": log_ratio}


def kl_route(policy: nn.Module, reference: nn.Module, pad_token_id: int | None = None) -> Route:
    """How two models are run over the same rows: packed where both can be; its numbers are (exact, Monte Carlo).

    Raises:
        UserError: They have other vocabularies, or a model's numbers are no log-probs of a sequence alone.
    """
    sizes = [unwrapped(model).config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"KL: the policy has logits of {sizes[0]:,} tokens, the reference of {sizes[1]:,}; valid: two models over "
            "the same tokens"
        )
    supported = {"policy": supports_packing(policy), "reference": supports_packing(reference)}
    unpacked = [f"{who}: {why}" for who, (is_packed, why) in supported.items() if not is_packed]
    if not unpacked:
        return Route(True, "", pack, partial(packed_kl, policy, reference), num_forwards=2.0)
    fill = pad_token_id or 0
    singles: list[str] = []
    for model in (policy, reference):
        logps_route(model, pad_token_id)  # refuses what gives no log-probs
        singles += filter(None, [padding_matters(model, partial(padded_logps, model), fill)])
    most_tokens = PADDED_LOGITS_BYTES // (2 * 8 * sizes[0])
    rows = partial(_padded_rows, most_tokens=most_tokens, pad_token_id=None if singles else fill)
    return Route(False, "; ".join(unpacked + singles), rows, partial(padded_kl, policy, reference), num_forwards=2.0)


def packed_kl(policy: nn.Module, reference: nn.Module, batch: PackedBatch) -> Tensor:
    """(exact, Monte Carlo) of every completion of a packed row, [C, 2] float64."""
    models = (policy, reference)
    hidden = [packed_hidden(model, batch.to(model_device(model))) for model in models]
    heads = [unwrapped(model).get_output_embeddings() for model in models]
    chunk = min(chunk_rows(model, head, one_TD, HEAD_ROWS) for model, head, one_TD in zip(models, heads, hidden))
    parts = []
    for rows, targets in zip(batch.rows_R.split(chunk), batch.targets_R.split(chunk)):
        logits = [head(one_TD.index_select(0, rows.to(one_TD.device))) for head, one_TD in zip(heads, hidden)]
        parts.append(token_kl(logits[0], logits[1].to(logits[0].device), targets.to(logits[0].device)))
    values_R2 = torch.cat(parts)
    return torch.stack([batch.sums(values_R2[:, place]) for place in (0, 1)], dim=1)


def padded_kl(policy: nn.Module, reference: nn.Module, batch: PaddedBatch) -> Tensor:
    """(exact, Monte Carlo) of every row of a padded batch, [B, 2] float64."""
    ours_B, theirs_B = (response_logits(model, batch.to(model_device(model))) for model in (policy, reference))
    both = zip(ours_B, theirs_B, response_targets(batch))
    return torch.stack(
        [token_kl(ours, theirs.to(ours.device), targets.to(ours.device)).sum(dim=0) for ours, theirs, targets in both]
    )


def token_kl(policy_RV: Tensor, reference_RV: Tensor, targets_R: Tensor) -> Tensor:
    r"""\(\sum_v p \log(p/q)\) of every token, and log p − log q of the token that was said, [R, 2] float64.

    Args:
        policy_RV: Logits.
        reference_RV: Logits.
        targets_R: The tokens that were said.
    """
    logp_RV, logq_RV = (
        logits_RV.log_softmax(dim=-1, dtype=torch.promote_types(logits_RV.dtype, torch.float32))
        for logits_RV in (policy_RV, reference_RV)
    )
    said_R = (logp_RV - logq_RV).gather(1, targets_R[:, None])[:, 0].double()
    # A token that the policy never says adds nothing, whatever the reference thinks of it: 0 · log 0 = 0.
    terms_RV = torch.where(logp_RV == -torch.inf, 0.0, logp_RV.exp() * (logp_RV - logq_RV))
    return torch.stack([terms_RV.sum(dim=-1, dtype=torch.float64), said_R], dim=1)


def _padded_rows(
    groups: Sequence[EncodedGroup], token_budget: int, *, most_tokens: int, pad_token_id: int | None
) -> list[PaddedBatch]:
    return pad(groups, min(token_budget, most_tokens), pad_token_id=pad_token_id)
