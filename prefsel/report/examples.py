"""A few pairs a reader can judge: the best kept, and the worst that were not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefsel.pairs.export import export_rows
from prefsel.plan.derived import derived_scores, score_reader
from prefsel.plan.lineage import Lineage
from prefsel.rules import parse_rule
from prefsel.select.compose import compile_rule
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport

TEXT_COLUMNS = (
    "pair_id",
    "prompt_id",
    "prompt",
    "chosen",
    "rejected",
    "source",
    "aspect",
    "score",
    "percentile",
    "stratum",
)


def examples(lineage: Lineage, selection: StageReport, number: int) -> list[dict[str, Any]]:
    """Up to `number` examples of one selection, half kept and half dropped, from its first shard with rows."""
    storage, half = lineage.storage, (number + 1) // 2
    if not half:
        return []
    plan = compile_rule(parse_rule(selection.details["rule"]))
    # Of a reversed rule the smallest scores are selected first.
    sign = 1.0 if plan.descending else -1.0
    scores = score_reader(lineage.plan, plan, derived_scores(lineage.plan, selection.name, plan)).folders[plan.score]
    for shard in lineage.catalog.shards:
        scored = Artifact(storage, f"{scores}/{shard.source}").read(shard.shard)
        if scored.num_rows - scored["dropped"].null_count == scored.num_rows:
            continue
        kept = Artifact(storage, f"{selection.artifact}/{shard.source}").read(shard.shard)
        row_K = kept["row"].to_numpy()
        eligible_M = np.flatnonzero(pc.is_null(scored["dropped"]).to_numpy())
        not_kept_M = np.setdiff1d(eligible_M, row_K)
        score_N = scored["score"].to_numpy()
        best = row_K[np.argsort(-sign * score_N[row_K], kind="stable")[:half]]
        worst = not_kept_M[np.argsort(sign * score_N[not_kept_M], kind="stable")[:half]]
        reader = lineage.reader_of(lineage.exported(selection.name))
        texts = (reader.pairs(shard), reader.groups(shard), reader.flat(shard))
        percentile = dict(zip(row_K.tolist(), kept["percentile"].to_pylist()))
        found = []
        for kind, rows in (("kept", best), ("dropped", worst)):
            extra = {
                "score": pa.array(score_N[rows]),
                "percentile": pa.array([percentile.get(int(row)) for row in rows], pa.float64()),
            }
            found += [{"kind": kind, **_readable(row)} for row in export_rows(rows, *texts, extra).to_pylist()]
        return found[:number]
    return []


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    texts = {side: transcript(row[side]) for side in ("prompt", "chosen", "rejected")}
    numbers = {
        name: value
        for name, value in row.items()
        if name not in TEXT_COLUMNS and not name.endswith(("_max", "_min")) and value is not None
    }
    kept = {name: row[name] for name in ("pair_id", "score", "percentile", "source", "aspect")}
    return kept | texts | {"numbers": numbers}


def transcript(messages: list[dict[str, str]]) -> str:
    """Messages as text; the role is named where there is more than one."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
