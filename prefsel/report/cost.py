"""What each selection cost before its first pair was kept: model passes and trainings, in forwards over the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefsel.config import Selection
from prefsel.plan.columns import length_scorer, scorers_for
from prefsel.plan.node import Node
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.scores import metric_columns
from prefsel.rules import rule_scores
from prefsel.workspace.manifest import StageReport

TRAINED = ("train", "reward")


def cost_table(plan: Plan, reports: Sequence[StageReport]) -> dict[str, Any] | None:
    """One row per selection: its scoring, its trainings and tangents, their sum and their seconds.

    The unit is one pass of the policy that counts the lengths over all completions, prompts shared; a training step
    counts as three forwards (four with activation checkpointing), a directional derivative as three. What selections
    share is counted in each. Returns None without a policy to measure by.
    """
    by_node = _reports_of(reports)
    unit = _forward_flops(plan, by_node)
    if not unit or not plan.config.selections:
        return None
    rows = []
    for selection in plan.config.selections:
        found = [report for node in _read_by(plan, selection) for report in by_node.get((node.kind, node.name), [])]
        scoring = sum(flops(report) for report in found if report.stage == "score")
        training = sum(flops(report) for report in found if report.stage in (*TRAINED, "tangent"))
        seconds = sum(spent(report) for report in found)
        rows.append([selection.name, scoring / unit, training / unit, (scoring + training) / unit, seconds])
    counted = length_scorer(plan)
    assert counted is not None
    return {
        "title": "What each selection cost",
        "note": f"In forwards of {counted.reference_model} over all completions ({unit:.3g} FLOPs each), by the FLOP "
        "formula; a pass of training counts 3, or 4 with activation checkpointing. What several selections use is "
        "counted in each; given models and those made on the spot (scratch) cost nothing here."
        + uncounted(by_node.values()),
        "columns": ["selection", "scoring", "training", "together", "model seconds"],
        "rows": rows,
    }


def uncounted(reports: Iterable[Sequence[StageReport]]) -> str:
    """A sentence about scorers that ran on actors and counted no FLOPs, whose cost is therefore unknown; or nothing."""
    counted = (one for many in reports for one in many if one.stage == "score" and one.details["kind"] != "imported")
    kinds = sorted({one.details["kind"] for one in counted if "flops_model" not in one.details["counters"]})
    told = f" Scorers of kind {', '.join(kinds)} counted no FLOPs (`flops_model` of their `ScoredShard.counters`)"
    return f"{told} and stand here with 0." if kinds else ""


def scoring_table(reports: Sequence[StageReport]) -> dict[str, Any] | None:
    """One row per scorer that ran a model: what went through it, and how well that used the device and the pool."""
    rows = []
    for report in reports:
        counters = report.details.get("counters", {}) if report.stage == "score" else {}
        if not counters.get("trunk_tokens"):
            continue
        shares, facts, pool = (report.details.get(name, {}) for name in ("shares", "facts", "pool"))
        peak = facts.get("matmul_flops_per_s")
        rows.append(
            [
                report.name,
                *(counters.get(name, 0) for name in ("trunk_tokens", "head_rows", "seconds_model")),
                *(_percent(shares.get(name)) for name in ("padding", "useful_mfu")),
                shares.get("flops_over_min"),
                peak / 1e9 if peak else None,
                facts.get("token_budget"),
                facts.get("token_budget_least"),
                counters.get("oom_halvings", 0),
                _percent(pool.get("steady", pool.get("overall"))),
            ]
        )
    columns = ["scorer", "trunk tokens", "head rows", "model seconds", "padding %", "useful MFU %", "FLOPs over least"]
    columns += ["peak GFLOP/s", "token budget", "in the end", "halved", "pool busy %"]
    note = (
        "Trunk tokens: tokens through the layers, shared beginnings once; head rows: response tokens whose probability "
        "was computed. Useful MFU: the least FLOPs (floating-point operations) that the groups need, over what the "
        "device's matrix products, measured when an actor starts, could have done in the model's seconds. The token "
        "budget of a row is probed at the start and halved when memory runs out. Pool busy: model seconds over wall "
        "time of each actor, its first and last shard apart where it had three or more."
    )
    return {"title": "What scoring took", "note": note, "columns": columns, "rows": rows} if rows else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _read_by(plan: Plan, selection: Selection) -> list[Node]:
    """The columns that the metrics of a selection's rule read, and all that those need; not what its dataset shows."""
    names = [column for metric in rule_scores(selection.rule) for column in metric_columns(plan, metric)]
    scorers = scorers_for(plan, names, field=f"selections.{selection.name}")
    return in_order(plan.node("columns", scorer.label) for scorer in scorers)


Key = tuple[str, str]
"""Kind and name of a node."""


def _reports_of(reports: Sequence[StageReport]) -> dict[Key, list[StageReport]]:
    """Stage reports by the node that they are of."""
    kinds = {"score": "columns", "tangent": "tangent", **dict.fromkeys(TRAINED, "model")}
    found: dict[Key, list[StageReport]] = {}
    for report in reports:
        if report.stage in kinds:
            found.setdefault((kinds[report.stage], report.name), []).append(report)
    return found


def _forward_flops(plan: Plan, by_node: Mapping[Key, list[StageReport]]) -> float:
    """FLOPs of one pass over the corpus; 0 when nothing was measured."""
    scorer = length_scorer(plan)
    return sum(flops(one) for one in by_node.get(("columns", scorer.label), [])) if scorer else 0.0


def flops(report: StageReport) -> float:
    """FLOPs a stage report counted."""
    details = report.details
    if report.stage == "score":
        return float(details["counters"].get("flops_model", 0.0))
    return float(details.get("flops_train") or 0.0)


def spent(report: StageReport) -> float:
    """Seconds in models, summed over actors; of a training its wall time."""
    if report.stage == "score":
        return float(report.details["counters"].get("seconds_model", 0.0))
    return float(report.details.get("train_seconds") or report.details.get("seconds") or 0.0)
