"""The labelled pairs of a reward model: their tokens, which are held out, and which ones an epoch draws.

The draws depend on (seed, epoch) and the lengths alone, and a global batch is a slice of them: as in `data`, the
number of consumed pairs says where a run stands, whatever the number of workers.

Shapes: N pairs; B draws of a global batch.
"""

from __future__ import annotations

import functools
import itertools
import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from prefsel.errors import UserError, invalid
from prefsel.ingest.identity import HOLDOUT, split_of
from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.train.data import NUM_OFFENDERS_SHOWN, Indices, epoch_order
from prefsel.train.reward_config import RewardConfig
from prefsel.train.reward_losses import length_balanced_frequency

COLUMNS = ("pair_id", "prompt_id", "prompt", "chosen", "rejected")
IDS = ("pair_id", "prompt_id")
SALT = "reward-holdout"
"""Of the split: another one than the corpus's, so that the two splits are independent."""
HELPFUL_TAU = 0.5
"""Below about this, balanced sampling is further from one half than the data."""
LONGER, SHORTER, MIXING = range(3)
"""Streams of random numbers."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardPairs:
    """Tokenised pairs in one flat integer buffer, with the prompts they belong to and how their lengths differ."""

    pair_ids: list[str]
    prompt_ids: list[bytes]
    tokens_T: npt.NDArray[np.int32]
    """Prompt, chosen and rejected of pair 0, then of pair 1, …"""
    offsets: Indices
    """Where each of the 3N pieces begins, and the end: [3N + 1]."""
    prompt_starts_N2: npt.NDArray[np.int32]
    """Prompt tokens that chosen and rejected go without (`truncation="left"`)."""
    length_difference_N: npt.NDArray[np.float64]
    """|y_w| − |y_l| in the configured unit; tokens are counted after truncation, the end-of-turn included."""
    is_held_out_N: npt.NDArray[np.bool_]
    dropped: dict[str, int]
    """Pairs left out, by reason."""
    num_truncated: int
    """Completions that were cut."""

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def num_tokens_N(self) -> Indices:
        """Tokens of each pair's segment [prompt | chosen | rejected]."""
        return np.diff(self.offsets[::3])

    def pieces(self, index: int) -> list[list[int]]:
        """Prompt, chosen and rejected tokens of one pair."""
        bounds = self.offsets[3 * index : 3 * index + 4]
        return [self.tokens_T[start:end].tolist() for start, end in itertools.pairwise(bounds)]

    def group(self, index: int) -> EncodedGroup:
        """One pair as a prompt with two completions, chosen first."""
        prompt, chosen, rejected = self.pieces(index)
        starts = tuple(self.prompt_starts_N2[index].tolist())
        return EncodedGroup(prompt, [chosen, rejected], ["ok", "ok"], 0, starts if any(starts) else ())


# ------------------------------------------------------------------------------------------------ table → tokens


