"""TRL's `DPOTrainer` on reference log-probs that a run has stored, instead of a pass of its own.

    data set ─ TRL's own tokens ─▶ equal to the scored ones? ─▶ ref_chosen_logps, ref_rejected_logps ─▶ TRL trains

A log-prob belongs to a sequence of tokens. TRL encodes conversations itself, so each pair is encoded once more as it
was scored, and the two must be the same tokens: template, end of turn and truncation included. Text that was changed
since is found by its pair_id, and some pairs are also run through the model, which must give what is stored. Needs the
extra `trl`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prefsel.errors import UserError
from prefsel.ingest.identity import completion_id, pair_id, prompt_id
from prefsel.models.chat import Encoder, Truncation
from prefsel.models.writer import as_they_came
from prefsel.pairs.trainers import CannotHold, with_tools
from prefsel.schema import FLIPPED, REST

try:
    import datasets
    import trl
except ImportError as error:
    raise ImportError(
        f"prefsel.trl needs TRL ({error}); install it with: pip install -c constraints.txt 'prefsel[trl]'"
    ) from error

__all__ = ["DPOTrainer"]

SIDES = ("chosen", "rejected")
TEXTS = ("prompt", *SIDES)
IDENTITY = ("pair_id", "prompt_id", "aspect")
"""Columns that tell what text a pair had when it was scored."""
CHUNK = 256
"""Pairs that are encoded at once."""


class DPOTrainer(trl.DPOTrainer):
    """TRL's trainer, with stored log-probs as the reference."""

    def __init__(
        self,
        model: Any,
        *,
        args: trl.DPOConfig,
        train_dataset: datasets.Dataset,
        reference: str,
        template: str = "auto",
        max_length: int | None = None,
        truncation: Truncation = "drop",
        check_pairs: int = 8,
        tolerance: float = 0.05,
        **options: Any,
    ) -> None:
        """Make the trainer; every pair is checked before the first step.

        Args:
            model: As TRL takes it. It is the reference before its first step, unless `ref_model` is given.
            args: TRL's configuration; `precompute_ref_log_probs` is set in a copy of it.
            train_dataset: What `select` or `prefsel export --for trl` wrote, opened with `datasets`.
            reference: Name of the model that scored: the columns `logps_<reference>_chosen` and `…_rejected`, nats.
            template: As the run's configuration has it for this model.
            max_length: Likewise, in tokens; None: no limit.
            truncation: Likewise.
            check_pairs: Pairs of each data set, evenly spaced, that the reference is also run on; 0: none, for a
                reference that is not at hand.
            tolerance: Largest difference between what it gives and what is stored, in nats per response token; 16-bit
                weights leave about a hundredth.
            **options: Everything else that TRL's trainer takes (`processing_class`, `eval_dataset`, `peft_config`, …).

        Raises:
            UserError: A column is absent or has gaps, an option needs log-probs per token, TRL would train on other
                tokens or fewer pairs than were scored, a text was changed since, or the model gives other log-probs
                than are stored.
        """
        if args.ld_alpha is not None:
            raise UserError("prefsel.trl: ld_alpha weighs single tokens, and stored log-probs are sums; leave it None")
        if isinstance(train_dataset, datasets.Dataset) and not len(train_dataset):
            raise UserError("prefsel.trl: train: the data set has no rows")
        self._reference, self._scored_with = reference, (template, max_length, truncation)
        self._check_pairs, self._tolerance = check_pairs, tolerance
        self._given: dict[str, int] = {}
        args = copy.copy(args)
        args.precompute_ref_log_probs = True
        super().__init__(model=model, args=args, train_dataset=train_dataset, **options)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if not isinstance(dataset, datasets.Dataset):
            raise UserError(f"prefsel.trl: {dataset_name}: got {type(dataset).__name__}; valid: datasets.Dataset")
        wanted = [*TEXTS, *(f"logps_{self._reference}_{side}" for side in SIDES)]
        if lacking := [name for name in wanted if name not in dataset.column_names]:
            raise UserError(
                f"prefsel.trl: {dataset_name}: the data set lacks {', '.join(lacking)}; it has "
                f"{', '.join(dataset.column_names)}; `reference` names a model whose log-probs were selected with"
            )
        dataset = _readable(dataset, dataset_name)
        _require_same_texts(dataset, dataset_name)
        self._given[dataset_name] = len(dataset)
        return super()._prepare_dataset(_as_they_came(dataset), processing_class, args, dataset_name)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        logps = {side: self._stored(dataset, name, side) for side in SIDES}
        self._require_same_tokens(dataset, name)
        self._require_all_pairs(dataset, name)
        # Not the first ones: of two data sets behind one another these would all be of the same.
        places = np.unique(np.linspace(0, len(dataset) - 1, min(self._check_pairs, len(dataset))).astype(int))
        if len(places):
            some = dataset.select(places).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
            found = super()._precompute_ref_logps(some, name, batch_size)
            self._require_same_numbers(found, dataset, places, logps, name)
        for side in SIDES:
            dataset = dataset.add_column(f"ref_{side}_logps", logps[side].tolist())
        return dataset

    def _stored(self, dataset: Any, name: str, side: str) -> np.ndarray:
        column = f"logps_{self._reference}_{side}"
        logps_N = np.array(dataset[column], dtype=np.float64)  # None becomes NaN
        gaps = np.flatnonzero(~np.isfinite(logps_N))
        if len(gaps):
            raise UserError(
                f"prefsel.trl: {name}: {len(gaps):,} of {len(logps_N):,} pairs have no {column}, the first is "
                f"{_named(dataset, int(gaps[0]))}; filter them out first"
            )
        return logps_N

    # ------------------------------------------------------------------------------------------------------ checks

    def _require_same_tokens(self, dataset: Any, name: str) -> None:
        """Compare what TRL's collator makes of each pair with the sequences that were scored."""
        template, max_length, truncation = self._scored_with
        encoder = Encoder(self._tokenizer, template, max_length, truncation)
        different, first = 0, ""
        for start in range(0, len(dataset), CHUNK):
            rows = dataset.select(range(start, min(start + CHUNK, len(dataset)))).to_list()
            scored = encoder.encode_groups([_group(row) for row in rows])
            for place, (row, group) in enumerate(zip(rows, scored)):
                for side, told in self._differences(row, group):
                    different += 1
                    first = first or f"{_named(dataset, start + place)}, {side}: {told}"
        if different:
            raise UserError(
                f"prefsel.trl: {name}: TRL would train on other tokens than were scored for {different:,} of "
                f"{2 * len(dataset):,} responses. The first is {first}. Give the tokenizer, `template`, `max_length` "
                "and `truncation` that scored them, and a `max_length` of DPOConfig that cuts nothing else (None); or "
                "train with trl.DPOTrainer, which computes its own reference"
            )

    def _differences(self, row: Mapping[str, Any], group: Any) -> Iterator[tuple[str, str]]:
        batch = self.data_collator([{f"{name}_ids": row[f"{name}_ids"] for name in TEXTS}])
        for number, side in enumerate(SIDES):
            is_real = batch["attention_mask"][number].bool()
            ids = batch["input_ids"][number][is_real].tolist()
            num_prompt = len(ids) - int(batch["completion_mask"][number][is_real].sum())
            skipped = group.prompt_starts[number] if group.prompt_starts else 0
            prompt, response = group.prompt_tokens[skipped:], group.completion_tokens[number]
            stored = row.get(f"num_tokens_{self._reference}_{side}")
            if group.status[number] != "ok":
                yield side, f"scoring leaves it out as {group.status[number]}"
            elif stored is not None and int(stored) != len(response):
                yield (
                    side,
                    f"{int(stored)} response tokens were scored, this tokenizer and template give {len(response)}",
                )
            elif (ids, num_prompt) != (prompt + response, len(prompt)):
                yield side, self._divergence(ids, num_prompt, prompt, response)

    def _divergence(self, ids: list[int], num_prompt: int, prompt: list[int], response: list[int]) -> str:
        scored = prompt + response
        if ids == scored:
            return f"the response begins at token {num_prompt} for TRL, at {len(prompt)} where it was scored"
        pairs = enumerate(zip(ids, scored))
        place = next((at for at, (one, other) in pairs if one != other), min(len(ids), len(scored)))
        told = [repr(self._tokenizer.decode(one[max(0, place - 4) : place + 4])) for one in (ids, scored)]
        return (
            f"they part at token {place}: TRL has {len(ids)} tokens, …{told[0]}…, "
            f"scored were {len(scored)}, …{told[1]}…"
        )

    def _require_all_pairs(self, dataset: Any, name: str) -> None:
        """Refuse a data set of which TRL has left out what its own `max_length` has no room for."""
        if left_out := self._given[name] - len(dataset):
            raise UserError(
                f"prefsel.trl: {name}: TRL leaves out {left_out:,} of {self._given[name]:,} pairs, whose prompt alone "
                f"fills max_length={self.args.max_length} of DPOConfig; raise it (None: no limit), or leave them out "
                "yourself"
            )

    def _require_same_numbers(
        self, found: Any, dataset: Any, places: np.ndarray, logps: Mapping[str, np.ndarray], name: str
    ) -> None:
        for side in SIDES:
            for number, (place, given) in enumerate(zip(places.tolist(), found[f"ref_{side}_logps"])):
                stored, length = float(logps[side][place]), max(1, len(found[f"{side}_ids"][number]))
                if not abs(float(given) - stored) <= self._tolerance * length:  # NaN is not
                    raise UserError(
                        f"prefsel.trl: {name}: the reference gives {float(given):.6g} nats for {side} of "
                        f"{_named(dataset, place)}, stored is {stored:.6g}, more than {self._tolerance} per token "
                        f"apart: it is not the model that scored logps_{self._reference}; pass that one as `model` or "
                        "`ref_model`, or check_pairs=0 where it is not at hand"
                    )


