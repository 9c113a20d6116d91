"""Input files → groups, pairs, quarantine; then the catalog that says which shards are the corpus.

    file ──hash──▶ known? ──no──▶ windows of rows ──▶ commit groups, pairs, quarantine ──▶ file record ──▶ catalog

One task per file, in flat memory. A file whose record exists, and whose shards all lie there, is not opened again; a
window whose shard was committed by an attempt that died is parsed but not written again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefsel.config import Config, Source
from prefsel.display import redact
from prefsel.errors import UserError
from prefsel.ingest.identity import file_digest
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.windows import Window, ingest_windows
from prefsel.plugins.registry import code_of
from prefsel.progress import Progress
from prefsel.schema import has_rest
from prefsel.stages.tasks import map_shards
from prefsel.withdraw.tables import taken_out
from prefsel.workspace.catalog import WITHOUT_PAIRS, Catalog, FileRecord, SourceRecord, quarantine_name, write_catalog
from prefsel.workspace.documents import find_document, read_document, write_document
from prefsel.workspace.ledger import Artifact, merge_counts
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.recipes import canonical
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.withdrawals import WITHDRAWN, Gone, read_gone

KINDS = ("groups", "pairs", "quarantine")
EXCLUDED = "exclude-prompts"


@dataclass(frozen=True)
class FileTask:
    """One file to ingest."""

    source: str
    uri: str
    content: str
    record: str
    """Where its record goes; the name covers content and settings, so a changed setting is a new record."""


def ingest(config: Config, storage: Storage, progress: Progress) -> list[StageReport]:
    """Bring every source of `config` into the workspace.

    Raises:
        UserError: a missing file, an empty corpus, or more rows quarantined than allowed. The catalog is then left as
            it was; the quarantine stays for reading.
    """
    sources = _all_sources(config)
    uris = [(source, _travelling(uri)) for source in sources for path in source.paths for uri in list_files(path)]
    with progress.track("hash inputs", len(uris), "files") as counter:
        contents = map_shards(_hash_file, [uri for _, uri in uris], counter=counter)
    tasks = [_file_task(source, config, uri, content) for (source, uri), content in zip(uris, contents)]
    first_of = {(task.source, task.record): task for task in reversed(tasks)}
    there = {
        (source.name, kind): Artifact(storage, f"{kind}/{source.name}").there() for source in sources for kind in KINDS
    }
    pending = [task for task in first_of.values() if not _is_ingested(storage, task, there)]
    with progress.track("ingest", len(pending), "files", commits=True) as counter:
        by_name = {source.name: source for source in sources}
        shared = {"storage": storage, "config": config, "sources": by_name, "there": there}
        shared["gone"] = read_gone(storage)
        map_shards(_ingest_file, pending, shared=shared, counter=counter)
    catalog, reports = compose(sources, tasks, storage, {task.record for task in pending})
    for report in reports:
        _tell(report, progress)
    _check_quality(config, catalog, storage)
    write_catalog(storage, catalog)
    for source in catalog.sources:
        for kind in KINDS:
            Artifact(storage, f"{kind}/{source.name}").compact()
    return reports


def _is_ingested(storage: Storage, task: FileTask, there: Mapping[tuple[str, str], set[str]]) -> bool:
    """Whether a file has a record, and all that the record names is there.

    Raises:
        DamagedError: the record is not what was written.
    """
    record = find_document(storage, task.record)
    if record is None:
        return False
    shards = [row["shard"] for row in record["shards"]]
    names = {kind: shards for kind in KINDS} | {"quarantine": [quarantine_name(one, record["uri"]) for one in shards]}
    return all(there[task.source, kind].issuperset(names[kind]) for kind in KINDS)


def _tell(report: StageReport, progress: Progress) -> None:
    """What of a source's fields was used, kept and ignored, and the first row of each reason."""
    if not report.computed_shards:
        return
    told = [f"{use} {', '.join(names)}" for use, names in report.details["fields"].items() if names]
    if told:
        progress.line(f"ingest    {report.name}: fields: {'; '.join(told)}")
    if opposed := report.details["opposed"]:
        progress.line(
            f"ingest    {report.name}: {opposed:,} pairs of completions are labelled both ways by different aspects; "
            "sources[].options.aspect takes one of them"
        )
    if unpaired := report.details["unpaired"]:
        progress.line(
            f"ingest    {report.name}: {unpaired:,} prompts give no pair: no two of their responses differ in label or "
            "rating"
        )
    for reason, example in report.details["examples"].items():
        progress.line(f"ingest    {report.name}: {reason}: {example}")


