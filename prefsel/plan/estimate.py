"""What a run would make, take and need, as one document: plain values that the command prints and `--json` gives.

changes of nodes ─┐
sample ─ works ───┼─▶ work by node ─▶ GPU-hours by kind of GPU, what fits, $, storage, break-even
former runs ──────┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from prefsel.config import PARTS
from prefsel.errors import UserError
from prefsel.plan.accelerators import ACCELERATORS, Accelerator, smallest_for
from prefsel.plan.changes import Change
from prefsel.plan.columns import column_names, reference_scorer, scorers_for
from prefsel.plan.kept import kept_pairs
from prefsel.plan.node import Node
from prefsel.plan.nodes import writes_dataset
from prefsel.plan.plan import Plan, in_order
from prefsel.plan.sample import Sample
from prefsel.plan.scores import metric_columns, metric_specs
from prefsel.plan.show import shown_nodes
from prefsel.plan.sizes import ITEM_BYTES
from prefsel.plan.survey import Estimate, total
from prefsel.plan.work import Work, Works
from prefsel.rules import rule_scores

Rates = Mapping[str, float]
"""Node → FLOPs a second of wall time on this machine, as `Work.computed` counts them; "" stands for any other."""


def estimate(
    plan: Plan,
    sample: Sample,
    changed: Sequence[Change],
    *,
    gpu: Accelerator | None = None,
    num_gpus: int = 1,
    prices: Mapping[str, float],
    rates: Rates,
) -> dict[str, Any]:
    """The document.

    Args:
        plan: Of the configuration.
        sample: Of its corpus.
        changed: Its nodes, and what of them is there.
        gpu: The kind of GPU that is asked for; None: all are compared.
        num_gpus: How many there are.
        prices: USD an hour of some kinds.
        rates: Of this machine, as far as they are known.

    Raises:
        UserError: A model does not fit the kind that is asked for; names what to change.
    """
    works = Works(plan, sample)
    left = {one.node: one.left for one in changed}
    found = [replace(work, left=left.get(work.node, 1.0)) for node in shown_nodes(plan) if (work := works.of(node))]
    found += [Work(f"answers {spec.name}", "scoring", _ANSWERS) for spec in plan.config.generate]
    found += [Work(f"rounds {arm.name}", "scoring", _ANSWERS) for arm in plan.config.selfplay]
    known = [work for work in found if not work.missing]
    if gpu is not None:
        require_fit(known, gpu)
    kinds = [gpu] if gpu else list(ACCELERATORS.values())
    return {
        "name": plan.config.name,
        "corpus": _corpus(sample, works),
        "nodes": [asdict(one) for one in changed],
        "work": [_work_row(work, rates) for work in found],
        "seconds_here": _seconds_here(known, rates),
        "gpus": [_gpu_row(known, kind, num_gpus if gpu else None, prices.get(kind.name)) for kind in kinds],
        "storage": _storage(plan, sample, works),
        "break_even": list(_break_even(plan, works, {work.node: work for work in known})),
        "missing": {work.node: work.missing for work in found if work.missing},
        "notes": [*sample.notes, *_notes(plan, known)],
    }


_ANSWERS = "what a model will answer is not known"


def _corpus(sample: Sample, works: Works) -> dict[str, Any]:
    names = ("num_groups", "num_completions", "num_pairs", "eligible_pairs", "characters")
    read = sum(window.num_groups for one in sample.surveys.values() for window in one.windows)
    return {
        "bytes": sample.bytes,
        **{name.removeprefix("num_"): asdict(sample.counted(name)) for name in names},
        "windows_read": sum(len(one.windows) for one in sample.surveys.values()),
        "groups_read": read,
        "groups_tokenised": len(sample.every_group),
        "is_all": all(one.is_read for one in sample.surveys.values()) and read == len(sample.every_group),
    }


def _work_row(work: Work, rates: Rates) -> dict[str, Any]:
    row: dict[str, Any] = {"node": work.node, "kind": work.kind, "missing": work.missing, "note": work.note}
    if work.missing:
        return row
    assert work.memory is not None, "known together with the FLOPs"
    fits = smallest_for(work.memory.total, work.dtype)
    rate = rates.get(work.node, rates.get(""))
    return row | {
        "left": work.left,
        "items": asdict(work.items),
        "tokens": asdict(work.tokens),
        "flops": asdict(work.flops),
        "passes": work.passes,
        "computed_flops": asdict(work.computed),
        "gpus": work.gpus,
        "memory_gib": {**asdict(work.memory), "total": work.memory.total},
        "smallest_gpu": fits.name if fits else None,
        "seconds_here": work.computed.value / rate if rate else None,
    }


def _seconds_here(known: Sequence[Work], rates: Rates) -> float | None:
    """Seconds of wall time on this machine; None where something that is left has no rate."""
    todo = [work for work in known if work.computed.value]
    if not rates or any(not rates.get(work.node, rates.get("")) for work in todo):
        return None
    return sum(work.computed.value / rates.get(work.node, rates.get("", 0.0)) for work in todo)


def gpu_seconds(work: Work, gpu: Accelerator) -> Estimate:
    """Seconds that a node takes of one GPU."""
    share = gpu.training if work.kind == "training" else gpu.scoring
    return work.computed.times(1 / (gpu.peak_tflops * 1e12 * share.of_peak))


def _gpu_row(known: Sequence[Work], gpu: Accelerator, num_gpus: int | None, price: float | None) -> dict[str, Any]:
    hours = {
        kind: total(gpu_seconds(work, gpu) for work in known if work.kind == kind).times(1 / 3600)
        for kind in ("scoring", "training")
    }
    both = hours["scoring"] + hours["training"]
    too_large = [work.node for work in known if work.left and not _holds(gpu, work)]
    wall = None
    if num_gpus is not None:
        wall = total(
            gpu_seconds(work, gpu).times(1 / max(1, min(num_gpus, work.most_gpus or num_gpus))) for work in known
        )
    return {
        "name": gpu.name,
        "memory_gib": gpu.memory_gib,
        "is_measured": gpu.scoring.measured and gpu.training.measured,
        "source": {"scoring": gpu.scoring.source, "training": gpu.training.source},
        "gpu_hours": {**{kind: asdict(one) for kind, one in hours.items()}, "total": asdict(both)},
        "gpus": num_gpus,
        "wall_s": asdict(wall) if wall else None,
        "usd": None if price is None else asdict(both.times(price)),
        "too_small_for": too_large,
    }


def _holds(gpu: Accelerator, work: Work) -> bool:
    assert work.memory is not None, "known together with the FLOPs"
    return work.memory.total <= gpu.memory_gib and (gpu.has_bf16 or work.dtype != "bf16")


def require_fit(known: Sequence[Work], gpu: Accelerator) -> None:
    """Refuse a kind of GPU that cannot hold what a node needs.

    Raises:
        UserError: names the node, both sizes, and what would help.
    """
    for work in known:
        assert work.memory is not None, "known together with the FLOPs"
        need = work.memory.total
        if not work.left or _holds(gpu, work):
            continue
        if need <= gpu.memory_gib:
            other = "fp16" if work.kind == "scoring" else "fp32"
            raise UserError(
                f"{work.node}: dtype bf16, which {gpu.name} does not multiply; valid: {other}, or another GPU"
            )
        larger = smallest_for(need, work.dtype)
        other = f"a larger GPU ({larger.name})" if larger else "more GPUs, as no single one is so large"
        parts = work.memory
        if work.kind == "scoring":
            ways = f"the model's gpus_per_replica above {work.gpus}, dtype bf16, a smaller token_budget, or {other}"
        else:
            ways = (
                "zero_stage 3 over more workers, offload, gradient_checkpointing: true, a smaller token_budget, lora, "
                f"or {other}"
            )
        raise UserError(
            f"{work.node}: needs {need:,.1f} GiB on each GPU (weights {parts.weights:,.1f}, gradients and optimizer "
            f"{parts.optimizer:,.1f}, activations {parts.activations:,.1f}), and {gpu.name} has {gpu.memory_gib:,.1f}; "
            f"valid: {ways}"
        )


def _storage(plan: Plan, sample: Sample, works: Works) -> list[dict[str, Any]]:
    """Bytes by kind of artifact: what is kept of texts as measured on the sample, numbers by their width."""
    stored, pairs = sample.counted("stored_bytes"), sample.counted("num_pairs")
    completions, groups = sample.counted("num_completions"), sample.counted("num_groups")
    rows = [("groups and pairs", stored)]
    width = sum(9 * len(column_names(plan, one)) for one in plan.scorers)
    ids = len(plan.scorers)
    rows.append(("columns", completions.times(width + 16 * ids) + groups.times(16 * ids)))
    rows.append(
        (
            "eligible, scores, selections",
            pairs.times(18 + 25 * len(metric_specs(plan)) + 3 * len(plan.config.selections)),
        )
    )
    datasets, eligible = Estimate.exact(0.0), works.eligible
    for selection in plan.config.selections:
        for name in selection.names:
            if writes_dataset(plan, name) and eligible.value:
                kept, _ = kept_pairs(selection.rule, eligible)
                datasets += stored.times(min(1.0, kept.value / eligible.value))
    rows.append(("datasets", datasets))
    weights = checkpoints = 0.0
    for spec in plan.config.train:
        try:
            size = works.model(spec.model, spec.role).size.parameters
        except UserError:  # said among what is missing
            continue
        item, moments = ITEM_BYTES[spec.dtype], 8 * spec.keep_optimizer_state
        weights += len(spec.trained_models) * size * (item + moments)
        if spec.checkpoint_every_steps:
            checkpoints = max(checkpoints, spec.keep_checkpoints * size * (item + 12.0))
    rows += [("models", Estimate.exact(weights)), ("checkpoints, while a training runs", Estimate.exact(checkpoints))]
    return [{"artifact": name, "bytes": asdict(size)} for name, size in rows]


def _break_even(plan: Plan, works: Works, known: Mapping[str, Work]) -> Any:
    r"""For each training on a selection \(R = (s + bτE) / (s_{ref} + τE)\); trainings of proxies stand in s."""
    for spec in plan.config.train:
        if spec.role != "policy" or spec.selection in PARTS or spec.max_steps:
            continue
        own = known.get(f"model {spec.trained_models[0].label}")
        needed = [str(node) for node in _read_by(plan, spec.selection)]
        if own is None:
            continue
        runs = [known[name] for name in needed if name in known]
        s = sum(work.flops.value * work.passes for work in runs)
        tau = 4.0 if spec.gradient_checkpointing else 3.0
        forward = works.pair_flops(spec.model, spec.role).value
        if not forward:
            continue
        reference = known.get(f"columns {reference_scorer(plan, spec.reference).label}") if spec.reference else None
        if reference is not None and reference.node not in needed:
            s += reference.flops.value
        s_ref = reference.flops.value if reference else 0.0
        full = tau * spec.num_epochs * forward
        share = own.flops.value / full
        ratio = (s + own.flops.value) / (s_ref + full)
        lacking = [name for name in needed if name in works.missing]
        told = f"scoring and training {share:.0%} costs {ratio:.2f} of training on all"
        yield {
            "training": spec.name,
            "s": s / forward,
            "s_ref": s_ref / forward,
            "b": share,
            "tau": tau,
            "epochs": spec.num_epochs,
            "R": ratio,
            "sentence": told + (f", without {', '.join(lacking)}" if lacking else ""),
        }


def _read_by(plan: Plan, name: str) -> list[Node]:
    """The columns that a selection's rule reads, and all that these need; not what its dataset shows besides."""
    selection = next(one for one in plan.config.selections if name in one.names)
    names = [column for metric in rule_scores(selection.rule) for column in metric_columns(plan, metric)]
    scorers = scorers_for(plan, names, field=f"selections.{selection.name}")
    return in_order(plan.node("columns", one.label) for one in scorers)


def _notes(plan: Plan, known: Sequence[Work]) -> list[str]:
    notes = [f"{work.node}: {work.note}" for work in known if work.note]
    if any(work.kind == "training" for work in known):
        notes.append(
            "trainings: kept pairs are counted as long as the others, and prompts that pairs of a batch share twice"
        )
    if any(spec.is_made_here for spec in plan.config.models):
        notes.append("what it takes to make the models that are made on the spot is not counted")
    return notes


def upper_gpu_hours(document: Mapping[str, Any]) -> float:
    """The upper end of the GPU-hours on the one kind that was asked for."""
    return float(document["gpus"][0]["gpu_hours"]["total"]["high"])
