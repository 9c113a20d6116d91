"""What a finished run left in a workspace, and its pairs with everything that was found out about them, shard by shard.

    config.yaml ─▶ the manifest of the run that wrote it ─▶ folders of columns, scores, selections ─▶ rows by pair_id

Nothing is computed and no model is looked at: the manifest names every artifact, so a workspace can be read where its
models and input files are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.config.yaml_text import read_yaml
from prefsel.display import redact
from prefsel.errors import IntegrityError, UserError
from prefsel.numbers.histogram import Histogram
from prefsel.pairs.export import exchanged, exchanged_numbers, export_rows, hex_ids
from prefsel.pairs.join import completion_positions, rows_of
from prefsel.pairs.reader import PairReader
from prefsel.reasons import NOT_SELECTED
from prefsel.rules import rule_scores
from prefsel.schema import FLIPPED, with_rest
from prefsel.workspace.catalog import Catalog, FileRecord, ShardRef, read_catalog, required_entries
from prefsel.workspace.documents import read_document
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

TEXTS = ("prompt", "chosen", "rejected")
RATINGS = ("ratings_chosen", "ratings_rejected")


@dataclass(frozen=True)
class Contents:
    """The artifacts of a run, by name."""

    storage: Storage
    catalog: Catalog
    stages: tuple[StageReport, ...]
    """What every stage reported, those included that had nothing left to do."""

    @property
    def scores(self) -> dict[str, StageReport]:
        """Every score that was committed, of metrics and of rules, by name."""
        return {one.name: one for one in self.stages if one.stage in ("metric", "fuse")}

    @property
    def selections(self) -> dict[str, StageReport]:
        """Every selection and control, by name."""
        return {one.name: one for one in self.stages if one.stage == "select"}

    @property
    def shards(self) -> list[ShardRef]:
        """The shards of the corpus."""
        return self.catalog.shards

    @cached_property
    def eligible(self) -> str:
        """Folder of the drop reasons before any score."""
        return next(one.artifact for one in self.stages if one.stage == "eligible")

    @cached_property
    def columns(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Folders of column sets with the columns in them, as a `PairReader` takes them."""
        first = self.shards[0]
        found = []
        for one in self.stages:
            if one.stage == "score":
                entries = required_entries(self.storage, f"{one.artifact}/{first.source}", [first.shard])
                found.append((one.artifact, tuple(entries[first.shard].columns)))
        return tuple(found)

    @cached_property
    def files(self) -> dict[str, FileRecord]:
        """The input file of every shard, by its key."""
        found = (
            (f"{source.name}/{shard}", file)
            for source in self.catalog.sources
            for file in source.files
            for shard in file.shards
        )
        return dict(found)

    @cached_property
    def has_rest(self) -> bool:
        """Whether some message of the corpus holds more than role and content: then all tables of it say so."""
        return self.catalog.has_rest(self.storage)

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """The fields of rows that pairs of the corpus carry."""
        return self.catalog.carried(self.storage)

    def reader(self, wanted: Collection[str] | None = None) -> PairReader:
        """A reader of flat pair tables with every column, or with the sets that some flat columns come from."""
        chosen = tuple(
            (folder, names)
            for folder, names in self.columns
            if wanted is None or any(one == name or one.startswith(f"{name}_") for name in names for one in wanted)
        )
        return PairReader(self.storage, self.eligible, chosen, carried=self.carried)

    def selection(self, name: str) -> StageReport:
        """The report of a selection or control.

        Raises:
            UserError: There is none of this name.
        """
        if name not in self.selections:
            raise UserError(f"selection: got {name!r}; valid: {', '.join(self.selections) or 'none: nothing selects'}")
        return self.selections[name]

    def scored(self, name: str, shard: ShardRef, ids: pa.Array) -> pa.Table:
        """`score`, `percentile` and `dropped` (why there is no score) of pairs of a shard, by pair_id.

        Percentiles are read from the distribution function that the score was committed with: the middle of a bin. They
        belong to the score; those of a selection are split where it cuts, and stand in its own rows.
        """
        found = self._read(self.scores[name], shard, ["pair_id", "score", "dropped"])
        rows = rows_of(found, ids, what=f"{self.scores[name].artifact}/{shard.key}")
        score_N = rows["score"].to_numpy(zero_copy_only=False)
        total = Histogram.from_json(self.scores[name].details["histogram"])
        percentile_N = total.percentile(np.nan_to_num(score_N))
        percentile = pa.array(percentile_N, mask=np.isnan(score_N))
        return pa.table(
            {"score": rows["score"], "percentile": percentile, "dropped": rows["dropped"].cast(pa.string())}
        )

    def kept(self, name: str, shard: ShardRef) -> pa.Table:
        """The kept pairs of a shard, schema `SELECTION`."""
        return self._read(self.selection(name), shard, None)

    def decided(
        self, name: str, shard: ShardRef, ids: pa.Array, scored: Callable[[str], pa.Table]
    ) -> tuple[pa.Array, pa.Array]:
        """Whether a selection kept each pair of a shard, and if not, why.

        Args:
            name: Of the selection or control.
            shard: Which one.
            ids: The pairs.
            scored: What `Contents.scored` says of them, by the name of a score.

        Returns:
            bool, and string, null where it kept the pair. The reason is that of the first score the rule reads which
            the pair does not have; of a pair that has them all what the rule's own score says (`same_prompt`), and
            else `not_selected`.
        """
        report = self.selection(name)
        is_kept = pc.is_in(ids, value_set=self.kept(name, shard)["pair_id"].combine_chunks())
        read = dict.fromkeys([*rule_scores(report.details["rule"]), report.details["metric"]])
        reasons = [scored(score)["dropped"].combine_chunks() for score in read]
        reason = pc.coalesce(*reasons, pa.scalar(NOT_SELECTED))
        return is_kept, pc.if_else(is_kept, pa.scalar(None, pa.string()), reason)

    def _read(self, report: StageReport, shard: ShardRef, columns: list[str] | None) -> pa.Table:
        try:
            return Artifact(self.storage, f"{report.artifact}/{shard.source}").read(shard.shard, columns)
        except FileNotFoundError:
            raise IntegrityError(f"{report.artifact}/{shard.key}: lost; run again to make it") from None

    # ---------------------------------------------------------------------------------------------------------- rows

    def rows(self, shard: ShardRef, wanted: Collection[str] | None = None, selection: str | None = None) -> pa.Table:
        """The pairs of a shard with everything that is known of them.

        Args:
            shard: Which one.
            wanted: Columns that are needed, so that others need not be read; None: all.
            selection: Only the pairs that it kept.

        Returns:
            pair_id and prompt_id (hex), source, aspect, fields that pairs carry, file, what ingest keeps of where the
            pair came from (`row`), label_margin, dropped (why it cannot be selected), texts as messages, ratings as
            maps, the flat columns of all scorers, `score_<name>` and `percentile_<name>`, `kept_<selection>` and
            `reason_<selection>`; more than `wanted` where that costs nothing. Of a selection whose rule may turn labels
            also `flipped_<selection>`; asked for that selection, its pairs are given as it keeps them: with `flipped`,
            and where that is true with chosen and rejected exchanged, and label_margin negated.
        """
        reader = self.reader(wanted)
        pairs, flat = reader.pairs(shard), reader.flat(shard)
        # What a pair is dropped for whichever columns are read; `reason_<selection>` also says `same_tokens`.
        dropped = reader.dropped(shard, pairs)
        row_K, flipped = np.arange(pairs.num_rows), None
        if selection is not None:
            kept = self.kept(selection, shard)
            place = pc.index_in(pairs["pair_id"].combine_chunks(), value_set=kept["pair_id"].combine_chunks())
            row_K = np.flatnonzero(pc.is_valid(place).to_numpy(False))
            if FLIPPED in kept.column_names:
                flipped = kept[FLIPPED].combine_chunks().take(place.take(pa.array(row_K)))
        pairs, flat = pairs.take(pa.array(row_K)), flat.take(pa.array(row_K))
        ids = pairs["pair_id"].combine_chunks()
        texts = {}
        if wanted is None or not set(wanted).isdisjoint((*TEXTS, *RATINGS)):
            texts = _texts(pairs, flat, reader.groups(shard), flipped)
        provenance = pairs["provenance"].combine_chunks()
        arrays: dict[str, Any] = {
            "pair_id": hex_ids(ids),
            "prompt_id": hex_ids(pairs["prompt_id"]),
            **{name: flat[name] for name in ("source", "aspect", *self.carried)},
            "file": pa.repeat(pa.scalar(self.files[shard.key].uri), len(ids)),
            **{one.name: pc.struct_field(provenance, one.name) for one in provenance.type},
            "label_margin": pairs["label_margin"],
            "dropped": dropped.take(pa.array(row_K)),
            **texts,
            **{name: flat[name] for name in flat.column_names if pa.types.is_floating(flat[name].type)},
        }
        if flipped is not None:
            arrays |= _as_kept(pairs, flat, flipped)
        scored = cache(lambda name: self.scored(name, shard, ids))
        for name in self.scores:
            if wanted is None or {f"score_{name}", f"percentile_{name}"} & set(wanted):
                arrays |= {f"{what}_{name}": scored(name)[what] for what in ("score", "percentile")}
        for name in self.selections:
            if wanted is None or {f"kept_{name}", f"reason_{name}"} & set(wanted):
                arrays[f"kept_{name}"], arrays[f"reason_{name}"] = self.decided(name, shard, ids, scored)
            if FLIPPED in self.selections[name].details and (wanted is None or f"flipped_{name}" in wanted):
                kept = self.kept(name, shard)
                turned = kept["pair_id"].filter(kept[FLIPPED]).combine_chunks()
                arrays[f"flipped_{name}"] = pc.is_in(ids, value_set=turned)
        table = pa.table(arrays)
        return with_rest(table) if texts and self.has_rest else table