def _travelling(uri: str) -> str:
    """A local path as workers can open it, whose working directory is another; names of `save_to_disk` folders too."""
    if uri.startswith("datasets:"):
        folder = Path(uri.removeprefix("datasets:"))
        return f"datasets:{folder.absolute()}" if folder.is_dir() else uri
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _all_sources(config: Config) -> list[Source]:
    """The configured sources, and the excluded prompts as one more."""
    if EXCLUDED in {source.name for source in config.sources}:
        raise UserError(f"sources: the name {EXCLUDED!r} is taken by `exclude_prompts`")
    names = [source.name for source in config.sources]
    if len(set(names)) < len(names):
        raise UserError(f"sources: names must differ, got {', '.join(names)}")
    if not config.exclude_prompts:
        return config.sources
    return [*config.sources, Source(name=EXCLUDED, paths=config.exclude_prompts, role="exclude")]


def _file_task(source: Source, config: Config, uri: str, content: str) -> FileTask:
    """The task of one file; its record is named by content and by every setting that changes the rows."""
    settings = [content, source.format, source.options.identity, config.ingest.rows_per_shard]
    settings += [] if source.map is None else [source.map.model_dump()]
    settings += [{"carry": source.carry}] if source.carry else []
    settings += [config.ingest.max_row_mib, source.role in WITHOUT_PAIRS, *code_of("formats", source.format).values()]
    record = f"groups/{source.name}/_files/{digest(canonical(settings))}.json"
    return FileTask(source.name, uri, content, record)


def _hash_file(uri: str, _: Any) -> str:
    return file_digest(uri)


def _ingest_file(task: FileTask, shared: dict[str, Any]) -> None:
    """Stream one file into committed shards, then write its record."""
    started = time.monotonic()
    storage, config = shared["storage"], shared["config"]
    known = {kind: shared["there"][task.source, kind] for kind in KINDS}
    source: Source = shared["sources"][task.source]
    rows = read_rows(task.uri, max_row_bytes=int(config.ingest.max_row_mib * 2**20))
    windows = ingest_windows(
        rows,
        file=redact(task.uri),
        format=source.format,
        options=source.options,
        rows_per_shard=config.ingest.rows_per_shard,
        prompts_only=source.role in WITHOUT_PAIRS,
        fields=source.map,
        carry=source.carry,
    )
    shards = []
    for number, whole in enumerate(windows):
        window = without_withdrawn(whole, shared["gone"], redact(task.uri))
        shard = f"{window.digest[:16]}-{number:05d}"
        _commit_window(storage, source, shard, quarantine_name(shard, redact(task.uri)), window, known)
        shards.append(
            {
                "shard": shard,
                "counts": _window_counts(window),
                **{key: getattr(window, key) for key in ("reasons", "format", "examples", "fields")},
            }
        )
    seconds = time.monotonic() - started
    write_document(storage, task.record, {"uri": redact(task.uri), "shards": shards, "seconds": seconds})


def without_withdrawn(window: Window, gone: Gone, file: str) -> Window:
    """A window without what was taken back; its name stays, as its rows are the same."""
    tables = taken_out(window.groups, window.pairs, window.quarantine, gone, file)
    groups, pairs, quarantine = tables
    if quarantine is window.quarantine and groups is window.groups and pairs is window.pairs:
        return window
    reasons = dict(Counter(quarantine["reason"].to_pylist()))
    accepted = window.num_rows - window.num_duplicate - quarantine.num_rows
    return replace(
        window,
        groups=groups,
        pairs=pairs,
        quarantine=quarantine,
        num_accepted=accepted,
        num_quarantined=quarantine.num_rows,
        reasons=reasons,
        examples={reason: told for reason, told in window.examples.items() if not gone.rows and reason in reasons},
    )


