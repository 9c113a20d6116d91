"""Rewards of a function of the user's, as a completion column: no model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from prefsel.evaluate.judges import PairwiseJudge, Prompt, RewardJudge, gold_judge, load_judge, rewards_of
from prefsel.score.contract import ScoredShard

GOLD = "prefsel.world.gold:gold"
"""Names the gold reward of the generated world, as a function of prompts and answers."""


def reward_judge(path: str) -> RewardJudge:
    """The reward function that a scorer of kind `function` names; errors as `load_judge`."""
    found = gold_judge() if path == GOLD else load_judge(path, "reward")
    assert isinstance(found, RewardJudge), "that kind was asked for"
    return found


def pairwise_judge(path: str) -> PairwiseJudge:
    """The function that says which of two answers is better; errors as `load_judge`."""
    found = load_judge(path, "pairwise")
    assert isinstance(found, PairwiseJudge), "that kind was asked for"
    return found


def asked(messages: Sequence[dict[str, Any]]) -> Prompt:
    """A prompt as functions are given it: the text of a single message of the user, else its messages."""
    plain = [{key: value for key, value in one.items() if value is not None} for one in messages]
    if len(plain) == 1 and plain[0]["role"] == "user":
        return str(plain[0]["content"])
    return plain


def answer_text(messages: Sequence[dict[str, Any]]) -> str:
    """A completion as functions are given it: the contents of its messages."""
    return "\n\n".join(str(one["content"] or "") for one in messages)


class FunctionScorer:
    """`rm_<name>` by a function."""

    def __init__(self, name: str, path: str) -> None:
        """Import the function; errors as `load_judge`."""
        self.name, self.judge = name, reward_judge(path)

    def score(self, groups: pa.Table) -> ScoredShard:
        """The reward of every completion; the function is called once with all of the shard.

        Raises:
            UserError: It gives something else than as many numbers.
            NonFiniteError: A number is NaN or infinite; names the prompts.
        """
        rows = groups.select(["prompt_id", "prompt", "completions"]).to_pylist()
        texts = [[answer_text(one["messages"]) for one in row["completions"]] for row in rows]
        prompts = [asked(row["prompt"]) for row, many in zip(rows, texts) for _ in many]
        names = [row["prompt_id"].hex() for row, many in zip(rows, texts) for _ in many]
        flat = [text for many in texts for text in many]
        rewards = iter(rewards_of(self.judge, prompts, flat, names).tolist() if flat else [])
        return ScoredShard({f"rm_{self.name}": [[next(rewards) for _ in many] for many in texts]})
