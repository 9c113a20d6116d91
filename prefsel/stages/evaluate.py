"""Judged answers → what is known of a model: one record, a row per prompt, and a line for people.

groups, columns ── shard by shard ──▶ the prompts of both models ──▶ evaluation.json, prompts.parquet, sealed
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.config import PairwiseFunction
from prefsel.evaluate.comparison import Comparison, compare_pairwise, merged
from prefsel.evaluate.judged import Answers, Measured, Numbers, compared, joined, measured
from prefsel.evaluate.preference import HeldOut, held_out, margins_of
from prefsel.evaluate.table import as_json, summary
from prefsel.generate.samples import REPEATED, sample_places
from prefsel.plan.columns import column_names
from prefsel.plan.evaluated import evaluated_of, reward_columns, verdicts_path, warnings
from prefsel.plan.models import model_nodes
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.score.function import answer_text, asked, pairwise_judge
from prefsel.stages.tasks import map_shards
from prefsel.train.heldout import read_margins
from prefsel.workspace.catalog import required_entries
from prefsel.workspace.folders import seal_files
from prefsel.workspace.ledger import Artifact, merge_counts
from prefsel.workspace.manifest import StageReport, load_summary, save_summary
from prefsel.workspace.recipes import hash_hex
from prefsel.workspace.storage import Storage
from prefsel.workspace.verify import finished

RECORD, PROMPTS = "evaluation.json", "prompts.parquet"
"""Files of an evaluation."""
VERDICTS = pa.schema([("prompt_id", pa.string()), ("advantage", pa.float64()), ("length_difference", pa.float64())])
"""What a pairwise judge said: a row per answer of ours beside one of theirs, as `Comparison` holds them."""


def evaluate(plan: Plan, node: Node, progress: Progress) -> StageReport:
    """Measure a model whose answers, and those of its baseline, are judged.

    Raises:
        UserError: no prompt has an answer of both, or a judge gave none of them a number.
    """
    started = time.monotonic()
    if (done := finished(plan.storage, node.path)) is not None:
        return done
    made, evaluated = evaluated_of(plan)
    other: Plan | None = evaluated.baseline
    rewards = reward_columns(plan)
    all_ours = _read(plan, [scorer.label for scorer in plan.scorers])
    all_theirs = None if other is None else _read(other, list(dict.fromkeys(rewards.values())))
    ours, theirs = compared(all_ours, all_theirs)
    verdicts = {}
    if other is not None and theirs is not None:
        for judge in evaluated.options.pairwise:
            verdicts[judge.name] = _verdicts(plan, other, judge, progress)
    found = measured(
        ours,
        theirs,
        judges=[column.removeprefix("rm_") for column in rewards],
        verdicts=verdicts,
        held_out=_held_out(plan, made.policy),
        warnings=warnings(plan),
        num_draws=evaluated.options.resamples,
    )
    report = _report(plan, node, found, all_ours, all_theirs, started)
    for one in found.judges.values() or [found.overall]:
        progress.line(f"evaluate  {summary(one)}")
    sink = io.BytesIO()
    pq.write_table(found.prompts, sink)
    record = {key: report.details[key] for key in ("model", "baseline", "overall", "judges", "answers")}
    files = {RECORD: json.dumps(record, indent=1).encode(), PROMPTS: sink.getvalue()}
    seal_files(plan.storage, node.path, files, {"num_prompts": found.prompts.num_rows})
    save_summary(plan.storage, report)
    return report


def _report(
    plan: Plan, node: Node, found: Measured, ours: Answers, theirs: Answers | None, started: float
) -> StageReport:
    """The stage's counts in prompts, and all records: what the page shows."""
    made, evaluated = evaluated_of(plan)
    prompts = load_summary(plan.storage, plan.node("prompts", made.prompts.name).path)
    assert prompts is not None, "prompts are chosen before they are answered"
    dropped = {"unanswered": prompts.rows_out - len(ours.texts)}
    if theirs is not None:
        dropped["baseline_unanswered"] = len(ours.texts.keys() - theirs.texts.keys())
    answers = {made.policy: _answer_counts(plan)}
    if evaluated.baseline is not None and theirs is not None:
        answers[theirs.model] = _answer_counts(evaluated.baseline)
    shards = len(plan.catalog.shards)
    return StageReport(
        stage="evaluate",
        name=node.name,
        unit="prompts",
        rows_in=prompts.rows_out,
        rows_out=found.prompts.num_rows,
        dropped={reason: count for reason, count in dropped.items() if count},
        shards=shards,
        computed_shards=shards,
        seconds=time.monotonic() - started,
        artifact=node.path,
        details={
            "model": made.policy,
            "baseline": None if theirs is None else theirs.model,
            "overall": as_json(found.overall),
            "judges": {name: as_json(one) for name, one in found.judges.items()},
            "answers": answers,
            "prompts": made.prompts.name,
            "shards": [shard.shard for shard in plan.catalog.shards],
            "groups": {model: f"groups/{_source(one)}" for model, one in _plans(plan).items()},
            "warnings": list(dict.fromkeys(text for one in found.judges.values() for text in one.warnings)),
        },
    )


