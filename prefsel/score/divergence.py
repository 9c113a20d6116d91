"""How far a policy is from another one, on the completions of a groups table: both models in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from prefsel.errors import UserError
from prefsel.evaluate.kl import kl_route
from prefsel.models.chat import Encoder, Truncation
from prefsel.models.loading import check_vocabulary, context_length, default_device, load_causal, load_tokenizer
from prefsel.score.contract import ScoredShard
from prefsel.score.engine import Column, Engine
from prefsel.score.multi_model import tokenizer_key
from prefsel.score.windows import Windows


class DivergenceScorer:
    """`kl_<name>` and `log_ratio_<name>`, nats summed over the response, and `kl_tokens_<name>`."""

    def __init__(
        self,
        *,
        name: str,
        path: str,
        dtype: str,
        reference: Mapping[str, Any],
        template: str = "auto",
        max_length: int | None = None,
        truncation: Truncation = "drop",
        token_budget: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        gpus_per_replica: int = 1,
        device: str | None = None,
    ) -> None:
        """Load both models; the other arguments are those of `CausalLogpsScorer`, and its errors.

        Args:
            name: What the columns are called after.
            path: Of the model.
            dtype: Of the model.
            reference: Arguments of `load_causal`, and `path`.
            template: How both are given the messages.
            max_length: Most tokens of both.
            truncation: What happens to longer ones.
            token_budget: Tokens of one row.
            revision: Of a hub id.
            trust_remote_code: Run the hub's model code.
            gpus_per_replica: GPUs of one copy.
            device: None: the GPU if there is one, else the CPU.

        Raises:
            UserError: The two models do not cut text into the same tokens.
        """
        place = default_device(device)
        more: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        other = {key: reference[key] for key in ("revision", "trust_remote_code")}
        tokenizer = load_tokenizer(path, **more)
        ours, theirs = tokenizer_key(tokenizer), tokenizer_key(load_tokenizer(reference["path"], **other))
        if ours != theirs:
            raise UserError(
                f"divergence of {name!r}: its tokenizer is another one than that of {reference['path']}; valid: a "
                "reference with the same tokens, as the model that a training started from; else set "
                "evaluate.divergence to false"
            )
        model = load_causal(path, dtype=dtype, device=place, gpus_per_replica=gpus_per_replica, **more)
        beside = load_causal(
            reference["path"],
            dtype=reference["dtype"],
            device=place,
            gpus_per_replica=reference["gpus_per_replica"],
            **other,
        )
        for one in (model, beside):
            check_vocabulary(tokenizer, one)
        limit = max_length or context_length(path, revision, trust_remote_code)
        self.name = name
        self.engine = Engine(
            model,
            Encoder(tokenizer, template, limit, truncation),
            kl_route(model, beside, tokenizer.pad_token_id),
            token_budget,
        )

    def begin(self, groups: pa.Table) -> Windows:
        """The windows of a table of `schema.GROUPS`, in preparation."""
        return self.engine.begin(groups)

    def score(self, groups: pa.Table | Windows) -> ScoredShard:
        """The columns of a table, or of its windows."""
        result = self.engine.run(groups)
        sums: list[Column] = [
            [[None if v is None else v[place] for v in row] for row in result.values] for place in (0, 1)
        ]
        names = (f"kl_{self.name}", f"log_ratio_{self.name}", f"kl_tokens_{self.name}")
        return self.engine.shard(dict(zip(names, (*sums, result.num_tokens))), result)
