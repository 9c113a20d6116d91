"""Load once, then groups → completion columns: one class per kind of scorer, none of which knows where it runs.

    groups ─ windows ─ tokens, rows (a thread ahead) ─ model ─► values ─► columns, counts, counters

`begin` needs no model and may run beside it; `score` takes what it gives, or a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from prefsel.errors import invalid
from prefsel.models.chat import Encoder, Truncation, Unconditional
from prefsel.models.compiled import compile_layers
from prefsel.models.loading import (
    check_vocabulary,
    context_length,
    default_device,
    load_causal,
    load_reward,
    load_tokenizer,
)
from prefsel.models.logps import logps_route
from prefsel.models.reward import reward_route
from prefsel.score.contract import ScoredShard
from prefsel.score.engine import Column, Engine, EngineResult
from prefsel.score.windows import Windows


class CausalLogpsScorer:
    """`logps_<name>`, summed over the response in nats, and `num_tokens_<name>`."""

    def __init__(
        self,
        *,
        name: str,
        path: str,
        dtype: str,
        template: str = "auto",
        max_length: int | None = None,
        truncation: Truncation = "drop",
        token_budget: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        gpus_per_replica: int = 1,
        unconditional: bool = False,
        compile: bool = False,
        device: str | None = None,
    ) -> None:
        """Load the model; see `load_causal` and `chat.Encoder` for the arguments and errors.

        Args:
            name: What the columns are called after.
            path: Local directory, or hub id.
            dtype: fp32, bf16 or fp16.
            template: Chat template.
            max_length: Most tokens of prompt + response; None: what the model declares.
            truncation: What happens to longer ones.
            token_budget: Tokens of one packed row; None: 8 192 on a CPU, probed on a GPU.
            revision: Of a hub id.
            trust_remote_code: Run the hub's model code.
            gpus_per_replica: GPUs of one copy.
            unconditional: Score responses without their prompts; the columns end in `_uncond`.
            compile: Compile the decoder layers, see `compile_layers`.
            device: None: the GPU if there is one, else the CPU.
        """
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
        model = load_causal(
            path,
            dtype=dtype,
            device=default_device(device),
            revision=revision,
            trust_remote_code=trust_remote_code,
            gpus_per_replica=gpus_per_replica,
        )
        check_vocabulary(tokenizer, model, path=path)
        if compile:
            compile_layers(model)
        limit = max_length or context_length(path, revision, trust_remote_code)
        encoder = Encoder(tokenizer, template, limit, truncation)
        self.name = f"{name}_uncond" if unconditional else name
        asked = Unconditional(encoder) if unconditional else encoder
        self.engine = Engine(model, asked, logps_route(model, tokenizer.pad_token_id), token_budget)

    def begin(self, groups: pa.Table) -> Windows:
        """The windows of a table of `schema.GROUPS`, in preparation."""
        return self.engine.begin(groups)

    def score(self, groups: pa.Table | Windows) -> ScoredShard:
        """Log-probs of a table, or of its windows."""
        return self.shard(self.engine.run(groups))

    def shard(self, result: EngineResult) -> ScoredShard:
        """What the engine gave, as columns."""
        logps: Column = [[None if v is None else v[0] for v in row] for row in result.values]
        columns = {f"logps_{self.name}": logps, f"num_tokens_{self.name}": result.num_tokens}
        return self.engine.shard(columns, result)


class RewardModelScorer:
    """`rm_<name>` of a classifier with one output, or `rm_<head>` of each of several."""

    def __init__(
        self,
        *,
        name: str,
        path: str,
        dtype: str,
        heads: Sequence[str] | None = None,
        template: str = "auto",
        max_length: int | None = None,
        truncation: Truncation = "drop",
        token_budget: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        gpus_per_replica: int = 1,
        compile: bool = False,
        device: str | None = None,
    ) -> None:
        """Load the model; arguments as `CausalLogpsScorer`, and `heads`: names in the order of the model's labels.

        Raises:
            UserError: As in loading, or as many names as the model has outputs were not given.
        """
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
        model = load_reward(
            path,
            dtype=dtype,
            device=default_device(device),
            revision=revision,
            trust_remote_code=trust_remote_code,
            gpus_per_replica=gpus_per_replica,
        )
        check_vocabulary(tokenizer, model, path=path)
        if compile:
            compile_layers(model)
        names = list(heads or model.config.id2label.values())
        if len(names) != model.config.num_labels:
            raise invalid("heads", names, f"{model.config.num_labels} names, one per output of {path}")
        limit = max_length or context_length(path, revision, trust_remote_code)
        encoder = Encoder(tokenizer, template, limit, truncation)
        self.columns = [f"rm_{head}" for head in names] if len(names) > 1 else [f"rm_{name}"]
        self.engine = Engine(model, encoder, reward_route(model), token_budget)

    def begin(self, groups: pa.Table) -> Windows:
        """The windows of a table of `schema.GROUPS`, in preparation."""
        return self.engine.begin(groups)

    def score(self, groups: pa.Table | Windows) -> ScoredShard:
        """Rewards of a table, or of its windows."""
        result = self.engine.run(groups)
        columns: dict[str, Column] = {
            column: [[None if v is None else v[head] for v in row] for row in result.values]
            for head, column in enumerate(self.columns)
        }
        return self.engine.shard(columns, result)