def _window_counts(window: Window) -> dict[str, int]:
    """What became of the rows of a window."""
    return {
        "rows": window.num_rows,
        "accepted": window.num_accepted,
        "quarantined": window.num_quarantined,
        "duplicate": window.num_duplicate,
        "ties": window.num_ties,
        "rating_conflicts": window.num_rating_conflicts,
        "absent_ratings": window.num_absent,
        **({"opposed": window.num_opposed} if window.num_opposed else {}),
        **({"unpaired": window.num_unpaired} if window.num_unpaired else {}),
        "groups": window.groups.num_rows,
        "pairs": window.pairs.num_rows,
    }


def _commit_window(
    storage: Storage, source: Source, shard: str, quarantine: str, window: Window, known: Mapping[str, set[str]]
) -> None:
    """Commit the three tables of a window, except those that an earlier attempt or an equal file already did.

    `known` is as of the begin of the run; what a task that died committed since has a ledger object of its own.
    """
    tables = {"groups": (shard, window.groups), "pairs": (shard, window.pairs)}
    tables["quarantine"] = (quarantine, window.quarantine)
    for kind, (name, table) in tables.items():
        artifact = Artifact(storage, f"{kind}/{source.name}")
        if name not in known[kind] and not artifact.is_done(name, window.digest):
            attempt = artifact.log_attempt(name)
            info: dict[str, Any] | None = {"has_rest": True} if kind == "groups" and has_rest(table) else None
            if kind == "pairs" and source.carry:
                info = {"carried": source.carry}
            artifact.commit(name, table, made_from=window.digest, attempt=attempt, info=info)


def compose(
    sources: list[Source], tasks: list[FileTask], storage: Storage, computed: set[str]
) -> tuple[Catalog, list[StageReport]]:
    """The catalog and one report per source. A shard met before in its source is a duplicate, row for row."""
    records, reports = [], []
    for source in sources:
        files, seen, fresh, seconds = [], set(), 0, 0.0
        for task in (task for task in tasks if task.source == source.name):
            record = read_document(storage, task.record)
            new = [row for row in record["shards"] if row["shard"] not in seen]
            again = [row for row in record["shards"] if row["shard"] in seen]
            seen |= {row["shard"] for row in new}
            fresh += len(new) if task.record in computed else 0
            seconds += record["seconds"] if task.record in computed else 0.0
            counts = merge_counts([row["counts"] for row in new] + [_as_duplicate(row["counts"]) for row in again])
            reasons = merge_counts(row["reasons"] for row in new)
            found = "/".join(sorted({row["format"] for row in record["shards"]} - {"unknown"}))
            names = [row["shard"] for row in new]
            files.append(
                FileRecord(
                    *(redact(task.uri), task.content, names, counts, reasons, found),
                    examples=_first_examples(new),
                    fields=_all_fields(new),
                    read_as=record["uri"] if record["uri"] != redact(task.uri) else "",
                )
            )
        records.append(SourceRecord(source.name, source.role, files))
        reports.append(report(source, files, fresh, seconds))
    return Catalog(records), reports


