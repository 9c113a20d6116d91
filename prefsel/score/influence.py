"""Scorers of influence: derivatives of log-probs along tangents, per completion, and what LESS needs, per pair.

    groups ─ DirectionalScorer ─► dlogps_<direction>          pairs ─ PairGradientScorer ─► gamma_dot_, gamma_norm_

The first is an engine of `scorers.py` with another route: windows, packing, halved budgets and isolated groups are the
same. The second is nonlinear in a pair's own gradient, which it makes, uses and forgets, one pair at a time.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prefsel.errors import IntegrityError, PrefselError, UserError, invalid
from prefsel.models.architecture import model_shape
from prefsel.models.chat import EncodedGroup, Encoder, Truncation
from prefsel.models.directional import (
    column,
    differences,
    directional_route,
    finite_difference_route,
    largest_error,
)
from prefsel.models.loading import check_vocabulary, context_length, default_device, load_causal, load_tokenizer
from prefsel.models.logps import logps_route, model_device
from prefsel.models.packing import flops_min
from prefsel.models.pair_features import PairFeatures
from prefsel.models.tangent import Directions, load_tangents
from prefsel.score.contract import ScoredShard
from prefsel.score.engine import Column, Counters, Engine
from prefsel.score.windows import WINDOW_GROUPS, Windows

logger = logging.getLogger(__name__)

CHECKED_GROUPS = 4
"""Groups of every shard whose finite differences are compared with exact derivatives: ten completions or so, of a
shard's thousands."""

Method = Literal["exact", "finite_difference"]


class DirectionalScorer:
    """`dlogps_<direction>` for every direction of a tangent, nats per unit of it."""

    def __init__(
        self,
        *,
        path: str,
        dtype: str,
        tangent_dir: str | Path,
        method: Method = "exact",
        step: float = 3e-5,
        template: str = "auto",
        max_length: int | None = None,
        truncation: Truncation = "drop",
        token_budget: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        gpus_per_replica: int = 1,
        device: str | None = None,
    ) -> None:
        """Load the model and its tangent; arguments as `CausalLogpsScorer`, and:

        Args:
            path: The model at which the tangent was taken.
            dtype: fp32 for finite differences.
            tangent_dir: Folder of `save_tangent`; its directions name the columns.
            method: `exact`: forward-mode derivatives, three forwards per direction. `finite_difference`: one forward
                per direction and one more.
            step: Of the finite difference, relative to the norm of the weights. Measured on tiny random models in fp32,
                1e-3 erred by 0.02 to 0.2 of the largest derivative, 3e-5 by 0.001 to 0.006, 1e-6 by 0.001 to 0.2.
            template: As `CausalLogpsScorer`.
            max_length: As `CausalLogpsScorer`.
            truncation: As `CausalLogpsScorer`.
            token_budget: As `CausalLogpsScorer`.
            revision: As `CausalLogpsScorer`.
            trust_remote_code: As `CausalLogpsScorer`.
            gpus_per_replica: As `CausalLogpsScorer`.
            device: As `CausalLogpsScorer`.

        Raises:
            UserError: As in loading; the tangent is none of this model; or 16 bits with finite differences.
            NonFiniteError: The tangent holds NaN or infinity.
        """
        if method not in ("exact", "finite_difference"):
            raise invalid("method", method, ["exact", "finite_difference"])
        model, encoder, pad = _loaded(
            path, dtype, template, max_length, truncation, revision, trust_remote_code, gpus_per_replica, device
        )
        directions = load_tangents(Path(tangent_dir)).directions
        self.names = list(directions)
        exact = directional_route(model, directions, pad_token_id=pad)
        self.checker: Engine | None = None
        self.epsilons: list[float] = []
        if method == "exact":
            self.engine = Engine(model, encoder, exact, token_budget)
            return
        route, self.epsilons = finite_difference_route(model, directions, step=step, pad_token_id=pad)
        self.engine = Engine(model, encoder, route, token_budget)
        self.checker = Engine(model, encoder, exact, token_budget)

    def begin(self, groups: pa.Table) -> tuple[Windows, Windows | None]:
        """Windows of a table of `schema.GROUPS`, in preparation; also of its first groups where errors are checked."""
        check = self.checker.begin(groups.slice(0, CHECKED_GROUPS)) if self.checker else None
        return self.engine.begin(groups), check

    def score(self, groups: pa.Table | tuple[Windows, Windows | None]) -> ScoredShard:
        """Derivatives of a table, or of what `begin` made of it; a finite difference's error in `facts`."""
        windows, checked = self.begin(groups) if isinstance(groups, pa.Table) else groups
        result = self.engine.run(windows)
        if self.checker is None or checked is None:
            found = [column(result.values, 1 + number) for number in range(len(self.names))]
            return self.engine.shard(self._columns(found), result)
        _, found = differences(result.values, self.epsilons)
        check = self.checker.run(checked)
        for name in ("flops_model", "seconds_model"):
            result.counters[name] += check.counters[name]
        errors = {
            f"fd_error_{name}": largest_error(quotients[:CHECKED_GROUPS], column(check.values, 1 + number))
            for number, (name, quotients) in enumerate(zip(self.names, found))
        }
        shard = self.engine.shard(self._columns(found), result)
        return replace(shard, facts=shard.facts | {name: e for name, e in errors.items() if e is not None})

    def _columns(self, found: Sequence[Column]) -> dict[str, Column]:
        return {f"dlogps_{name}": values for name, values in zip(self.names, found)}


