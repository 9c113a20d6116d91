"""Load once, then groups → completion columns: one class per kind of scorer, none of which knows where it runs.

    groups ─ windows ─ tokens (a thread ahead) ─ rows ─ model ─► values ─► columns, counts, counters

A scorer fails as a whole or not at all, with two exceptions that are counted: memory that ran out halves the token
budget, and a group that makes the model fail or give NaN is scored alone once more, then isolated as `poisoned`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa
import torch
from torch import Tensor, nn

from prefsel.errors import PrefselError, invalid
from prefsel.models.chat import EncodedGroup, Encoder, Truncation, Unconditional
from prefsel.models.loading import context_length, load_causal, load_reward, load_tokenizer, model_shape
from prefsel.models.logps import Route, logps_route, model_device, num_tokens
from prefsel.models.padded import PaddedBatch
from prefsel.models.reward import reward_route
from prefsel.models.tree import PackedBatch, flops_min

logger = logging.getLogger(__name__)

WINDOW_GROUPS = 256
"""Groups tokenised, packed and scored together: some twenty rows of 8 192 tokens, so one unfilled row costs little."""
CPU_TOKEN_BUDGET = 8192
MAX_TOKEN_BUDGET = 65536
PROBE_TOKENS = (4096, 8192)

AnyEncoder = Encoder | Unconditional
Column = list[list[float | None]]
Key = tuple[int, int]
"""(group in its window, completion)."""
Values = dict[Key, list[float]]
Counters = defaultdict[str, float]


@dataclass(frozen=True)
class ScoredShard:
    """Columns of one shard, and what happened on the way."""

    columns: dict[str, Column]
    """Per column and group, one number per completion, in the order of the table; None: dropped or absent."""
    dropped: dict[str, int]
    """Completions without a number, by reason."""
    counters: dict[str, float]
    """What adds up over shards: trunk_tokens, head_rows, padding_tokens, flops_min, flops_model, seconds_model, …"""
    poisoned: list[str]
    """prompt_ids (hex) of the groups that the model could not score."""
    padded_because: str = ""
    """Why rows were padded rather than packed; empty when they were packed."""
    template_error: str = ""
    """The first of the template errors that are counted in `dropped`."""
    facts: dict[str, float] = field(default_factory=dict)
    """What does not add up over shards but is the largest of them: errors that were measured."""


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
        encoder = Encoder(tokenizer, template, max_length or context_length(path, revision), truncation)
        self.name = f"{name}_uncond" if unconditional else name
        asked = Unconditional(encoder) if unconditional else encoder
        self.engine = Engine(model, asked, logps_route(model, tokenizer.pad_token_id), token_budget)

    def score(self, groups: pa.Table) -> ScoredShard:
        """Log-probs of a table of `schema.GROUPS`."""
        result = self.engine.run(groups)
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
        names = list(heads or model.config.id2label.values())
        if len(names) != model.config.num_labels:
            raise invalid("heads", names, f"{model.config.num_labels} names, one per output of {path}")
        encoder = Encoder(tokenizer, template, max_length or context_length(path, revision), truncation)
        self.columns = [f"rm_{head}" for head in names] if len(names) > 1 else [f"rm_{name}"]
        self.engine = Engine(model, encoder, reward_route(model), token_budget)

    def score(self, groups: pa.Table) -> ScoredShard:
        """Rewards of a table of `schema.GROUPS`."""
        result = self.engine.run(groups)
        columns: dict[str, Column] = {
            column: [[None if v is None else v[head] for v in row] for row in result.values]
            for head, column in enumerate(self.columns)
        }
        return self.engine.shard(columns, result)


@dataclass(frozen=True)
class EngineResult:
    """What a model gave for one table of groups."""

    values: list[list[list[float] | None]]
    """Per group and completion: one number per head, or None."""
    num_tokens: list[list[float | None]]
    dropped: dict[str, int]
    counters: dict[str, float]
    poisoned: list[str]


class Engine:
    """A loaded model with its encoder, its route and its token budget."""

    def __init__(self, model: nn.Module, encoder: AnyEncoder, route: Route, token_budget: int | None) -> None:
        self.encoder, self.route = encoder, route
        self.device, self.shape = model_device(model), model_shape(model)
        self.token_budget = token_budget or calibrate_budget(route, self.device)
        if not route.is_packed:
            logger.warning("%s takes the padded path: %s", type(model).__name__, route.reason)

    def shard(self, columns: dict[str, Column], result: EngineResult) -> ScoredShard:
        """The columns of a shard with what happened on the way."""
        counts = (result.dropped, result.counters, result.poisoned)
        return ScoredShard(columns, *counts, self.route.reason, self.encoder.tolerated)

    def run(self, groups: pa.Table) -> EngineResult:
        """Score every completion of a table, tokenising one window ahead of the model.

        Raises:
            PrefselError: A single sequence does not fit into memory.
            UserError: As the encoder raises it.
        """
        values: list[list[list[float] | None]] = []
        counts: Column = []
        poisoned: list[str] = []
        dropped: Counter[str] = Counter()
        counters: Counters = defaultdict(float)
        for ids, encoded in _encoded_windows(groups, self.encoder):
            found, bad = self.score_window(encoded, counters)
            poisoned += [ids[group].hex() for group in sorted(bad)]
            for number, group in enumerate(encoded):
                reasons = ["poisoned" if s == "ok" and number in bad else s for s in group.status]
                dropped.update(reason for reason in reasons if reason != "ok")
                values.append([found.get((number, completion)) for completion in range(len(reasons))])
                counts.append([c if r == "ok" else None for c, r in zip(num_tokens(group), reasons)])
                counters["num_truncated"] += group.num_truncated
        return EngineResult(values, counts, dict(dropped), dict(counters), poisoned)

    def score_window(self, groups: list[EncodedGroup], counters: Counters) -> tuple[Values, set[int]]:
        """Values of a window's completions, and the groups that were isolated.

        The one boundary where a model's failure is caught: a group whose row failed, or that got NaN or infinity, is
        scored alone once more. When every group fails alone, the fault is not theirs and is raised.
        """
        values, suspects = self._compute(groups, counters)
        not_finite = {group for (group, _), numbers in values.items() if not _all_finite(numbers)}
        errors: dict[int, Exception | None] = {}
        for number in sorted(not_finite.union(suspects)):
            alone, failed = self._compute([groups[number]], counters)
            values = {key: numbers for key, numbers in values.items() if key[0] != number}
            if failed or not all(map(_all_finite, alone.values())):
                errors[number] = failed.get(0)
                logger.error("a group is isolated as poisoned: %s", errors[number] or "NaN or infinity")
            else:
                values |= {(number, completion): numbers for (_, completion), numbers in alone.items()}
        raised = [error for error in errors.values() if error is not None]
        if len(raised) == len(groups) > 1:
            raise raised[0]
        counters["flops_min"] += flops_min(groups, self.shape)
        return values, set(errors)

    def _compute(self, groups: list[EncodedGroup], counters: Counters) -> tuple[Values, dict[int, Exception]]:
        """Values of all rows that came through, and the groups of those that did not; halves the budget as needed.

        Raises:
            PrefselError: A single sequence does not fit into memory.
        """
        started = time.perf_counter()
        outputs: list[tuple[list[Key], Tensor]] = []
        failed: dict[int, Exception] = {}
        rows = list(reversed(self.route.rows(groups, self.token_budget)))
        while rows:
            row, output = rows.pop(), None
            try:
                with self.route.context():
                    output = self.route.forward(row.to(self.device))
            except torch.OutOfMemoryError:
                pass  # Handled below, when the traceback no longer holds the activations.
            except PrefselError:
                raise
            except Exception as error:  # noqa: BLE001
                failed |= dict.fromkeys((group for group, _ in row.completion_index), error)
                continue
            if output is None:
                if len(row.completion_index) == 1:
                    raise PrefselError(f"out of memory for a single sequence of {row.trunk_tokens} tokens")
                rows = self._halved(groups, [*rows, row], counters)
                continue
            outputs.append((row.completion_index, output))
            self._count(row, counters)
        # Read once at the end: every read makes the host wait for the device.
        values = {
            key: numbers
            for keys, output in outputs
            for key, numbers in zip(keys, output.reshape(len(keys), -1).tolist())
        }
        counters["seconds_model"] += time.perf_counter() - started
        return values, failed

    def _halved(
        self, groups: list[EncodedGroup], rows: Sequence[PackedBatch | PaddedBatch], counters: Counters
    ) -> list[PackedBatch | PaddedBatch]:
        """The completions of `rows` in new rows of half the budget, which stays halved."""
        self.token_budget = max(1, min(self.token_budget, rows[-1].trunk_tokens) // 2)
        counters["oom_halvings"] += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        left = {key for row in rows for key in row.completion_index}
        masked = [
            replace(group, status=["ok" if (number, c) in left else "done" for c in range(len(group.status))])
            for number, group in enumerate(groups)
        ]
        return list(reversed(self.route.rows(masked, self.token_budget)))

    def _count(self, row: PackedBatch | PaddedBatch, counters: Counters) -> None:
        head_rows = row.head_rows if self.shape.head_parameters else 0
        counters["rows"] += 1
        counters["completions" if self.route.is_packed else "completions_padded"] += len(row.completion_index)
        counters["trunk_tokens"] += row.trunk_tokens
        counters["head_rows"] += head_rows
        counters["padding_tokens"] += row.padding_tokens
        counters["repeated_prompt_tokens"] += row.repeated_prompt_tokens
        area = self.route.attention_area(row)
        flops = self.shape.flops(trunk_tokens=row.trunk_tokens, head_rows=head_rows, attention_area=area)
        counters["flops_model"] += self.route.num_forwards * flops


def _encoded_windows(groups: pa.Table, encoder: AnyEncoder) -> Iterator[tuple[list[bytes], list[EncodedGroup]]]:
    """Windows of a table as (prompt_ids, encoded groups); the next one is tokenised while this one is used."""

    def encode(start: int) -> tuple[list[bytes], list[EncodedGroup]]:
        window = groups.slice(start, WINDOW_GROUPS)
        prompts, completions = window["prompt"].to_pylist(), window["completions"].to_pylist()
        pairs = [(prompt, [c["messages"] for c in row]) for prompt, row in zip(prompts, completions)]
        return window["prompt_id"].to_pylist(), encoder.encode_groups(pairs, strict=False)

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead: deque[Future[tuple[list[bytes], list[EncodedGroup]]]] = deque()
        for start in range(0, groups.num_rows, WINDOW_GROUPS):
            ahead.append(pool.submit(encode, start))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def calibrate_budget(route: Route, device: torch.device) -> int:
    """Tokens of a row that use a device well: 8 192 on a CPU; on a GPU what its free memory holds, at most 65 536.

    Two probes with made-up tokens give the bytes per token. They grow linearly: the weights are there already,
    attention keeps no square, and the head works in chunks.
    """
    if device.type != "cuda":
        return CPU_TOKEN_BUDGET
    free_bytes, _ = torch.cuda.mem_get_info(device)
    peaks = [_peak_bytes(route, device, num_tokens) for num_tokens in PROBE_TOKENS]
    return budget_from_probes(PROBE_TOKENS, peaks, free_bytes)


def budget_from_probes(num_tokens: tuple[int, int], peak_bytes: Sequence[int], free_bytes: int) -> int:
    """The row, in multiples of 1 024 tokens, whose linearly extrapolated peak is 0.75 of the free memory."""
    slope = max(1.0, (peak_bytes[1] - peak_bytes[0]) / (num_tokens[1] - num_tokens[0]))
    tokens = num_tokens[0] + (0.75 * free_bytes - peak_bytes[0]) / slope
    return int(min(MAX_TOKEN_BUDGET, max(1024, tokens)) // 1024 * 1024)


def _peak_bytes(route: Route, device: torch.device, num_tokens: int) -> int:
    """Memory that a row of prompts and responses of 256 tokens takes beyond what is allocated."""
    num_responses = num_tokens // 256 - 1
    group = EncodedGroup([1] * 256, [[1] * 256] * num_responses, ["ok"] * num_responses, 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with route.context():
        for row in route.rows([group], num_tokens):
            route.forward(row.to(device))
    return torch.cuda.max_memory_allocated(device) - before


def _all_finite(numbers: Sequence[float]) -> bool:
    return all(map(math.isfinite, numbers))


def default_device(device: str | None) -> str:
    """The device asked for; None: the GPU if there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
