"""The models that the scorers name: loaded as a run would load them, each with everything that is found about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from prefsel.config import Config
from prefsel.errors import PrefselError, UserError, invalid
from prefsel.models.chat import EncodedGroup, Encoder, Unconditional
from prefsel.models.loading import load_causal, load_reward, load_tokenizer
from prefsel.models.logps import model_device
from prefsel.models.reward import own_pad_token
from prefsel.plan.models import find_model, model_spec
from prefsel.plan.nodes import make_plan
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.score.engine import Key
from prefsel.score.probes import calibrate_budget
from prefsel.selftest.diagnosis import compare_paths
from prefsel.selftest.findings import (
    length_findings,
    pad_findings,
    template_findings,
    text_findings,
    vocabulary_findings,
)
from prefsel.selftest.subject import Finding, ModelCheck, Sample, Subject, read_sample
from prefsel.workspace.storage import Storage


def selftest(config: Config, progress: Progress) -> list[ModelCheck]:
    """Try every model that a `causal_logps` or `reward_model` scorer names on the first groups of the data.

    Args:
        config: Of the run that is planned, checked.
        progress: Says what the sample is, and counts the ways of making rows.

    Returns:
        One check per scorer that runs a model; models that the run itself makes, and kinds that have no self-test, are
        skipped and say so. What is wrong with one model, its template
        included, is among its findings and does not keep the others from being checked.

    Raises:
        UserError: The data cannot be read, or there is none.
        PrefselError: A model does not fit into memory.
    """
    plan = make_plan(config, Storage("."))  # pretrained models are found without a workspace
    sample = read_sample(config)
    progress.line(f"selftest: {len(sample.groups)} groups ({sample.origin})\n")
    return [_check_scorer(scorer, plan, sample, progress) for scorer in config.scorers if scorer.runs_models]


def _check_scorer(scorer: Any, plan: Plan, sample: Sample, progress: Progress) -> ModelCheck:
    """Load the model of a scorer as the run would, and check it."""
    label = scorer.label
    if not scorer.has_selftest:
        why = f"kind {scorer.kind!r} has no self-test; `_check_scorer` in {__name__} would try it"
        return ModelCheck(label, scorer.kind, skipped=why)
    parts = ("model", "role", "heads" if getattr(scorer, "role", None) == "reward" else "unconditional")
    if lacking := [part for part in parts if not hasattr(scorer, part)]:
        where = f"the record {type(scorer).__name__} in {type(scorer).__module__}"
        raise UserError(f"selftest {label}: kind {scorer.kind!r} has has_selftest, but {where} no {', '.join(lacking)}")
    spec = model_spec(plan, scorer.model)
    if spec.is_made_here:
        return ModelCheck(label, scorer.kind, skipped="made by this run, checked when it is made")
    description = f"{spec.path}, {spec.dtype}"
    try:
        ref = find_model(plan, spec.name)
        more: dict[str, Any] = {"revision": ref.revision, "trust_remote_code": spec.trust_remote_code}
        limits = {key: ref.settings[key] for key in ("template", "max_length", "truncation")}
        description += "".join(f", {key} {_short(value)}" for key, value in limits.items())
        tokenizer = load_tokenizer(ref.path, **more)
        encoder = Encoder(tokenizer, **limits)
        is_reward = scorer.role == "reward"
        load = load_reward if is_reward else load_causal
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(ref.path, dtype=spec.dtype, device=device, gpus_per_replica=spec.gpus_per_replica, **more)
        if is_reward and scorer.heads and len(scorer.heads) != model.config.num_labels:
            raise invalid("heads", scorer.heads, f"{model.config.num_labels} names, one per output of {spec.path}")
        found = check_model(
            label,
            model,
            encoder,
            sample,
            is_reward=is_reward,
            is_bare=not is_reward and scorer.unconditional,
            token_budget=scorer.token_budget,
            progress=progress,
        )
    except UserError as error:
        found = ModelCheck(label, scorer.kind, findings=[Finding("FAIL", "input", str(error), is_input=True)])
    except torch.OutOfMemoryError as error:
        raise PrefselError(f"selftest {label}: out of memory; lower its scorer's token_budget: {error}") from error
    return replace(found, description=description)


def check_model(
    label: str,
    model: Any,
    encoder: Encoder,
    sample: Sample,
    *,
    is_reward: bool,
    is_bare: bool = False,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> ModelCheck:
    """Every check of one loaded model.

    Args:
        label: What it is called.
        model: A causal language model or a sequence classifier, in evaluation mode.
        encoder: Its tokenizer, with the template and the length limit of the run.
        sample: The data.
        is_reward: Compare the classifier's outputs rather than log-probs.
        is_bare: Score responses without their prompts.
        token_budget: Tokens of the engine's rows; None: 8 192 on a CPU, probed on a GPU.
        progress: Counts the comparisons; None: nobody listens.

    Returns:
        Its findings, and its comparisons unless the encoding already fails.

    Raises:
        UserError: A prompt without any token.
    """
    asked = Unconditional(encoder) if is_bare else encoder
    groups = asked.encode_groups(sample.groups, strict=False)
    uncut = Encoder(encoder.tokenizer, encoder.template).encode_groups(sample.groups, strict=False)
    fills = [own_pad_token(model) if is_reward else None, encoder.tokenizer.pad_token_id]
    fill = next((token for token in fills if token is not None), None if is_reward else 0)
    subject = Subject(model, encoder, groups, is_reward, fill, _cut(groups, uncut))
    kind, facts = "reward_model" if is_reward else "causal_logps", [_counts(subject)]
    findings = [
        *template_findings(subject, sample),
        *length_findings(subject, uncut),
        *vocabulary_findings(subject),
        *text_findings(subject, sample),
    ]
    if not subject.keys or any(finding.level == "FAIL" for finding in findings):
        return ModelCheck(label, kind, facts=facts, findings=findings)
    route = subject.route
    subject = replace(subject, token_budget=token_budget or calibrate_budget(route, model_device(model)))
    rows = "packed" if route.is_packed else f"padded, because: {route.reason}"
    facts.append(f"engine: rows of at most {subject.token_budget:,} tokens, {rows}")
    comparisons, causes = compare_paths(subject, progress or Progress(quiet=True), label)
    names = {
        key: f"prompt {sample.names[key[0]]}, completion {key[1]}, {subject.length(key)} tokens" for key in subject.keys
    }
    findings += pad_findings(subject) + causes
    return ModelCheck(label, kind, facts=facts, comparisons=comparisons, findings=findings, names=names)


def _cut(groups: Sequence[EncodedGroup], uncut: Sequence[EncodedGroup]) -> frozenset[Key]:
    return frozenset(
        (g, c)
        for g, (group, whole) in enumerate(zip(groups, uncut))
        for c, (now, before) in enumerate(zip(group.completion_tokens, whole.completion_tokens))
        if group.status[c] == "ok" and (len(now) < len(before) or any(group.prompt_starts[c : c + 1]))
    )


def _counts(subject: Subject) -> str:
    statuses = [status for group in subject.groups for status in group.status]
    kinds = ", ".join(f"{statuses.count(kind)} {kind}" for kind in ("ok", "too_long", "template_error"))
    longest = max(map(subject.length, subject.keys), default=0)
    return f"{len(statuses)} completions: {kinds}; {len(subject.cut)} truncated; longest {longest:,} tokens"


def _short(value: object) -> str:
    return repr(value[:37] + "…") if isinstance(value, str) and len(value) > 40 else str(value)