Feature = tuple[npt.NDArray[np.float64], float]
"""Inner products with the unit directions, [S], and the norm."""


class PairGradientScorer:
    """`gamma_dot_<direction>` and `gamma_norm_<direction>` of every wanted pair, see `tangent.PairFeatures`."""

    def __init__(
        self,
        *,
        path: str,
        dtype: str,
        tangent_dir: str | Path,
        optimizer_dir: str | Path,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        template: str = "auto",
        max_length: int | None = None,
        truncation: Truncation = "drop",
        revision: str | None = None,
        trust_remote_code: bool = False,
        gpus_per_replica: int = 1,
        device: str | None = None,
    ) -> None:
        """Load the model, its tangent and its optimizer's state; arguments as `CausalLogpsScorer`, and:

        Args:
            path: The warm-up.
            dtype: Of its weights; features are computed in fp32 at least.
            tangent_dir: Folder of `save_tangent`, with the fact `beta`.
            optimizer_dir: Folder with `exp_avg.safetensors` and `exp_avg_sq.safetensors`, named as the model's weights.
            betas: Decays of the feature's moments.
            eps: Below the root of the feature.
            template: As `CausalLogpsScorer`.
            max_length: As `CausalLogpsScorer`.
            truncation: As `CausalLogpsScorer`.
            revision: As `CausalLogpsScorer`.
            trust_remote_code: As `CausalLogpsScorer`.
            gpus_per_replica: As `CausalLogpsScorer`.
            device: As `CausalLogpsScorer`.

        Raises:
            UserError: As in loading; tangent or moments are none of this model, or the tangent names no beta.
        """
        model, self.encoder, pad = _loaded(
            path, dtype, template, max_length, truncation, revision, trust_remote_code, gpus_per_replica, device
        )
        tangents = load_tangents(Path(tangent_dir))
        if "beta" not in tangents.facts:
            raise UserError(f"tangent {tangent_dir}: its facts name no beta, got {sorted(tangents.facts)}")
        moments = {name: _moment(Path(optimizer_dir), name) for name in ("exp_avg", "exp_avg_sq")}
        directions: Directions = tangents.directions
        beta = float(tangents.facts["beta"])
        self.names, self.route, self.shape = list(directions), logps_route(model, pad), model_shape(model)
        self.device, self.dtype = model_device(model), next(model.parameters()).dtype
        self.features = PairFeatures(model, directions, **moments, beta=beta, betas=betas, eps=eps)

    def score_pairs(
        self,
        groups: pa.Table,
        pairs: pa.Table,
        reference_logps_N2: npt.NDArray[np.float64],
        wanted: npt.NDArray[np.bool_],
    ) -> ScoredShard:
        """Features of a shard's pairs.

        Args:
            groups: A table of `schema.GROUPS`.
            pairs: A table of `schema.PAIRS` over these groups.
            reference_logps_N2: Log-probs of chosen and rejected under the reference; NaN: absent.
            wanted: Which pairs to compute, [N].

        Returns:
            Columns of all pairs. Dropped are those that are not wanted (`ineligible`), those without reference
            log-probs (`missing_reference`) or tokens (`too_long`, `template_error`), those of the same tokens
            (`same_tokens`), and those whose gradient failed or was not finite twice (`poisoned`).

        Raises:
            IntegrityError: A pair names a prompt that the groups lack.
            PrefselError: A single pair does not fit into memory.
        """
        started = time.perf_counter()
        counters: Counters = defaultdict(float)
        reasons = np.where(wanted, "", "ineligible").astype(object)
        reasons[(reasons == "") & ~np.isfinite(reference_logps_N2).all(axis=1)] = "missing_reference"
        found: dict[int, Feature] = {}
        errors: dict[int, Exception | None] = {}
        for number, group in _encoded_pairs(groups, pairs, np.flatnonzero(reasons == "").tolist(), self.encoder):
            if bad := [status for status in group.status if status != "ok"]:
                reasons[number] = bad[0]
                continue
            if group.completion_tokens[0] == group.completion_tokens[1]:  # Its gradient is zero and has no direction.
                reasons[number] = "same_tokens"
                continue
            feature, error = self._feature(group, reference_logps_N2[number], counters)
            if feature is None:
                reasons[number], errors[number] = "poisoned", error
                logger.error("a pair is isolated as poisoned: %s", error or "NaN or infinity")
            else:
                found[number] = feature
        raised = [error for error in errors.values() if error is not None]
        if raised and not found and len(raised) > 1:
            raise raised[0]
        counters["seconds_model"] += time.perf_counter() - started
        pair_ids = pairs["pair_id"].to_pylist()
        return ScoredShard(
            columns=self._columns(found, len(reasons)),
            dropped=dict(Counter(reason for reason in reasons.tolist() if reason)),
            counters=dict(counters),
            poisoned=[pair_ids[number].hex() for number in sorted(errors)],
            padded_because=self.route.reason,
            template_error=self.encoder.tolerated,
        )

    def _feature(
        self, group: EncodedGroup, reference_2: npt.NDArray[np.float64], counters: Counters
    ) -> tuple[Feature | None, Exception | None]:
        """A pair's feature; None after two failures, with the last error if there was one.

        Raises:
            PrefselError: The pair does not fit into memory.
        """
        error: Exception | None = None
        for _ in range(2):
            error = None
            try:
                dots_S, length = self.features(group, reference_2)
            except torch.OutOfMemoryError as full:
                tokens = len(group.prompt_tokens) + sum(map(len, group.completion_tokens))
                raise PrefselError(f"out of memory for the gradient of a single pair of {tokens} tokens") from full
            except PrefselError:
                raise
            except Exception as failure:  # noqa: BLE001
                error = failure
                continue
            self._count(group, counters)
            if math.isfinite(length) and np.isfinite(dots_S).all():
                return (dots_S, length), None
        return None, error

    def _count(self, group: EncodedGroup, counters: Counters) -> None:
        """A forward pass, and twice as much backwards."""
        counters["pairs"] += 1
        counters["flops_min"] += 3.0 * flops_min([group], self.shape)
        for row in self.route.rows([group], 2**31):
            counters["trunk_tokens"] += row.trunk_tokens
            counters["head_rows"] += row.head_rows
            area = self.route.attention_area(row)
            counters["flops_model"] += 3.0 * self.shape.flops(
                trunk_tokens=row.trunk_tokens, head_rows=row.head_rows, attention_area=area
            )

    def _columns(self, found: Mapping[int, Feature], num_pairs: int) -> dict[str, list[float | None]]:
        columns: dict[str, list[float | None]] = {}
        for direction, name in enumerate(self.names):
            columns[f"gamma_dot_{name}"] = [None] * num_pairs
            columns[f"gamma_norm_{name}"] = [None] * num_pairs
            for number, (dots_S, length) in found.items():
                columns[f"gamma_dot_{name}"][number] = float(dots_S[direction])
                columns[f"gamma_norm_{name}"][number] = length
        return columns


