"""Committed scores, of metrics and of rules alike: how a shard is written, and how a rule reads it.

A shard's ledger says what selecting needs before any row is read: drops, and by (source, aspect) a histogram and some
exact order statistics of the scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.errors import IntegrityError
from prefsel.numbers.columns import id_words, strata
from prefsel.numbers.histogram import stratum_histograms
from prefsel.numbers.moments import Covariation, Moments
from prefsel.numbers.ranges import Summary, summarise_for_ledger
from prefsel.pairs.join import GROUP_KEYS, carried_columns, completion_positions
from prefsel.pairs.reader import PairReader
from prefsel.pairs.rows import Rows
from prefsel.rules import SCORED_STRATA, Label
from prefsel.schema import CARRIED, SCORES
from prefsel.workspace.catalog import Catalog, ShardRef
from prefsel.workspace.entries import Entry
from prefsel.workspace.ledger import Artifact, merge_counts
from prefsel.workspace.storage import Storage

LENGTHS = ("chosen_length", "rejected_length")


def score_table(
    like: Mapping[str, pa.ChunkedArray | pa.Array],
    score_N: np.ndarray,
    dropped: pa.ChunkedArray | pa.Array,
    lengths: tuple[np.ndarray, np.ndarray],
) -> pa.Table:
    """A shard of scores, schema `SCORES`.

    Args:
        like: pair_id, source and aspect of the pairs.
        score_N: float64, NaN for pairs without a score.
        dropped: text, why a pair cannot be selected; null where it can.
        lengths: of the chosen and rejected completion of each pair: whole numbers, NaN where unknown.
    """
    chosen, rejected = (pa.array(length_N, from_pandas=True).cast(pa.int32()) for length_N in lengths)
    return pa.table(
        {
            "pair_id": like["pair_id"],
            "score": pa.array(score_N, from_pandas=True),
            "dropped": _encoded(dropped, "dropped"),
            "source": _encoded(like["source"], "source"),
            "aspect": _encoded(like["aspect"], "aspect"),
            "chosen_length": chosen,
            "rejected_length": rejected,
        },
        schema=SCORES,
    )


def _encoded(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.cast(pa.string()).dictionary_encode().cast(SCORES.field(name).type)


def shard_info(table: pa.Table, lengths: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """What rides in the ledger: drops, histograms by (source, aspect), moments of the score, lengths.

    Args:
        table: schema `SCORES`.
        lengths: of the chosen and rejected completion of each pair, NaN where unknown.
    """
    row_M = np.flatnonzero(pc.is_null(table["dropped"]).to_numpy())
    scored = table.take(pa.array(row_M))
    score_M = scored["score"].to_numpy()
    codes, labels = strata([scored["source"], scored["aspect"]])
    histograms = stratum_histograms(score_M, codes, len(labels))
    chosen_M, rejected_M = (length_N[row_M] for length_N in lengths)
    known = np.isfinite(chosen_M) & np.isfinite(rejected_M)
    difference = (chosen_M - rejected_M)[known]
    return {
        "dropped": merge_counts({reason: 1} for reason in table["dropped"].to_pylist() if reason),
        "histograms": [
            {
                **{"source": source, "aspect": aspect, "rows": histogram.total, **histogram.to_text()},
                # Exact order statistics, from which every search begins.
                "fences": summarise_for_ledger(score_M[codes == code]).to_text(),
            }
            for code, ((source, aspect), histogram) in enumerate(zip(labels, histograms))
        ],
        "moments": asdict(Moments.of(score_M)) if len(score_M) else None,
        "length": asdict(Covariation.of(difference, score_M[known])) if known.any() else None,
        "length_sums": [int(known.sum()), float(chosen_M[known].sum()), float(rejected_M[known].sum())],
    }


def committed_summaries(entries: Iterable[Entry], by: tuple[str, ...]) -> dict[Label, list[Summary]]:
    """The Summaries that score shards were committed with, by stratum; of no stratum, all are of the label `()`."""
    found: dict[Label, list[Summary]] = {} if by else {(): []}
    for entry in entries:
        for row in entry.info["histograms"]:
            label = tuple(row[name] for name in by)
            found.setdefault(label, []).append(Summary.from_text(row["rows"], row["fences"]))
    return found


def committed(storage: Storage, catalog: Catalog, folder: str, inputs: Mapping[str, str]) -> dict[str, Entry]:
    """Ledger entries of the shards that are scored from exactly `inputs` (shard key → hash), by shard key."""
    entries = {}
    for source, shards in catalog.sources_of().items():
        wanted = {shard.shard: inputs[shard.key] for shard in shards}
        done = Artifact(storage, f"{folder}/{source}").done(wanted)
        entries.update({f"{source}/{name}": entry for name, entry in done.items()})
    return entries


@dataclass(frozen=True)
class ScoreReader:
    """The committed scores a rule reads, by column, as tasks need them; pickles as a few strings."""

    reader: PairReader
    """Of pairs, groups and lengths."""
    folders: Mapping[str, str]
    """Column → folder of its scores, without the source."""

    def table(self, shard: ShardRef, column: str, names: list[str]) -> pa.Table:
        """Some columns of one score's shard."""
        return Artifact(self.reader.storage, f"{self.folders[column]}/{shard.source}").read(shard.shard, names)

    def rows(
        self,
        shard: ShardRef,
        columns: Sequence[str],
        *,
        ids: bool = False,
        by: Sequence[str] = (),
        keys: Iterable[str] = (),
        lengths: bool = False,
    ) -> Rows:
        """The rows of a shard with what is asked for.

        Args:
            shard: which.
            columns: scores.
            ids: also pair_ids, which must then be the same for all scores.
            by: columns of strata; `length_bin` needs lengths, which come with it, and fields that pairs carry are read
                with them.
            keys: what dedupes keep one of, `prompt` or `pair`.
            lengths: also the lengths of both completions.

        Raises:
            IntegrityError: the scores are of other pairs.
        """
        texts = [name for name in SCORED_STRATA if name in by]
        carried = [name for name in by if name not in (*SCORED_STRATA, "length_bin")]
        needs_lengths = lengths or "length_bin" in by
        names = ["score", *(["pair_id"] if ids else [])]
        # What all scores of a pair share comes from the first one's file, with it: a file is opened once.
        first = [*names, *texts, *(LENGTHS if needs_lengths else [])]
        tables = {one: self.table(shard, one, first if one == columns[0] else names) for one in columns}
        if ids:
            self._require_same_pairs(shard, tables)
        shown = tables[columns[0]]
        return Rows(
            scores={name: one["score"].to_numpy(zero_copy_only=False) for name, one in tables.items()},
            ids_NW=id_words(tables[columns[0]]["pair_id"]) if ids else None,
            texts={name: shown[name] for name in texts} | self._carried(shard, carried, shown.num_rows),
            lengths=self._lengths(shard, shown) if needs_lengths else None,
            keys={key: self._keys(shard, key) for key in keys},
            complete_columns=frozenset(name for name, one in tables.items() if not one["score"].null_count),
        )

    def _carried(self, shard: ShardRef, names: Sequence[str], num_rows: int) -> dict[str, pa.ChunkedArray]:
        """Fields that the pairs of a shard carry; its scores lie in the order of its pairs.

        Raises:
            IntegrityError: there are more or fewer pairs than scores.
        """
        if not names:
            return {}
        pairs = Artifact(self.reader.storage, shard.pairs_path).read(shard.shard, ["chosen", CARRIED])
        if pairs.num_rows != num_rows:
            raise IntegrityError(f"pairs/{shard.key}: {pairs.num_rows} pairs have {num_rows} scores")
        return {name: pa.chunked_array([column]) for name, column in carried_columns(pairs, names).items()}

    def _require_same_pairs(self, shard: ShardRef, tables: Mapping[str, pa.Table]) -> None:
        first, *others = tables
        if not others:  # to combine the chunks of one column took as long as all else about a shard
            return
        ids = tables[first]["pair_id"].combine_chunks()
        for column in others:
            if not tables[column]["pair_id"].combine_chunks().equals(ids):
                raise IntegrityError(f"{self.folders[column]}/{shard.key}: its pairs are not those of {first}")

    def lengths(self, shard: ShardRef, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the chosen and rejected completion of every pair, NaN where unknown, as one score has them."""
        return self._lengths(shard, self.table(shard, column, list(LENGTHS)))

    def _lengths(self, shard: ShardRef, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        if not set(LENGTHS) <= set(table.column_names):  # a shard of an earlier version
            flat = self.reader.flat(shard) if self.reader.length_column else pa.table({})
            return self.reader.lengths(shard, flat)
        chosen_N, rejected_N = (table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in LENGTHS)
        return chosen_N, rejected_N

    def _keys(self, shard: ShardRef, by: str) -> np.ndarray:
        pairs = self.reader.pairs(shard)
        if by == "prompt":
            return id_words(pairs["prompt_id"])
        groups = self.reader.groups(shard, GROUP_KEYS)
        ids = pc.struct_field(pc.list_flatten(groups["completions"].combine_chunks()), "completion_id")
        _, *sides = completion_positions(pairs, groups)
        # The ids of two completions, the smaller first: they name their prompt too.
        chosen_NW, rejected_NW = (id_words(ids.take(pa.array(side_N))).astype(np.uint64) for side_N in sides)
        is_equal_N = chosen_NW[:, 0] == rejected_NW[:, 0]
        is_swapped_N = (chosen_NW[:, 0] > rejected_NW[:, 0]) | (is_equal_N & (chosen_NW[:, 1] > rejected_NW[:, 1]))
        low_NW = np.where(is_swapped_N[:, None], rejected_NW, chosen_NW)
        high_NW = np.where(is_swapped_N[:, None], chosen_NW, rejected_NW)
        return np.concatenate([low_NW, high_NW], axis=1)

    def reasons(self, shard: ShardRef, columns: Iterable[str]) -> pa.Array:
        """Why each pair of a shard lacks one of these scores, as the first of them says; null where it has all."""
        given = [self.table(shard, column, ["dropped"])["dropped"].combine_chunks() for column in columns]
        return pc.coalesce(*(one.cast(pa.string()) for one in given))
