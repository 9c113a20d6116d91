"""A loaded model at work: windows of groups → values, counts, counters.

A table is scored as a whole or not at all, with two exceptions that are counted: memory that ran out halves the token
budget, and a group that makes the model fail or give NaN is scored alone once more, then isolated as `poisoned`.

An engine computes for one table at a time; only `begin` may be called beside that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa
import torch
from torch import Tensor, nn

from prefsel.errors import PrefselError
from prefsel.models.architecture import model_shape
from prefsel.models.chat import EncodedGroup
from prefsel.models.logps import Route, model_device, num_tokens
from prefsel.models.packing import PackedBatch, flops_min
from prefsel.models.padded import PaddedBatch
from prefsel.models.writer import named
from prefsel.score.contract import ScoredShard, TemplateUse
from prefsel.score.probes import calibrate_budget
from prefsel.score.windows import AnyEncoder, Rows, Window, Windows

logger = logging.getLogger(__name__)

Column = list[list[float | None]]
Key = tuple[int, int]
"""(group in its window, completion)."""
Values = dict[Key, list[float]]
Counters = defaultdict[str, float]


@dataclass
class EngineResult:
    """What a model gave for one table of groups, as far as it has come."""

    values: list[list[list[float] | None]] = field(default_factory=list)
    """Per group and completion: one number per head, or None."""
    num_tokens: Column = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    counters: Counters = field(default_factory=lambda: defaultdict(float))
    poisoned: list[str] = field(default_factory=list)
    same_as: dict[int, Sequence[int | None]] = field(default_factory=dict)
    """See `ScoredShard`."""
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    """See `TemplateUse`."""

    def count_template(self, prompt_id: bytes, group: EncodedGroup) -> None:
        """Count what the template did with the next group."""
        if group.same_as:
            self.same_as[len(self.values)] = group.same_as
        for note in group.notes:
            place = f"prompt {prompt_id.hex()}" + (f": {note.example}" if note.example else "")
            known, first = self.notes.get(note.kind, (0, place))
            self.notes[note.kind] = (known + note.count, first)

    def count_tokenised(self, window: Window) -> None:
        """Count what a window took before any model saw it."""
        self.counters["groups_tokenised"] += len(window.groups)
        self.counters["seconds_tokenise"] += window.seconds


class Engine:
    """A loaded model with its encoder, its route and its token budget."""

    def __init__(self, model: nn.Module, encoder: AnyEncoder, route: Route, token_budget: int | None) -> None:
        """Take over a model.

        Args:
            model: In evaluation mode, on its device.
            encoder: Messages → tokens.
            route: Tokens → numbers.
            token_budget: Tokens of a row; None: found at the first use, when whatever else the device holds is there.
        """
        self.encoder, self.route = encoder, route
        self.device, self.shape = model_device(model), model_shape(model)
        self.dtype = next(model.parameters()).dtype
        self._budget = self._first_budget = token_budget
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
        if not route.is_packed:
            logger.warning("%s takes the padded path: %s", type(model).__name__, route.reason)

    @property
    def token_budget(self) -> int:
        """Tokens of a row; fewer after memory has run out."""
        if self._budget is None:
            self._budget = self._first_budget = calibrate_budget(self.route, self.device)
        return self._budget

    @token_budget.setter
    def token_budget(self, tokens: int) -> None:
        self._budget = tokens

    def begin(self, groups: pa.Table) -> Windows:
        """The windows of a table, the first of which are tokenised and packed from now on."""
        _ = self.token_budget  # The probe runs the model: here, not in the thread that packs.
        return Windows(groups, self.encoder, self._packed, self._thread)

    def _packed(self, groups: list[EncodedGroup]) -> tuple[Rows, Hashable]:
        packing = self._packing()
        return self.route.rows(groups, packing[0]), packing

    def _packing(self) -> tuple[int, int | None]:
        """What rows depend on: the budget, and for padded rows the model they are padded for."""
        return self.token_budget, None if self.route.is_packed else id(self)

    def shard(self, columns: dict[str, Column], result: EngineResult) -> ScoredShard:
        """The columns of a shard with what happened on the way."""
        counts = (dict(result.dropped), dict(result.counters), result.poisoned)
        found = self._first_budget or self.token_budget
        facts = {"token_budget": float(found), "token_budget_least": float(self.token_budget)}
        error = result.notes.get("template_error", (0, ""))[1]
        use = TemplateUse(named(self.encoder.template), self.encoder.traits.ending, result.notes)
        return ScoredShard(columns, *counts, self.route.reason, error, facts, use, result.same_as)

    def run(self, groups: pa.Table | Windows) -> EngineResult:
        """Score every completion of a table.

        Raises:
            PrefselError: A single sequence does not fit into memory.
            UserError: As the encoder raises it.
        """
        result = EngineResult()
        for window in groups if isinstance(groups, Windows) else self.begin(groups):
            result.count_tokenised(window)
            self.add(window, result)
        return result

    def add(self, window: Window, result: EngineResult) -> None:
        """Score a window and put it behind what `result` has; errors as `run`."""
        rows = window.rows if window.packing == self._packing() else None
        found, bad = self.score_window(window.groups, result.counters, rows)
        result.poisoned += [window.prompt_ids[group].hex() for group in sorted(bad)]
        for number, group in enumerate(window.groups):
            reasons = ["poisoned" if s == "ok" and number in bad else s for s in group.status]
            result.dropped.update(reason for reason in reasons if reason != "ok")
            result.count_template(window.prompt_ids[number], group)
            result.values.append([found.get((number, completion)) for completion in range(len(reasons))])
            result.num_tokens.append([c if r == "ok" else None for c, r in zip(num_tokens(group), reasons)])
            result.counters["num_truncated"] += group.num_truncated

    def score_window(
        self, groups: list[EncodedGroup], counters: Counters, rows: Rows | None = None
    ) -> tuple[Values, set[int]]:
        """Values of a window's completions, and the groups that were isolated; `rows`: the groups, packed already.

        The one boundary where a model's failure is caught: a group whose row failed, or that got NaN or infinity, is
        scored alone once more. When every group fails alone, the fault is not theirs and is raised.
        """
        values, suspects = self._compute(groups, counters, rows)
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

    def _compute(
        self, groups: list[EncodedGroup], counters: Counters, packed: Rows | None = None
    ) -> tuple[Values, dict[int, Exception]]:
        """Values of all rows that came through, and the groups of those that did not; halves the budget as needed.

        Raises:
            PrefselError: A single sequence does not fit into memory.
        """
        started = time.perf_counter()
        outputs: list[tuple[list[Key], Tensor]] = []
        failed: dict[int, Exception] = {}
        rows = list(reversed(self.route.rows(groups, self.token_budget) if packed is None else packed))
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
                if len(row.completion_index) == 1 or row.trunk_tokens == 1:
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
        counters["shared_tokens"] += row.shared_tokens
        area = self.route.attention_area(row)
        flops = self.shape.flops(trunk_tokens=row.trunk_tokens, head_rows=head_rows, attention_area=area)
        counters["flops_model"] += self.route.num_forwards * flops


def _all_finite(numbers: Sequence[float]) -> bool:
    return all(map(math.isfinite, numbers))