def encode_reward_pairs(table: pa.Table, encoder: Encoder, config: RewardConfig) -> RewardPairs:
    """Tokenise every pair once and hold some prompts out, before the first step.

    Args:
        table: Columns `COLUMNS`; ids as hex strings or 16 raw bytes, messages as lists of {role, content}.
        encoder: The tokenizer with its template and length limit.
        config: Says which prompts are held out and what lengths are counted in.

    Returns:
        The pairs that fit; those that do not are counted in `dropped` as `too_long`, or as `template_error` where the
        template cannot tell a response from its prompt.

    Raises:
        UserError: A column is missing, a value null, a pair_id there twice; no pair fits, none is left to train on, or
            the template fails for more than half of them.
    """
    table = check_table(table)
    tokens, offsets, starts, kept, lengths = array("i"), [0], [], [], []
    dropped: Counter[str] = Counter()
    num_truncated = 0
    for number, (row, group) in enumerate(_encoded(table, encoder)):
        if bad := [status for status in group.status if status != "ok"]:
            dropped[bad[0]] += 1
            continue
        for piece in (group.prompt_tokens, *group.completion_tokens):
            tokens.extend(piece)
            offsets.append(len(tokens))
        sizes = map(len, group.completion_tokens) if config.length_unit == "tokens" else _characters(row)
        lengths.append(tuple(sizes))
        starts.append(group.prompt_starts or (0, 0))
        kept.append(number)
        num_truncated += group.num_truncated
    if 2 * dropped["template_error"] > table.num_rows:
        raise UserError(f"{dropped['template_error']} of {table.num_rows} pairs: {encoder.tolerated}")
    if not kept:
        raise UserError(f"training table: none of {table.num_rows} pairs fits max_length; raise it or set truncation")
    rows = table.select(list(IDS)).take(pa.array(kept)).to_pydict()
    roles_N = split_of(rows["prompt_id"], holdout=config.holdout, proxy=0, salt=SALT)
    if (roles_N == HOLDOUT).all():
        raise UserError(f"holdout: got {config.holdout}, which leaves none of {len(kept)} pairs to train on")
    return RewardPairs(
        pair_ids=[pair_id.hex() for pair_id in rows["pair_id"]],
        prompt_ids=rows["prompt_id"],
        tokens_T=np.frombuffer(tokens, dtype=np.int32),
        offsets=np.array(offsets, dtype=np.int64),
        prompt_starts_N2=np.array(starts, dtype=np.int32),
        length_difference_N=-np.diff(np.array(lengths, dtype=np.float64), axis=1)[:, 0],
        is_held_out_N=roles_N == HOLDOUT,
        dropped={reason: dropped[reason] for reason in ("too_long", "template_error")},
        num_truncated=num_truncated,
    )


def check_table(table: pa.Table) -> pa.Table:
    """The table with `COLUMNS` only, its ids as raw bytes.

    Raises:
        UserError: A column is missing, a value null, or a pair_id there twice.
    """
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise UserError(f"training table: missing columns {missing}; got {table.column_names}")
    if not table.num_rows:
        raise UserError("training table: it has no row")
    table = table.select(list(COLUMNS))
    for name in COLUMNS:
        if table[name].null_count:
            rows = np.flatnonzero(table[name].is_null().to_numpy(zero_copy_only=False))[:NUM_OFFENDERS_SHOWN]
            raise UserError(f"training table: {name} is null in {table[name].null_count} rows, first: {rows.tolist()}")
    for name in IDS:
        table = table.set_column(COLUMNS.index(name), name, _raw_ids(name, table[name]))
    ids = Counter(table["pair_id"].to_pylist())
    if twice := [pair_id.hex() for pair_id, count in ids.items() if count > 1]:
        raise UserError(f"training table: pair_id occurs twice, first: {twice[:NUM_OFFENDERS_SHOWN]}")
    return table


def _raw_ids(name: str, column: pa.ChunkedArray) -> pa.Array:
    """Ids as 16 raw bytes, whatever they came as.

    Raises:
        UserError: One is neither 32 hex digits nor 16 bytes.
    """
    values = column.to_pylist()
    try:
        return pa.array([bytes.fromhex(value) if isinstance(value, str) else value for value in values], pa.binary(16))
    except (ValueError, TypeError) as error:  # Arrow's own errors are among these
        raise invalid(f"training table: {name}", values[0], "32 hex digits, or 16 bytes, in every row") from error


def _encoded(table: pa.Table, encoder: Encoder, batch_size: int = 512) -> Iterator[tuple[dict[str, Any], EncodedGroup]]:
    for batch in table.to_batches(max_chunksize=batch_size):
        rows = batch.to_pylist()
        conversations = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
        yield from zip(rows, encoder.encode_groups(conversations, strict=False))


def _characters(row: dict[str, Any]) -> Iterator[int]:
    return (sum(len(message["content"]) for message in row[side]) for side in ("chosen", "rejected"))


# -------------------------------------------------------------------------------------------------------- draws


