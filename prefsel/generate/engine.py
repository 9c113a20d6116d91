r"""Many responses to every prompt from a causal language model of transformers, with exactly the model's distribution.

    prompts ─ longest first ─┬─► one packed pass, without padding ──► keys and values, once for all samples
                             │                                        first tokens
                             └── next prompts, when rows are free ◄── one token of every row; rows that end leave

Every row's random numbers are its own, and nothing that is computed for a row reads another one, so that a response
is the same, up to rounding, in any company. Which rows stand side by side follows from the arguments of the call
alone: the same call gives the same bytes on one kind of hardware.

Models that this would not serve exactly are run by transformers itself (`plain`), and `Generator.slow_because` says
why.

Shapes: B rows, T tokens of packed prompts, C prompts, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefsel.errors import UserError, invalid
from prefsel.generate import plain
from prefsel.generate.attention import IMPLEMENTATION, DecodeStep, PromptPass
from prefsel.generate.cohort import Cohort, Row
from prefsel.generate.draw import Sampling, draw, random_numbers
from prefsel.generate.settings import ignored_settings, own_settings, stop_tokens
from prefsel.models.architecture import in_evaluation_mode, model_shape, supports_packing, unwrapped
from prefsel.models.layout import attention_area, build_layout
from prefsel.models.logps import model_device
from prefsel.models.positions import num_positions
from prefsel.models.rotary import rope_parameters
from prefsel.models.trie import Segment

__all__ = ["COUNTERS", "Generator", "Response", "Sampling"]

MOST_ROWS = {"cpu": 128, "cuda": 512}
"""Rows side by side. On two cores the linear layers gain nothing from more."""
TOKEN_BUDGET = {"cpu": 1 << 17, "cuda": 1 << 19}
"""Tokens whose keys and values are kept, where the caller names no number: 64 GB of a model of 8 billion in bf16 on a
GPU (128 KiB a token with 8 key heads of 128 and 32 layers)."""
PROMPT_TOKENS = 8192
"""Of one packed pass over prompts."""
MOST_COHORTS = 4
"""Every cohort costs some calls a layer; beyond this the two smallest become one."""
FREE_SHARE = 0.25
"""Of the rows, before new prompts are let in: a pass over few prompts is not worth its calls."""

COUNTERS = {
    "prefill_tokens": "tokens of prompts that were read",
    "decoded_tokens": "tokens of responses, stop tokens left out",
    "rows_decoded": "tokens that were drawn, stop tokens and wasted ones included",
    "steps": "passes of the model over one token of every row",
    "poisoned": "responses that ended because the model gave NaN or infinity",
    "seconds_model": "seconds in `generate`",
    "flops_model": "floating-point operations: every token through the trunk once, the head where a token is drawn",
}
"""What a generator counts."""


@dataclass(frozen=True)
class Response:
    """One response to a prompt."""

    tokens: list[int]
    """Without the stop token."""
    text: str
    """Without special tokens and outer white space; empty when the turn ended at once."""
    stop: str
    """`end` (a stop token was drawn), `length` (cut), or `poisoned` (the model gave NaN or infinity)."""


class Generator:
    """Samples responses from one model, several to each prompt."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, token_budget: int | None = None, ending: str | None = None
    ) -> None:
        """Look at what the model needs; nothing is computed yet.

        Args:
            model: A causal language model of transformers, on any device; one in training is sampled without dropout.
            tokenizer: Its tokenizer, with an eos token.
            token_budget: Most tokens whose keys and values are kept at once; a single prompt with its responses that
                needs more runs alone. None: `TOKEN_BUDGET` of the device. Part of what makes a call byte-identical.
            ending: What the model's template writes after an answer, which may end a response, see `stop_tokens`.

        Raises:
            UserError: The budget is not positive, or the model is no decoder.
        """
        inner = unwrapped(model)
        if token_budget is not None and token_budget < 1:
            raise invalid("token_budget", token_budget, "1 or more, or null for the device's own")
        if inner.config.is_encoder_decoder or not inner.can_generate():
            raise invalid("model", type(inner).__name__, "a decoder that transformers can generate with")
        self.model, self.tokenizer, self.device = model, tokenizer, model_device(model)
        self.token_budget = token_budget or TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])
        is_packed, reason = supports_packing(model)
        self.slow_because = "" if is_packed else reason
        """Why transformers' own loop runs, without shared prompts and continuous batches; empty: it does not."""
        self.stops = stop_tokens(own_settings(model), tokenizer, ending)
        """The tokenizer's end token, those the model's generation settings add, and the template's end of a turn."""
        self.ignored_generation_settings = ignored_settings(own_settings(model))
        """What the model's generation settings would change of the distribution, and nobody applies here."""
        self.most_positions = None if any(rope_parameters(inner.config)) else num_positions(inner.config)
        """Tokens of prompt and response that a model with learned positions has one for; None: no limit."""
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        """Over all calls, see `COUNTERS`."""
        self._shape = model_shape(model)

    def generate(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[int],
        num_samples: int,
        sampling: Sampling,
        first_sample: int = 0,
    ) -> list[list[Response]]:
        """Sample responses to every prompt.

        Args:
            prompts: Their tokens, the generation prompt included.
            keys: What each prompt's random numbers follow from, 0 to 2^64 − 1.
            num_samples: Responses to each prompt.
            sampling: How tokens are drawn.
            first_sample: Number of the first response: samples 3 and 4 are those of a call for five.

        Returns:
            By prompt and sample.

        Raises:
            UserError: A number is out of its range, a prompt has no token, or the model no position for its last one.
        """
        self._check(prompts, keys, num_samples, sampling)
        rows = [
            Row(number, sample, random_numbers(sampling.seed, key, first_sample + sample))
            for number, key in enumerate(keys)
            for sample in range(num_samples)
        ]
        started = time.perf_counter()
        with torch.inference_mode(), in_evaluation_mode(self.model):
            if self.slow_because:
                limits = {"most_rows": self._most_rows(1), "token_budget": self.token_budget}
                for name, count in plain.run(self.model, self.stops, prompts, rows, sampling, **limits).items():
                    self.counters[name] += count
            else:
                with _attention(self.model):
                    self._run(prompts, rows, num_samples, sampling)
        self.counters["seconds_model"] += time.perf_counter() - started
        self.counters["decoded_tokens"] += sum(len(row.tokens) for row in rows)
        self.counters["poisoned"] += sum(row.stop == "poisoned" for row in rows)
        texts = self.tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=True)
        responses = [
            Response(row.tokens, "" if row.stop == "poisoned" else text.strip(), row.stop)
            for row, text in zip(rows, texts)
        ]
        return [responses[start : start + num_samples] for start in range(0, len(rows), num_samples)]

    def _check(self, prompts: Sequence[list[int]], keys: Sequence[int], num_samples: int, sampling: Sampling) -> None:
        if num_samples < 1:
            raise invalid("num_samples", num_samples, "1 or more")
        if len(keys) != len(prompts):
            raise invalid("keys", len(keys), f"one for each of the {len(prompts)} prompts")
        if wrong := [key for key in keys if not 0 <= key < 2**64]:
            raise invalid("keys", wrong[0], "0 to 2^64 − 1")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise invalid(f"prompts[{number}]", "no token", "prompts with at least one token")
            # The last token that is drawn is never read.
            needed = len(prompt) + sampling.max_new_tokens - 1
            if self.most_positions is not None and needed > self.most_positions:
                raise UserError(
                    f"prompts[{number}] has {len(prompt):,} tokens, and a response up to {sampling.max_new_tokens:,}; "
                    f"the model has positions for {self.most_positions:,}; leave the prompt out or lower max_new_tokens"
                )

    # ------------------------------------------------------------------------------------------------ the fast path

    def _most_rows(self, num_samples: int) -> int:
        return max(MOST_ROWS.get(self.device.type, MOST_ROWS["cuda"]), 4 * num_samples)

    def _run(self, prompts: Sequence[list[int]], rows: list[Row], num_samples: int, sampling: Sampling) -> None:
        """Answer all prompts, the longest first: which is next never depends on what was drawn before."""
        waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        cohorts: list[Cohort] = []
        while waiting or cohorts:
            if chosen := self._admitted(waiting, prompts, cohorts, num_samples, sampling.max_new_tokens):
                own = [row for number in chosen for row in rows[number * num_samples : (number + 1) * num_samples]]
                lengths = [len(prompts[number]) for number in chosen]
                cohort = Cohort(lengths, num_samples, own, sampling.max_new_tokens)
                self._read_prompts(cohort, [prompts[number] for number in chosen], sampling)
                cohort.leave()
                cohorts.append(cohort)
            else:
                self._step(cohorts, prompts, sampling)
                for cohort in cohorts:
                    cohort.leave()
            cohorts = _few([cohort for cohort in cohorts if cohort.rows])

    def _admitted(
        self,
        waiting: deque[int],
        prompts: Sequence[list[int]],
        cohorts: Sequence[Cohort],
        num_samples: int,
        max_new_tokens: int,
    ) -> list[int]:
        """Take the next prompts, the first of `waiting`, that rows and tokens are free for."""
        most_rows = self._most_rows(num_samples)
        running = sum(len(cohort.rows) for cohort in cohorts)
        if running > (1 - FREE_SHARE) * most_rows:
            return []
        rows = (most_rows - running) // num_samples
        tokens = self.token_budget - sum(cohort.kv_tokens for cohort in cohorts)
        chosen: list[int] = []
        while waiting and len(chosen) < rows:
            # All prompts of a cohort take the place of its first, the longest.
            longest = len(prompts[chosen[0] if chosen else waiting[0]])
            if (len(chosen) + 1) * (longest + num_samples * max_new_tokens) > tokens and (chosen or cohorts):
                break
            chosen.append(waiting.popleft())
        return chosen

    def _read_prompts(self, cohort: Cohort, prompts: Sequence[list[int]], sampling: Sampling) -> None:
        """Keep the keys and values of a cohort's prompts, and draw the first token of every row."""
        first = 0
        while first < len(prompts):
            last = first + 1
            while last < len(prompts) and sum(map(len, prompts[first : last + 1])) <= PROMPT_TOKENS:
                last += 1
            logits_CV = self._prompt_logits(cohort, prompts[first:last], first)
            rows = cohort.rows[first * cohort.num_samples : last * cohort.num_samples]
            self._draw(rows, logits_CV.repeat_interleave(cohort.num_samples, dim=0), sampling)
            first = last

    def _prompt_logits(self, cohort: Cohort, prompts: Sequence[list[int]], first: int) -> Tensor:
        """The logits behind each prompt of a packed row, the first of which is number `first` of its cohort."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = lengths.cumsum()
        segments = tuple(Segment(int(end - length), int(end), ()) for length, end in zip(lengths, ends))
        position_T = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        config = unwrapped(self.model).config
        layout = build_layout(
            segments,
            dtype=unwrapped(self.model).dtype,
            device=self.device,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )
        tokens_T, position_T, prompt_T = torch.from_numpy(
            np.stack([np.concatenate(prompts), position_T, np.repeat(np.arange(len(prompts)) + first, lengths)])
        ).to(self.device)
        last_C = torch.from_numpy(ends - 1)  # on the CPU it selects rows of any device
        self.counters["prefill_tokens"] += len(tokens_T)
        self._count(len(tokens_T), len(prompts), attention_area(segments))
        return self._logits(tokens_T, position_T, PromptPass(cohort, layout, prompt_T, position_T), last_C)

    def _step(self, cohorts: Sequence[Cohort], prompts: Sequence[list[int]], sampling: Sampling) -> None:
        """One more token of every row."""
        for cohort in cohorts:
            cohort.grow()
        rows = [row for cohort in cohorts for row in cohort.rows]
        lengths = [len(prompts[row.prompt]) + len(row.tokens) for row in rows]
        last = [row.tokens[-1] for row in rows]
        tokens_B, position_B = torch.tensor([last, [length - 1 for length in lengths]]).to(self.device)
        logits_BV = self._logits(tokens_B, position_B, DecodeStep(cohorts), 0)
        self.counters["steps"] += 1
        self._count(len(rows), len(rows), sum(lengths))
        self._draw(rows, logits_BV, sampling)

    def _logits(self, tokens_T: Tensor, position_T: Tensor, keys_and_values: Any, keep: Tensor | int) -> Tensor:
        logits: Tensor = unwrapped(self.model)(
            input_ids=tokens_T[None],
            position_ids=position_T[None],
            # Of four dimensions: handed on unread, where None would make transformers build a [T, T] mask.
            attention_mask=torch.zeros(1, 1, 1, 1, device=self.device),
            use_cache=False,
            logits_to_keep=keep,
            keys_and_values=keys_and_values,
        ).logits
        return logits[0]

    def _draw(self, rows: Sequence[Row], logits_BV: Tensor, sampling: Sampling) -> None:
        """Give every row its next token, or the reason why it has ended."""
        self.counters["rows_decoded"] += len(rows)
        for row, token in zip(rows, draw(rows, logits_BV, sampling)):
            row.take(token, self.stops, sampling.max_new_tokens)

    def _count(self, trunk_tokens: int, head_rows: int, area: int) -> None:
        self.counters["flops_model"] += self._shape.flops(
            trunk_tokens=trunk_tokens, head_rows=head_rows, attention_area=area
        )


def _few(cohorts: list[Cohort]) -> list[Cohort]:
    """At most `MOST_COHORTS`: the two with the fewest rows become one."""
    while len(cohorts) > MOST_COHORTS:
        first, second = sorted(sorted(range(len(cohorts)), key=lambda number: len(cohorts[number].rows))[:2])
        merged = Cohort.merged(cohorts[first], cohorts.pop(second))
        cohorts[first] = merged
    return cohorts


@contextmanager
def _attention(model: nn.Module) -> Iterator[None]:
    """Let the model attend to cohorts within the block."""
    inner = unwrapped(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
