"""`explain`: every number and percentile that decided about one pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from prefsel.errors import UserError
from prefsel.numbers.histogram import Histogram
from prefsel.reasons import meaning
from prefsel.report.contents import TEXTS, Contents, all_contents
from prefsel.report.examples import transcript
from prefsel.schema import FLIPPED
from prefsel.select.percentiles import Percentiles, selection_percentiles
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

SHOWN_CHARACTERS = 400


def explain_pair(storage: Storage, pair_id: str) -> Iterator[str]:
    """Lines about the pair whose hex id begins with `pair_id`, in the workspace's last run.

    Raises:
        UserError: No finished run, no such pair, or several.
    """
    known = all_contents(storage)
    holding = [one for one in known if find_pair(one, pair_id.lower())]
    for contents in holding or known[:1]:
        yield from explain_in(contents, pair_id)


def explain_in(contents: Contents, pair_id: str) -> Iterator[str]:
    """As `explain_pair`, of contents that were read already."""
    found = find_pair(contents, pair_id.lower())
    if not found:
        raise UserError(f"pair_id: no pair begins with {pair_id!r}")
    if len({full for _, _, full in found}) > 1:
        raise UserError(f"pair_id: {pair_id!r} is ambiguous: {', '.join(sorted({full for _, _, full in found})[:5])}")
    for shard, _, full in found:
        yield from explain_row(contents, shard, full)


def find_pair(contents: Contents, prefix: str) -> list[tuple[ShardRef, int, str]]:
    """Every place of the corpus that holds the pair: shard, row and full id."""
    found = []
    for shard in contents.shards:
        pairs = Artifact(contents.storage, shard.pairs_path).read(shard.shard, ["pair_id"])
        ids = pairs["pair_id"].to_pylist()
        found += [(shard, row, one.hex()) for row, one in enumerate(ids) if one.hex().startswith(prefix)]
    return found


def explain_row(contents: Contents, shard: ShardRef, pair_id: str) -> Iterator[str]:
    """Lines about one pair of one shard."""
    table = contents.rows(shard)
    shown = table.slice(table["pair_id"].to_pylist().index(pair_id), 1).to_pylist()[0]
    yield f"pair      {pair_id}"
    yield f"from      {shard.key}, {shown['file']} row {shown['row']}"
    yield f"source    {shown['source']}; aspect {shown['aspect'] or '–'}"
    if contents.carried:
        fields = [f"{name}: {shown[name] or '–'}" for name in contents.carried]
        yield f"carried   {'; '.join(fields)}"
    yield f"dropped   {_told(shown['dropped']) or 'no: eligible'}"
    for side in TEXTS:
        yield f"{side:<9} {transcript(shown[side])[:SHOWN_CHARACTERS]!r}"
    told = {f"{what}_{name}" for name in contents.scores for what in ("score", "percentile")}
    for name, value in shown.items():
        if isinstance(value, float) and name not in told:
            yield f"  {name:<40} {value:.9g}"
    for name in contents.scores:
        yield _explain_score(contents, shard, name, pair_id)
    for name in contents.selections:
        yield _explain_selection(contents, shard, name, pair_id, shown[f"reason_{name}"])


def _explain_score(contents: Contents, shard: ShardRef, name: str, pair_id: str) -> str:
    """The pair's score by one metric, or made for a selection, and where it stands among the pairs that have one.

    That is told as far as the score's histogram knows it: from where to where its bin reaches.
    """
    row, report = _scored(contents, shard, name, pair_id), contents.scores[name]
    if row["score"] is None or row["dropped"]:
        return f"score     {name}: none ({_told(row['dropped'])})"
    total = Histogram.from_json(report.details["histogram"])
    (low,), (high,) = Percentiles(total).ranges(np.array([row["score"]]))
    shown = f"percentile {low:.2f} to {high:.2f} (its bin) among {report.rows_out:,} pairs"
    return f"score     {name}: {row['score']:.9g}, {shown}"


def _explain_selection(contents: Contents, shard: ShardRef, name: str, pair_id: str, reason: str | None) -> str:
    """Whether one selection kept the pair or why not, at which percentile of its score, and against which threshold."""
    selection = contents.selections[name]
    details = selection.details
    kept = {row["pair_id"].hex(): row for row in contents.kept(name, shard).to_pylist()}.get(pair_id)
    turned = ", flipped (chosen and rejected exchanged)" if kept and kept.get(FLIPPED) else ""
    verdict = f"kept{turned}, stratum {kept['stratum']}" if kept else f"not kept ({_told(reason)})"
    row = _scored(contents, shard, details["metric"], pair_id)
    if row["score"] is not None:
        (percentile,) = selection_percentiles(selection).of(np.array([row["score"]]))
        verdict += f"; percentile {percentile:.2f} among {selection.rows_in:,} pairs"
    reached = details.get("percentiles")
    middle = f"; percentiles reached {reached}" if reached else ""
    if any(one["pair_id"] == pair_id for one in (details.get("close") or {}).get("pairs", ())):
        verdict += "; closer to a threshold than the rounding of the corpus's moments"
    return f"selection {name}: {verdict}; thresholds {details['thresholds']}{middle}"


def _told(reason: str | None) -> str:
    """A reason with its meaning; empty for none."""
    return " – ".join(filter(None, (reason, meaning(reason or ""))))


def _scored(contents: Contents, shard: ShardRef, name: str, pair_id: str) -> dict[str, Any]:
    """What `Contents.scored` says of one pair."""
    ids = pa.array([bytes.fromhex(pair_id)], pa.binary(16))
    row: dict[str, Any] = contents.scored(name, shard, ids).to_pylist()[0]
    return row