def _plans(plan: Plan) -> dict[str, Plan]:
    """The model's plan and that of its baseline, by the name of the model."""
    made, evaluated = evaluated_of(plan)
    other = evaluated.baseline
    return {made.policy: plan} | ({other.made.policy: other} if other is not None else {})


def _answer_counts(plan: Plan) -> dict[str, Any]:
    """Responses that a model was asked for, and those that nothing is measured of, by reason."""
    source = _source(plan)
    known = required_entries(plan.storage, f"groups/{source}", [shard.shard for shard in plan.catalog.shards])
    infos = [known[shard.shard].info for shard in plan.catalog.shards]
    dropped = merge_counts(info["dropped"] for info in infos)
    dropped.pop(REPEATED, None)
    return {"asked": sum(info["asked"] for info in infos), "dropped": dropped}


def _source(plan: Plan) -> str:
    (source,) = plan.catalog.sources
    return source.name


def _held_out(plan: Plan, model: str) -> HeldOut | None:
    """How the model orders held-out pairs, where it was trained here and its margins were kept."""
    nodes = [node for node in model_nodes(plan, model) if node.kind == "model"]
    margins = read_margins(plan.storage, nodes[0].path) if len(nodes) == 1 else None
    return None if margins is None else held_out(margins_of(margins))


# ------------------------------------------------------------------------------------------------------ of one shard


class _Asked(NamedTuple):
    """What a task reads of the answers of one model."""

    storage: Storage
    source: str
    model: str
    columns: Sequence[tuple[str, Sequence[str]]]
    """Folders of columns, and names."""


def _read(plan: Plan, labels: Sequence[str]) -> Answers:
    """The answers of a model with the columns of some scorers, from all shards."""
    made, _ = evaluated_of(plan)
    scorers = [scorer for scorer in plan.scorers if scorer.label in labels]
    columns = [(plan.node("columns", scorer.label).path, column_names(plan, scorer)) for scorer in scorers]
    asked_for = _Asked(plan.storage, _source(plan), made.policy, columns)
    shards = [shard.shard for shard in plan.catalog.shards]
    return joined(made.policy, map_shards(_read_shard, shards, shared=asked_for))


def _read_shard(shard: str, asked_for: _Asked) -> Answers:
    rows, places = _said(asked_for.storage, asked_for.source, shard)
    ids = [row["prompt_id"].hex() for row in rows]
    columns: dict[str, Numbers] = {}
    for folder, names in asked_for.columns:
        table = Artifact(asked_for.storage, f"{folder}/{asked_for.source}").read(shard, ["prompt_id", *names])
        for name in names:
            many = zip(table[name].to_pylist(), places)
            columns[name] = dict(zip(ids, ([numbers[place] for place in samples] for numbers, samples in many)))
    said = list(zip(ids, rows, places))
    return Answers(
        asked_for.model,
        {key: [answer_text(row["completions"][n]["messages"]) for n in samples] for key, row, samples in said},
        {key: [float(row["responses"][n]["num_tokens"]) for n in samples] for key, row, samples in said},
        columns,
        dict.fromkeys(ids, shard),
    )