def _as_kept(pairs: pa.Table, flat: pa.Table, flipped: pa.Array) -> dict[str, pa.Array]:
    """What of pairs is another thing where their label is turned, and which of them these are."""
    numbers = {name: flat[name].combine_chunks() for name in flat.column_names}
    margin = pairs["label_margin"].combine_chunks()
    return {
        FLIPPED: flipped,
        "label_margin": pc.if_else(flipped, pc.negate(margin), margin),
        **exchanged_numbers(numbers, flipped.to_numpy(zero_copy_only=False)),
    }


def _texts(pairs: pa.Table, flat: pa.Table, groups: pa.Table, flipped: pa.Array | None) -> dict[str, pa.Array]:
    """Prompt, chosen and rejected as messages, and the numbers that came with either completion."""
    extra = {} if flipped is None else {FLIPPED: flipped}
    exported = export_rows(np.arange(pairs.num_rows), pairs, groups, flat.select(["source"]), extra)
    ratings_C = pc.struct_field(pc.list_flatten(groups["completions"].combine_chunks()), "ratings")
    _, *sides = completion_positions(pairs, groups)
    if flipped is not None:
        sides = list(exchanged(flipped.to_numpy(zero_copy_only=False), *sides))
    ratings = {name: ratings_C.take(pa.array(side_N)) for name, side_N in zip(RATINGS, sides)}
    return {name: exported[name] for name in TEXTS} | ratings