def _encoded_pairs(
    groups: pa.Table, pairs: pa.Table, numbers: Sequence[int], encoder: Encoder
) -> Iterator[tuple[int, EncodedGroup]]:
    """Each pair with its tokens, as a prompt with two completions, chosen first; a window of prompts at a time.

    Raises:
        IntegrityError: A pair names a prompt that the groups lack.
    """
    row_of = {prompt: row for row, prompt in enumerate(groups["prompt_id"].to_pylist())}
    prompts, chosen, rejected = (pairs[name].to_pylist() for name in ("prompt_id", "chosen", "rejected"))
    members: dict[int, list[int]] = {}
    for number in numbers:
        if prompts[number] not in row_of:
            raise IntegrityError(f"pairs: prompt_id {prompts[number].hex()} is not among the groups of the shard")
        members.setdefault(row_of[prompts[number]], []).append(number)
    rows = sorted(members)
    for start in range(0, len(rows), WINDOW_GROUPS):
        window = rows[start : start + WINDOW_GROUPS]
        taken = groups.select(["prompt", "completions"]).take(window).to_pylist()
        encoded = encoder.encode_groups(
            [(row["prompt"], [c["messages"] for c in row["completions"]]) for row in taken], strict=False
        )
        for row, group in zip(window, encoded):
            for number in members[row]:
                yield number, _pair(group, chosen[number], rejected[number])


def _pair(group: EncodedGroup, chosen: int, rejected: int) -> EncodedGroup:
    """Two completions of a group."""
    sides = (chosen, rejected)
    return EncodedGroup(
        group.prompt_tokens,
        [group.completion_tokens[side] for side in sides],
        [group.status[side] for side in sides],
        0,
        tuple(group.prompt_starts[side] for side in sides) if group.prompt_starts else (),
    )


def _moment(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"optimizer state {folder}: {name}.safetensors cannot be read: {error}") from error


def _loaded(
    path: str,
    dtype: str,
    template: str,
    max_length: int | None,
    truncation: Truncation,
    revision: str | None,
    trust_remote_code: bool,
    gpus_per_replica: int,
    device: str | None,
) -> tuple[nn.Module, Encoder, int | None]:
    """A causal model, its encoder and the token that pads."""
    tokenizer: Any = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    model = load_causal(
        path,
        dtype=dtype,
        device=default_device(device),
        revision=revision,
        trust_remote_code=trust_remote_code,
        gpus_per_replica=gpus_per_replica,
    )
    check_vocabulary(tokenizer, model, path=path)
    limit = max_length or context_length(path, revision, trust_remote_code)
    encoder = Encoder(tokenizer, template, limit, truncation)
    return model, encoder, tokenizer.pad_token_id