def _said(storage: Storage, source: str, shard: str) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The groups of a shard, and of each the completions that the samples said, one as often as it was said."""
    names = ["prompt_id", "prompt", "completions", "responses"]
    rows = Artifact(storage, f"groups/{source}").read(shard, names).to_pylist()
    refused = Artifact(storage, f"quarantine/{source}").read(shard, ["reason", "raw"])
    found = sample_places(rows, zip(refused["reason"].to_pylist(), refused["raw"].to_pylist()))
    return rows, [found[row["prompt_id"]] for row in rows]


class _Beside(NamedTuple):
    """What a task compares."""

    storage: Storage
    sources: tuple[str, str]
    function: str
    folder: str


def _verdicts(plan: Plan, other: Plan, judge: PairwiseFunction, progress: Progress) -> Comparison:
    """What a pairwise judge says of the answers of both; it is asked about each shard once."""
    folder, sources = verdicts_path(plan, judge), (_source(plan), _source(other))
    folder = f"{folder}/{sources[0]}"
    contents = [
        {name: entry.content for name, entry in Artifact(plan.storage, f"groups/{source}").entries().items()}
        for source in sources
    ]
    inputs = {s.shard: hash_hex(*(content[s.shard] for content in contents)) for s in plan.catalog.shards}
    artifact = Artifact(plan.storage, folder)
    known = artifact.done(inputs)
    pending = [(name, made_from) for name, made_from in inputs.items() if name not in known]
    beside = _Beside(plan.storage, sources, judge.function, folder)
    with progress.track(f"judge {judge.name}", len(pending), commits=True) as counter:
        map_shards(_judge_shard, pending, shared=beside, counter=counter)
    done = artifact.done(inputs)
    found = []
    for name in inputs:
        table = artifact.read(name)
        prompts = tuple(table["prompt_id"].to_pylist())
        numbers = (table[column].to_numpy() for column in VERDICTS.names[1:])
        found.append(Comparison(prompts, *numbers, **done[name].info))
    artifact.compact()
    return merged(found)


def _judge_shard(item: tuple[str, str], beside: _Beside) -> None:
    """Ask about a shard, and keep what was said."""
    shard, made_from = item
    artifact = Artifact(beside.storage, beside.folder)
    attempt = artifact.log_attempt(shard)
    rows = _rows_beside(shard, beside)
    ids, prompts, ours, theirs = ([row[place] for row in rows] for place in range(4))
    gaps = [float(len(our) - len(their)) for our, their in zip(ours, theirs)]
    found = compare_pairwise(pairwise_judge(beside.function), ids, prompts, ours, theirs, gaps)
    table = pa.table([pa.array(ids, pa.string()), found.advantage_M, found.length_difference_M], schema=VERDICTS)
    info = {"num_inconsistent": found.num_inconsistent, "first_place": found.first_place}
    artifact.commit(shard, table, made_from=made_from, attempt=attempt, info=info)


def _rows_beside(shard: str, beside: _Beside) -> list[tuple[str, Any, str, str]]:
    """Every answer of ours beside every one of theirs to the same prompt: id, prompt, ours, theirs."""
    said = []
    for source in beside.sources:
        rows, places = _said(beside.storage, source, shard)
        texts = ([answer_text(row["completions"][n]["messages"]) for n in many] for row, many in zip(rows, places))
        said.append({row["prompt_id"]: (row["prompt"], answers) for row, answers in zip(rows, texts)})
    ours, theirs = said
    return [
        (prompt_id.hex(), asked(prompt), our, their)
        for prompt_id, (prompt, answers) in ours.items()
        for our in answers
        for their in theirs.get(prompt_id, (None, ()))[1]
    ]