def all_contents(storage: Storage) -> list[Contents]:
    """The contents of the corpus that was read from files, then of those that models answered; errors as there."""
    made = [one["name"] for one in last_manifest(storage).get("made", ())]
    return [read_contents(storage, name) for name in (None, *made)]


def read_contents(storage: Storage, corpus: str | None = None) -> Contents:
    """The contents of a workspace, as its last finished run left them.

    Args:
        storage: The workspace.
        corpus: Of one that a model answered, such as a round of self-play, its name; None: what was read from files.

    Raises:
        UserError: No run has finished here, the corpus changed since then, or there is none of this name.
    """
    manifest = last_manifest(storage)
    if corpus is not None:
        made = {one["name"]: one for one in manifest.get("made", ())}
        if corpus not in made:
            raise UserError(f"corpus: got {corpus!r}; valid: {', '.join(made) or 'none: no model answered anything'}")
        stages = tuple(StageReport(**stage) for stage in made[corpus]["stages"])
        return Contents(storage, Catalog.from_json(made[corpus]["catalog"]), stages)
    catalog = read_catalog(storage)
    if catalog.fingerprint(storage) != manifest["corpus"]:
        raise UserError("workspace: the corpus changed since the last run; run again first (`prefsel run`)")
    return Contents(storage, catalog, tuple(StageReport(**stage) for stage in manifest["stages"]))


def last_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest of the newest run that left the workspace's `config.yaml`.

    Raises:
        UserError: There is none.
    """
    if storage.exists("config.yaml"):
        text = storage.read("config.yaml").decode()
        # <name>-<date>-<time>-<hash>.json
        stamped = [(match.group(1), name) for name in storage.files("runs") if (match := _STAMP.search(name))]
        for _, name in sorted(stamped, reverse=True):
            manifest = read_document(storage, name)
            if manifest["config_yaml"] == text:
                return manifest
    raise UserError(
        f"workspace: {redact(storage.uri)} holds no finished run; it needs the config.yaml and the manifest that "
        "`prefsel run` leaves"
    )


_STAMP = re.compile(r"-(\d{8}-\d{6})-[0-9a-f]{8}\.json$")


def configuration(storage: Storage) -> dict[str, Any]:
    """The table of the workspace's `config.yaml`."""
    return read_yaml(storage.read("config.yaml"), f"{redact(storage.uri)}/config.yaml")