def _first_examples(shards: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The first row of every reason; records of earlier versions have none."""
    found: dict[str, str] = {}
    for row in shards:
        found = {**row.get("examples", {}), **found}
    return found


def _all_fields(shards: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Rows in which each field was used, kept or ignored, over all shards."""
    names = sorted({name for row in shards for name in row.get("fields", {})})
    return {name: merge_counts(row.get("fields", {}).get(name, {}) for row in shards) for name in names}


def _as_duplicate(counts: dict[str, int]) -> dict[str, int]:
    return {"rows": counts["rows"], "accepted": 0, "quarantined": 0, "duplicate": counts["rows"]}


def report(source: Source, files: list[FileRecord], computed: int, seconds: float) -> StageReport:
    """rows in = accepted + quarantined by reason + duplicate."""
    counts = merge_counts(file.counts for file in files)
    reasons = merge_counts(file.reasons for file in files)
    dropped = {f"quarantined:{reason}": count for reason, count in reasons.items()}
    dropped["duplicate"] = counts["duplicate"]
    return StageReport(
        stage="ingest",
        name=source.name,
        unit="rows",
        rows_in=counts["rows"],
        rows_out=counts["accepted"],
        dropped=dropped,
        shards=sum(len(file.shards) for file in files),
        computed_shards=computed,
        seconds=seconds,
        artifact=f"groups/{source.name}",
        details={
            "files": len(files),
            "formats": sorted({file.format for file in files}),
            **{key: counts.get(key, 0) for key in ("groups", "pairs", "ties", "rating_conflicts", "absent_ratings")},
            **{key: counts.get(key, 0) for key in ("opposed", "unpaired")},
            "fields": _by_use(files),
            "examples": _examples(files),
        },
    )


def _examples(files: Sequence[FileRecord]) -> dict[str, str]:
    """The first quarantined row of every reason: file, number, and what was wrong."""
    first: dict[str, str] = {}
    for file in files:
        first = {**{reason: f"{file.uri}, {one}" for reason, one in file.examples.items()}, **first}
    return first


def _by_use(files: Sequence[FileRecord]) -> dict[str, list[str]]:
    """Fields by what became of them; one that some rows use counts as used."""
    fields = _all_fields([{"fields": file.fields} for file in files])
    found: dict[str, list[str]] = {"used": [], "kept": [], "ignored": []}
    for name, uses in fields.items():
        found[next(use for use in found if uses.get(use))].append(name)
    return found


def _check_quality(config: Config, catalog: Catalog, storage: Storage) -> None:
    """Refuse an empty corpus and one that is mostly quarantined."""
    files = [file for source in catalog.sources for file in source.files]
    counts = merge_counts(file.counts for file in files)
    reasons = merge_counts(file.reasons for file in files)
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    where = f"the rows lie in {redact(storage.uri)}/quarantine"
    limit = config.ingest.max_quarantine_fraction
    shown = "".join(f"\n  {reason}: {one}" for reason, one in _examples(files).items())
    unusable = counts["quarantined"] - reasons.get(WITHDRAWN, 0)
    if unusable > limit * counts["rows"]:
        raise UserError(
            f"ingest: {unusable:,} of {counts['rows']:,} rows are quarantined ({told}); "
            f"ingest.max_quarantine_fraction is {limit:g}; {where}; the first of each reason:{shown}"
        )
    for source in catalog.sources:  # an evaluation set that could not be read must not pass for an empty one
        for file in source.files:
            if source.role != "train" and not file.counts["accepted"] and not file.counts["duplicate"]:
                raise UserError(f"sources.{source.name}: {file.uri} holds no usable {source.role} row; {where}")
    trained = [file for source in catalog.sources if source.role == "train" for file in source.files]
    answered = any(source.role == "prompts" for source in catalog.sources) and (config.generate or config.selfplay)
    if not answered and not any(file.counts.get("pairs") for file in trained):
        where = f"{len(files)} file(s) with {counts.get('rows', 0):,} rows"
        raise UserError(f"sources: empty corpus, no pair in {where}{_why_no_pair(trained)}")


def _why_no_pair(files: Sequence[FileRecord]) -> str:
    """What else to say of files that gave prompts and no pair; empty where they gave none."""
    counts = merge_counts(file.counts for file in files)
    if not counts.get("groups"):
        return ""
    formats = ", ".join(sorted({file.format for file in files}))
    return (
        f": {counts['groups']:,} prompts were read as {formats}, {counts.get('ties', 0):,} comparisons are ties, and "
        "no prompt has two responses that a label or a rating sets apart"
    )