def _readable(dataset: Any, name: str) -> Any:
    """The data set with its rows as they are stored, whatever format they were to be shown in.

    Raises:
        UserError: It is changed as it is read, holds text instead of messages, or TRL's own columns.
    """
    if dataset.format["type"] == "custom":
        raise UserError(f"prefsel.trl: {name}: the data set has a transform, which changes what was scored; remove it")
    if texts := [one for one in TEXTS if isinstance(dataset.features[one], datasets.Value)]:
        raise UserError(f"prefsel.trl: {name}: got text in {', '.join(texts)}; valid: lists of messages, as written")
    if there := [f"ref_{side}_logps" for side in SIDES if f"ref_{side}_logps" in dataset.column_names]:
        raise UserError(f"prefsel.trl: {name}: the data set has {', '.join(there)} already; remove them")
    return dataset.with_format(None)


def _require_same_texts(dataset: Any, name: str) -> None:
    """Refuse pairs whose text is not what their pair_id was made of: the stored log-probs are those of the old one.

    Tools stand beside the messages of an exported folder, and may have come in any of them: of pairs that have some the
    tokens alone are compared.
    """
    if not set(IDENTITY) <= set(dataset.column_names):
        return
    changed, first = 0, ""
    for start in range(0, len(dataset), CHUNK):
        for row in dataset.select(range(start, min(start + CHUNK, len(dataset)))).to_list():
            if not row.get("tools") and _identity(row) != row["pair_id"]:
                changed, first = changed + 1, first or row["pair_id"]
    if changed:
        raise UserError(
            f"prefsel.trl: {name}: the text or the aspect of {changed:,} of {len(dataset):,} pairs is not the one that "
            f"was scored, first {first}: its pair_id was made of another. Leave prompt, chosen and rejected as they "
            "were written; or train with trl.DPOTrainer, which computes its own reference"
        )


