"""A workspace opened for reading: `prefsel.open`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefsel.config import Config
from prefsel.config.file import parse_config
from prefsel.display import redact
from prefsel.errors import UserError
from prefsel.reasons import meaning
from prefsel.report.contents import Contents, configuration, read_contents
from prefsel.report.explain import explain_in
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage


@dataclass(frozen=True)
class PairTable:
    """Pairs of a workspace as one table that is read shard by shard, as often as it is asked for.

    It goes wherever a table goes (`polars.DataFrame(pairs)`, `pyarrow.table(pairs)`, `select_table(pairs, rule)`), and
    holds one shard in memory while it is iterated.
    """

    schema: pa.Schema
    """Names and types of its columns."""
    shards: Sequence[ShardRef] = field(repr=False)
    """The shards of the corpus, in its order."""
    read: Callable[[ShardRef], pa.Table] = field(repr=False)
    """Gives the rows of a shard, with at least the columns of `schema`."""

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """One batch per shard that has rows, in corpus order."""
        for shard in self.shards:
            table = self.read(shard).select(self.schema.names).cast(self.schema).combine_chunks()
            yield from table.to_batches()

    def reader(self) -> pa.RecordBatchReader:
        """The same batches as Arrow passes them on."""
        return pa.RecordBatchReader.from_batches(self.schema, iter(self))

    def to_table(self) -> pa.Table:
        """Everything at once, in memory."""
        return self.reader().read_all()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.reader().__arrow_c_stream__(requested_schema)


@dataclass(frozen=True)
class Workspace:
    """What a finished run left, for reading; nothing in it is computed or changed.

    It stands for the run that wrote the workspace's `config.yaml`, and reads that run's manifest and ledgers alone: no
    model, no cluster, no input file.
    """

    uri: str
    """Where it lies."""
    contents: Contents = field(repr=False)
    """The artifacts of the run."""

    @cached_property
    def config(self) -> Config:
        """The resolved configuration of the run.

        Raises:
            UserError: It names a plugin that is not installed here.
        """
        return parse_config(configuration(self.contents.storage))

    @property
    def stages(self) -> tuple[StageReport, ...]:
        """What every stage did: rows in, out and dropped by reason, and where its artifact lies."""
        return self.contents.stages

    @property
    def scores(self) -> dict[str, StageReport]:
        """Every committed score by name, with what was fitted and its moments under `details`."""
        return self.contents.scores

    @property
    def selections(self) -> dict[str, StageReport]:
        """Every selection and control by name, with its rule and thresholds under `details`."""
        return self.contents.selections

    @property
    def reasons(self) -> dict[str, str]:
        """Every reason for which this run left pairs out (`dropped`, `reason_<name>`), with its meaning."""
        counts = [stage.dropped for stage in self.stages if stage.unit == "pairs"]
        found = dict.fromkeys(reason for dropped in counts for reason, count in dropped.items() if count)
        return {reason: meaning(reason) for reason in found}

    def pairs(self, columns: Sequence[str] | None = None, *, selection: str | None = None) -> PairTable:
        """Every pair of the corpus with its text, its numbers, and what was decided about it.

        A pair that stands in several files has a row for each place; `dropped` names all but one of them duplicates.
        Everything is joined by pair_id.

        Args:
            columns: Only these, in this order; what only others need is not read. Default, all of them: `pair_id` and
                `prompt_id` (32 hex digits), `source`, `aspect`, fields that a source carries, `file`, `row` (counted
                from 0, in the file), `label_margin`, `dropped` (why the pair could not be selected, null where it
                could), `prompt`, `chosen` and `rejected` (lists of role/content messages), `ratings_chosen` and
                `ratings_rejected` (every number that came with the completion, by name), the flat columns of every
                scorer (log-probs in nats, summed over the response; lengths in tokens), `score_<name>` and
                `percentile_<name>` (0 to 100, the middle of a bin; a selection's dataset has its own, split where it
                cuts) of every score, `kept_<name>` and `reason_<name>` (why not, null where kept) of every selection,
                and `flipped_<name>` of one whose rule may turn labels.
            selection: Only the pairs that this selection, or control, kept, as it keeps them: if its rule may turn
                labels with a column `flipped`, and where that is true with chosen and rejected exchanged, and every
                number of either side.

        Returns:
            A table that is read shard by shard, in corpus order.

        Raises:
            UserError: A column or the selection is unknown; the nearest valid one is named.
            IntegrityError: While it is read: a shard is lost, or speaks of other pairs than the corpus has.
        """
        if selection is not None:
            self.contents.selection(selection)
        first = self.contents.rows(self.contents.shards[0], selection=selection).schema
        for name in columns or ():
            if name not in first.names:
                near = difflib.get_close_matches(name, first.names, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise UserError(f"columns: got {name!r}; {hint}valid: {', '.join(first.names)}")
        schema = first if columns is None else pa.schema([first.field(name) for name in columns])
        wanted = None if columns is None else frozenset(columns)
        return PairTable(
            schema, tuple(self.contents.shards), lambda shard: self.contents.rows(shard, wanted, selection)
        )

    def explain(self, pair_id: str) -> str:
        """Every number, percentile and threshold that decided about one pair, as text of several lines.

        Args:
            pair_id: 32 hex digits, or their beginning.

        Raises:
            UserError: No pair has this id, or several begin so.
        """
        return "\n".join(explain_in(self.contents, pair_id))

    def report(self) -> str:
        """One line per stage: rows in, rows out, and what was dropped for which reason."""
        return "\n".join(stage.sentence() for stage in self.stages)


def open_workspace(uri: str | Path, corpus: str | None = None) -> Workspace:
    """Open a workspace for reading; needs no cluster, no model and neither torch nor Ray.

    Args:
        uri: A directory or a URI (`s3://`, `gs://`).
        corpus: Of one that a model answered, such as a round of self-play, its name; None: what was read from files.

    Returns:
        What the last finished run left; see `Workspace`.

    Raises:
        UserError: It is no workspace, no run has finished in it, or its corpus changed since the last one.
    """
    storage = Storage(str(uri))
    storage.require_folder()
    return Workspace(redact(storage.uri), read_contents(storage, corpus))
