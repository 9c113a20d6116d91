"""`explain`: every number and percentile that decided about one pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from prefsel.configfile import parse_config
from prefsel.errors import UserError
from prefsel.lineage import Lineage
from prefsel.report.examples import transcript
from prefsel.select.compose import compile_rule
from prefsel.select.derived import DerivedScore, derived_scores, score_reader
from prefsel.select.export import export_rows
from prefsel.select.percentiles import Percentiles, selection_percentiles
from prefsel.select.radix import Histogram
from prefsel.select.rules import parse_rule
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import load_summary
from prefsel.workspace.storage import Storage

SHOWN_CHARACTERS = 400


def explain_pair(storage: Storage, pair_id: str) -> Iterator[str]:
    """Lines about the pair whose hex id begins with `pair_id`, in the configuration of the workspace's last run.

    Raises:
        UserError: no finished run, no such pair, or several.
    """
    if not storage.exists("config.yaml"):
        raise UserError("--workspace: no finished run here; explain needs the config.yaml that a run leaves")
    lineage = Lineage(parse_config(yaml.safe_load(storage.read("config.yaml"))), storage)
    found = find_pair(lineage, pair_id.lower())
    if not found:
        raise UserError(f"pair_id: no pair begins with {pair_id!r}")
    if len({full for _, _, full in found}) > 1:
        raise UserError(f"pair_id: {pair_id!r} is ambiguous: {', '.join(sorted({full for _, _, full in found})[:5])}")
    for shard, row, full in found:
        yield from explain_row(lineage, shard, row, full)


def find_pair(lineage: Lineage, prefix: str) -> list[tuple[ShardRef, int, str]]:
    """Every place of the corpus that holds the pair: shard, row and full id."""
    found = []
    for shard in lineage.catalog.shards:
        ids = Artifact(lineage.storage, f"pairs/{shard.source}").read(shard.shard, ["pair_id"])["pair_id"].to_pylist()
        found += [(shard, row, one.hex()) for row, one in enumerate(ids) if one.hex().startswith(prefix)]
    return found


def explain_row(lineage: Lineage, shard: ShardRef, row: int, pair_id: str) -> Iterator[str]:
    """Lines about one row of one shard."""
    reader = lineage.reader_of(lineage.scorers)
    folders = {folder: Artifact(lineage.storage, f"{folder}/{shard.source}") for folder, _ in reader.columns}
    missing = [folder for folder, artifact in folders.items() if shard.shard not in artifact.entries()]
    if missing or load_summary(lineage.storage, lineage.eligible_folder) is None:
        what = ", ".join(missing) or "eligibility"
        raise UserError(f"explain: the corpus changed since the last run ({what} is not complete); run it again first")
    flat = reader.flat(shard)
    pairs = reader.pairs(shard)
    shown = export_rows(np.array([row]), pairs, reader.groups(shard), flat, {}).to_pylist()[0]
    place = pairs["provenance"][row].as_py() or {}
    yield f"pair      {pair_id}"
    yield f"from      {shard.key}, {lineage.catalog.file_of(shard).uri} row {place.get('row')}"
    yield f"source    {shown['source']}; aspect {shown['aspect'] or '–'}"
    yield f"dropped   {flat['dropped'][row].as_py() or 'no: eligible'}"
    for side in ("prompt", "chosen", "rejected"):
        yield f"{side:<9} {transcript(shown[side])[:SHOWN_CHARACTERS]!r}"
    numbers = {name: value for name, value in shown.items() if isinstance(value, float)}
    for name, value in numbers.items():
        yield f"  {name:<40} {value:.9g}"
    key = bytes.fromhex(pair_id)
    for name in lineage.metrics:
        yield explain_score(lineage, shard, name, lineage.scores_folder(name), key)
    explained: set[str] = set()
    for selection in lineage.config.selections:
        rules = {selection.name: selection.rule}
        if load_summary(lineage.storage, lineage.selected_folder(selection.name, selection.rule)) is not None:
            rules |= lineage.control_rules(selection)
        for name, rule in rules.items():
            made = derived_scores(lineage, name, compile_rule(parse_rule(rule)))
            for one in made:
                if one.folder not in explained:
                    explained.add(one.folder)
                    yield explain_score(lineage, shard, one.name, one.folder, key)
            yield explain_selection(lineage, shard, name, rule, key, made)


def _row_of(table: pa.Table, pair_id: bytes) -> dict[str, Any] | None:
    place = table["pair_id"].to_pylist()
    return table.slice(place.index(pair_id), 1).to_pylist()[0] if pair_id in place else None


def explain_score(lineage: Lineage, shard: ShardRef, name: str, folder: str, pair_id: bytes) -> str:
    """The pair's score by one metric, or made for a selection, and where it stands among the pairs that have one.

    That is told as far as the score's histogram knows it: from where to where its bin reaches.
    """
    summary = load_summary(lineage.storage, folder)
    if summary is None:
        return f"score     {name}: not computed"
    row = _row_of(Artifact(lineage.storage, f"{folder}/{shard.source}").read(shard.shard), pair_id)
    assert row is not None, "a score shard holds every pair of its pairs shard"
    if row["score"] is None or row["dropped"]:
        return f"score     {name}: none ({row['dropped']})"
    total = Histogram.from_json(summary.details["histogram"])
    (low,), (high,) = Percentiles(total).ranges(np.array([row["score"]]))
    return f"score     {name}: {row['score']:.9g}, percentile {low:.2f} to {high:.2f} of {summary.rows_out:,} (its bin)"


def explain_selection(
    lineage: Lineage,
    shard: ShardRef,
    name: str,
    rule: dict[str, Any],
    pair_id: bytes,
    made: Sequence[DerivedScore],
) -> str:
    """Whether one selection kept the pair, at which percentile of its score, and against which threshold."""
    folder = lineage.selected_folder(name, rule)
    summary = load_summary(lineage.storage, folder)
    if summary is None:
        return f"selection {name}: not made"
    row = _row_of(Artifact(lineage.storage, f"{folder}/{shard.source}").read(shard.shard), pair_id)
    verdict = f"kept, stratum {row['stratum']}" if row else "not kept"
    plan = compile_rule(parse_rule(rule))
    scores = score_reader(lineage, plan, made).folders[plan.score]
    scored = _row_of(Artifact(lineage.storage, f"{scores}/{shard.source}").read(shard.shard), pair_id)
    if scored is not None and scored["score"] is not None:
        (percentile,) = selection_percentiles(summary).of(np.array([scored["score"]]))
        verdict += f"; percentile {percentile:.2f} of {summary.rows_in:,}"
    reached = summary.details.get("percentiles")
    middle = f"; percentiles reached {reached}" if reached else ""
    return f"selection {name}: {verdict}; thresholds {summary.details['thresholds']}{middle}"