def _identity(row: Mapping[str, Any]) -> str:
    """The pair_id that a row's text makes, 32 hex digits."""
    prompt = prompt_id(as_they_came(row["prompt"]))
    chosen, rejected = (completion_id(prompt, as_they_came(row[side])) for side in SIDES)
    if row.get(FLIPPED):  # it was scored as labelled, and keeps that name
        chosen, rejected = rejected, chosen
    return pair_id(prompt, chosen, rejected, row["aspect"]).hex()


def _named(dataset: Any, place: int) -> str:
    return f"pair {dataset[place]['pair_id']}" if "pair_id" in dataset.column_names else f"row {place}"


def _group(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """A row as the encoder takes it: nulls that a table filled in are no keys, and the tools stand in the prompt."""
    prompt, *responses = ([_without_nulls(one) for one in row[name]] for name in TEXTS)
    tools = row.get("tools")
    if tools:
        prompt[0] = {**prompt[0], "tools": json.loads(tools) if isinstance(tools, str) else tools}
    return prompt, responses


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _as_they_came(dataset: Any) -> Any:
    """The data set with `rest`, JSON text beside role and content, put back into the messages: templates see these."""
    if not any(REST in _keys(dataset.features[name]) for name in TEXTS):
        return dataset
    if not hasattr(datasets, "Json"):
        raise UserError("prefsel.trl: messages hold more than text; this needs a `datasets` that has the Json feature")
    features = dataset.features.copy()
    features.update({name: datasets.List(datasets.Json()) for name in TEXTS}, tools=datasets.Value("string"))

    def restored(row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return with_tools(*(as_they_came(row[name]) for name in TEXTS))
        except CannotHold as refused:
            raise UserError(f"prefsel.trl: TRL cannot hold {refused}, in pair {row.get('pair_id')}") from refused

    return dataset.map(restored, features=features, desc="Putting messages together")


def _keys(feature: Any) -> Sequence[str]:
    inner = getattr(feature, "feature", None)
    return list(inner) if isinstance(inner, Mapping) else []
