"""The reward of what a policy answers itself: one response per prompt, sampled and scored (filtered DPO).

The random numbers of a response follow from (seed, prompt_id), so it does not change with its shard or its neighbours.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import invalid
from prefsel.generate.engine import Generator, Sampling
from prefsel.ingest.identity import completion_id
from prefsel.models.chat import Encoder
from prefsel.models.loading import check_vocabulary, default_device, load_causal, load_tokenizer
from prefsel.score.contract import ScoredShard
from prefsel.score.scorers import RewardModelScorer


class GeneratedRewardScorer:
    """`rm_<name>_generated`, the same number for every completion of a prompt."""

    def __init__(
        self,
        *,
        rewards: RewardModelScorer,
        head: str | None = None,
        name: str | None = None,
        policy: dict[str, Any],
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        """Take over a reward model and load the policy.

        Args:
            rewards: Scores the responses.
            head: Which of its outputs counts; None: its only one.
            name: What the column is called, `rm_<name>_generated`; None: after that output.
            policy: Arguments of `load_causal`, `path`, and `template`.
            temperature: Of the sampling; 0 takes the likeliest token.
            top_p: Nucleus.
            max_new_tokens: Longer responses are cut.
            seed: Of all random numbers.

        Raises:
            UserError: `head` is none of the model's outputs, or is not given where there are several.
        """
        self.rewards, self.column = rewards, f"rm_{head}" if head else rewards.columns[0]
        if self.column not in rewards.columns or (head is None and len(rewards.columns) > 1):
            raise invalid("generated_reward.head", head, [one.removeprefix("rm_") for one in rewards.columns])
        self.name = f"rm_{name}_generated" if name else f"{self.column}_generated"
        policy = dict(policy)
        path, template = policy.pop("path"), policy.pop("template", "auto")
        for unused in ("max_length", "truncation"):
            policy.pop(unused, None)
        more = {key: policy[key] for key in ("revision", "trust_remote_code")}
        self.tokenizer = load_tokenizer(path, **more)
        self.encoder = Encoder(self.tokenizer, template)
        model = load_causal(path, **({"device": default_device(None)} | policy))
        check_vocabulary(self.tokenizer, model, path=path)
        self.generator = Generator(model, self.tokenizer)
        self.sampling = Sampling(temperature, top_p, max_new_tokens, seed)

    def _prompt_tokens(self, conversations: list[list[Any]]) -> list[list[int]]:
        return [group.prompt_tokens for group in self.encoder.encode_groups([(one, []) for one in conversations])]

    def score(self, groups: pa.Table) -> ScoredShard:
        """One response per group, and its reward beside every completion of the group."""
        ids, prompts = groups["prompt_id"].to_pylist(), groups["prompt"].to_pylist()
        keys = [int.from_bytes(one[:8], "big") for one in ids]
        before = self.generator.counters.copy()
        sampled = self.generator.generate(self._prompt_tokens(prompts), keys, 1, self.sampling)
        responses = [one.text for (one,) in sampled]
        answered = [row for row, response in enumerate(responses) if response]
        poisoned = [row for row, (one,) in enumerate(sampled) if one.stop == "poisoned"]
        own = [
            [{"completion_id": completion_id(ids[row], said), "messages": said, "ratings": []}]
            for row in answered
            for said in [[{"role": "assistant", "content": responses[row]}]]
        ]
        asked = groups.take(pa.array(answered, pa.int64()))
        column = asked.schema.get_field_index("completions")
        asked = asked.set_column(column, "completions", pa.array(own, groups.schema.field("completions").type))
        scored = self.rewards.score(asked)
        by_row = {row: reward[0] for row, reward in zip(answered, scored.columns[self.column])}
        sizes = pc.list_value_length(groups["completions"].combine_chunks()).to_pylist()
        dropped: Counter[str] = Counter()
        for row, size in enumerate(sizes):
            if by_row.get(row) is None:
                is_unscored = row in by_row
                dropped[
                    "poisoned" if row in poisoned else "generated_unscored" if is_unscored else "generated_nothing"
                ] += size
        columns = {self.name: [[by_row.get(row)] * size for row, size in enumerate(sizes)]}
        counters = scored.counters | {"generated": float(len(answered))}
        for name in ("flops_model", "seconds_model"):
            counters[name] = counters.get(name, 0.0) + self.generator.counters[name] - before[name]
        return ScoredShard(
            columns,
            dict(dropped),
            counters,
            scored.poisoned + [ids[row].hex() for row in poisoned],
            scored.padded_because,
            scored.template_error,
            template=scored.template,
        )