@dataclass(frozen=True, eq=False)
class Sampling:
    """Which pairs an epoch draws: as many as there are, so many of them from either side of the length balance.

    Compared and hashed by identity: one is made per run.
    """

    members: Indices
    """The pairs that are trained on."""
    is_balanced: bool
    """Whether the two sides are drawn from apart; if not, an epoch draws every pair once."""
    longer: Indices
    """D⁺, those whose chosen completion is at least as long."""
    shorter: Indices
    """D⁻, the others."""
    num_longer: int
    """Draws of an epoch from D⁺; the rest comes from D⁻."""
    facts: dict[str, Any]
    """What the run says about it: `longer_chosen_share` f⁺, `longer_chosen_frequency` of the draws, `warnings`."""


def plan_sampling(members: Indices, length_difference_N: npt.NDArray[np.float64], tau: float | None) -> Sampling:
    """Decide how many draws of an epoch come from D⁺, exactly round(f̂⁺ · N) of N.

    Args:
        members: The pairs that are trained on.
        length_difference_N: |y_w| − |y_l| of all pairs.
        tau: Temperature of the balance; None: every pair is drawn once an epoch.
    """
    is_longer = length_difference_N[members] >= 0
    longer, shorter = members[is_longer], members[~is_longer]
    share = len(longer) / len(members)
    num_longer, warnings = len(longer), []
    is_balanced = tau is not None and len(longer) > 0 and len(shorter) > 0
    if tau is not None and not is_balanced:
        side = "shorter" if len(longer) else "at least as long"
        warnings.append(f"length_balance_tau: no chosen completion is {side}, so pairs are drawn as they come")
    if tau is not None and is_balanced:
        frequency = length_balanced_frequency(share, tau)
        num_longer = round(frequency * len(members))
        if tau < HELPFUL_TAU:
            warnings.append(
                f"length_balance_tau: {tau:g} is below {HELPFUL_TAU:g}, where balancing makes it worse: the chosen "
                f"completion is the longer one in {share:.3f} of the pairs and in {frequency:.3f} of the draws"
            )
    facts = {"longer_chosen_share": share, "longer_chosen_frequency": num_longer / len(members), "warnings": warnings}
    return Sampling(members, is_balanced, longer, shorter, num_longer, facts)


@functools.lru_cache(maxsize=2)
def epoch_draws(sampling: Sampling, epoch: int, *, seed: int, order: Literal["shuffled", "given"]) -> Indices:
    """The pairs that an epoch visits, in order, [N].

    Balanced: either side is drawn from one endless sequence of its permutations, which the next epoch continues, so
    that however many epochs there are, no pair of a side is drawn more than once more often than another of it.
    """
    members = sampling.members
    if not sampling.is_balanced:
        return members[epoch_order(len(members), seed=seed, epoch=epoch, order=order)]
    num_shorter = len(members) - sampling.num_longer
    drawn = np.concatenate(
        [
            _continued(sampling.longer, epoch * sampling.num_longer, sampling.num_longer, (seed, LONGER)),
            _continued(sampling.shorter, epoch * num_shorter, num_shorter, (seed, SHORTER)),
        ]
    )
    return np.random.default_rng([seed, MIXING, epoch]).permutation(drawn)


def _continued(side: Indices, start: int, count: int, key: tuple[int, int]) -> Indices:
    """Draws start … start + count of the permutations of a side, one after the other."""
    rounds = range(start // len(side), -(-(start + count) // len(side)))
    shuffled = [np.random.default_rng([*key, number]).permutation(side) for number in rounds]
    return np.concatenate([side[:0], *shuffled])[start - rounds.start * len(side) :][:count]


def next_draws(sampling: Sampling, config: RewardConfig, consumed_pairs: int) -> Indices:
    """The pairs of the global batch that follows `consumed_pairs`, [B]; a batch never spans two epochs.

    A pair may be in it twice.
    """
    epoch, start = divmod(consumed_pairs, len(sampling.members))
    draws = epoch_draws(sampling, epoch, seed=config.seed, order=config.order)
    return draws[start : start + config.global_batch_pairs]
