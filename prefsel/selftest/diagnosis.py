"""Every way of making rows against the reference, and the cause of a difference, found by experiment.

a difference above the tolerance ─ EXPERIMENTS, in this order ─▶ the first that removes it names the cause
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefsel.models.architecture import STATELESS_ROPE, unwrapped
from prefsel.models.padded import pad
from prefsel.progress import Progress
from prefsel.score.engine import Key, Values
from prefsel.selftest.subject import Comparison, Finding, Subject
from prefsel.selftest.ways import Path, forward_padded, pad_token, paths, precision, reference

SIGMAS = 4.0
"""Standard deviations of rounding noise that a number may be off."""
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def tolerance(dtype: torch.dtype, num_layers: int, num_tokens: int) -> float:
    r"""The largest relative difference that rounding explains.

    fp32: 1e-5 (PERFORMANCE), some hundred roundings; fp64: 1e-7, because parts of models stay in fp32. bf16 and fp16:
    \(4u\sqrt{(2L+1)/n}\), u the unit roundoff: the residual stream is rounded after each of its 2L additions and the
    logits once more, independently, which moves a log-prob by about \(u\sqrt{2L+1}\) per nat and a sum of n of them by
    √n times that; 4 standard deviations. Random models of five architectures with 2 and 16 layers had log-probs off
    by at most 0.34 of one at initial scale 0.1 and by 1.24 at 0.3 with two layers (16 such layers amplify rounding
    without bound, in every dtype); rewards by 0.7 to 2.3 in 27 of 30 models, by 5 to 7.5 in the others.
    """
    if dtype not in UNIT_ROUNDOFF:
        return 1e-7 if dtype == torch.float64 else 1e-5
    return max(1e-5, SIGMAS * UNIT_ROUNDOFF[dtype] * math.sqrt((2 * num_layers + 1) / max(1, num_tokens)))


def compare(label: str, subject: Subject, values: Values, expected: Values) -> Comparison:
    """The worst completion of a way of making rows.

    Differences are relative: of a log-prob to its own size, but to at least one nat per token, because a response the
    model is sure of has a log-prob near 0 with rounding errors like any other; of a reward to the largest of its head.
    """
    num_layers = unwrapped(subject.model).config.get_text_config().num_hidden_layers
    sizes = [max((abs(v) for v in column if math.isfinite(v)), default=0) or 1 for column in zip(*expected.values())]
    rows: list[tuple[float, float, float, Key]] = []
    for key, numbers in values.items():
        num_tokens = 1 if subject.is_reward else max(1, len(subject.sequence(key)[1]))
        limit = tolerance(subject.model.dtype, num_layers, num_tokens)
        scales = sizes if subject.is_reward else [max(abs(expected[key][0]), num_tokens)]
        offs = [abs(a - b) / scale for a, b, scale in zip(numbers, expected[key], scales)]
        off = max(offs) if all(map(math.isfinite, offs)) else math.inf
        rows.append((off / limit, off, limit, key))
    _, off, limit, worst = max(rows)
    return Comparison(label, len(rows), off, limit, worst, frozenset(key for ratio, *_, key in rows if ratio > 1))


@dataclass(frozen=True)
class Case:
    """A way of making rows that does not give the reference's numbers."""

    subject: Subject
    path: Path
    failed: Comparison
    expected: Values

    def again(self, subject: Subject) -> Comparison:
        """The same way with another subject, against that one's own reference."""
        return compare(self.path.label, subject, self.path.compute(subject), reference(subject))


def compare_paths(subject: Subject, progress: Progress, label: str) -> tuple[list[Comparison], list[Finding]]:
    """Every way of making rows against the reference, and the causes of what differs, each once."""
    comparisons: list[Comparison] = []
    causes: dict[str, Finding] = {}
    ways = paths(subject)
    with progress.track(f"selftest {label}", len(ways) + 1, "ways of making rows") as counter:
        expected = reference(subject)
        counter.advance(note="reference")
        for path in ways:
            if values := path.compute(subject):  # empty: every sequence is too long for this many logits
                comparisons.append(compare(path.label, subject, values, expected))
            counter.advance(note=path.label)
    failed = {c.check: c for c in comparisons if not c.is_ok}
    for is_padded in (False, True):  # the first failure of each kind: the others repeat it
        for path in [path for path in ways if path.label in failed and path.is_padded == is_padded][:1]:
            cause = _diagnose(Case(subject, path, failed[path.label], expected))
            causes.setdefault(cause.cause, cause)
    return comparisons, list(causes.values())


def _diagnose(case: Case) -> Finding:
    """The first experiment that explains the difference."""
    for experiment in EXPERIMENTS:
        try:
            told = experiment(case)
        except torch.OutOfMemoryError:
            told = "unknown", f"{_off(case)}; memory ran out in the experiment {experiment.__name__}"
        if told is not None:
            return Finding("FAIL", *told)
    why = "no experiment (dtype, pad token, mask, length, neighbours) removes it: these rows do not serve this model"
    return Finding("FAIL", "unknown", f"{_off(case)}; {why}")


Cause = tuple[str, str] | None
"""(what the cause is called, what was seen and what to do), or None."""


def not_finite(case: Case) -> Cause:
    """One sequence at a time, is it the model itself that gives NaN or infinity, and only in this dtype?"""
    bad = [key for key, numbers in case.expected.items() if not all(map(math.isfinite, numbers))]
    if not bad:
        return None
    dtype, subject = case.subject.model.dtype, case.subject.only(bad)
    told = f"NaN or infinity for {len(bad)} of {len(case.expected)} completions even one at a time in {_name(dtype)}"
    with precision(subject.model, WIDER[dtype]):
        if all(math.isfinite(v) for numbers in reference(subject).values() for v in numbers):
            return "dtype", f"{told}, none in {_name(WIDER[dtype])}: it overflows; use another dtype"
    return "not finite", f"{told}, and in {_name(WIDER[dtype])} too: its weights are broken"


def _not_deterministic(case: Case) -> Cause:
    """Does the same sequence, alone, give other numbers a second time, and still when nothing runs in between?"""
    subject = case.subject
    second = compare("", subject, reference(subject), case.expected)
    if second.is_ok:
        return None
    told = f"one sequence alone, a second time, differs by {second.difference:.1e}"
    one = subject.only({second.worst})
    if not compare("", one, reference(one), reference(one)).is_ok:
        return "randomness", f"{told}, twice in a row too: something in the model is random in evaluation mode"
    why = _culprit(subject.model) or "the model keeps something of what it saw before"
    return "state", f"{told}, though not twice in a row: {why}"


def dtype_noise(case: Case) -> Cause:
    """Does the difference go when the dtype widens? A fault keeps its size, rounding shrinks by 2^13 and more."""
    dtype = case.subject.model.dtype
    if dtype not in WIDER:
        return None
    with precision(case.subject.model, WIDER[dtype]):
        exact = reference(case.subject)
        wide = compare("", case.subject, case.path.compute(case.subject), exact)
    is_rounding = wide.is_ok or wide.difference < case.failed.difference / 100 < math.inf
    if not is_rounding:
        return None
    noise = compare("", case.subject, case.expected, exact).difference
    return "dtype", (
        f"{_off(case)} in {_name(dtype)}, by {wide.difference:.1e} in {_name(WIDER[dtype])}: rounding that this model "
        f"amplifies; its own noise in {_name(dtype)} is {noise:.1e}; use a wider dtype"
    )


def _pad_in_text(case: Case) -> Cause:
    """Do all agree when the pad token is one that no sequence holds?"""
    subject, fill = case.subject, case.subject.pad_token_id
    used = {token for key in subject.keys for part in subject.sequence(key) for token in part}
    rows = unwrapped(subject.model).get_input_embeddings().weight.shape[0]
    free = next((token for token in range(rows) if token not in used), None)
    if fill not in used or free is None:
        return None
    with pad_token(subject.model, free):
        if not case.again(replace(subject, pad_token_id=free)).is_ok:
            return None
    name = subject.tokenizer.convert_ids_to_tokens(fill)
    if fill != subject.tokenizer.eos_token_id:
        return "pad token in the text", f"{_off(case)}, none with a pad token that occurs nowhere, as {name!r} does"
    told = f"{_off(case)}, none with a pad token that occurs nowhere: with pad token {name!r} a classifier reads the "
    told += "token before the last eos"
    if unwrapped(subject.model).config.pad_token_id is None:
        told += f", without one the eos itself; config.json has none: write pad_token_id {fill} there if the model was "
        told += "trained on batches padded with it, else an id that is no eos"
    return "pad = eos", told


def _mask_ignored(case: Case) -> Cause:
    """Does padding alone, with no other sequence in the row, change the numbers?"""
    subject, bad = case.subject, case.failed.disagreeing
    key = min(bad, key=subject.length)
    width = max(map(subject.length, subject.keys)) - subject.length(key)
    if not case.path.is_padded or not width:
        return None
    (row,) = pad(subject.only({key}).groups, 1, pad_token_id=subject.pad_token_id)
    fill = subject.pad_token_id or 0
    ids, mask = (
        torch.nn.functional.pad(tensor, (0, width), value=value)
        for tensor, value in ((row.input_ids_BT, fill), (row.attention_mask_BT, 0))
    )
    masked = forward_padded(subject, [replace(row, input_ids_BT=ids, attention_mask_BT=mask)])
    alone = compare("", subject, masked, case.expected)
    if alone.is_ok:
        return None
    unmasked = forward_padded(subject, [replace(row, input_ids_BT=ids, attention_mask_BT=torch.ones_like(mask))])
    is_same = compare("", subject, masked, case.expected | unmasked).is_ok
    told = "as much as without attention_mask: the model ignores it" if is_same else "attention_mask does not hide all"
    return "mask", f"{width} pad tokens after one sequence alone change it by {alone.difference:.1e}: {told}"


def _truncated_only(case: Case) -> Cause:
    """Are only truncated completions off, and do all agree without them?"""
    subject, bad = case.subject, case.failed.disagreeing
    whole = set(subject.keys) - subject.cut
    if not bad <= subject.cut or not whole or not case.again(subject.only(whole)).is_ok:
        return None
    return "truncation", (
        f"{_off(case)}, all of them truncated; the other {len(whole)} agree without them: the model does not hold at "
        "max_length; lower it, or drop what is longer"
    )


def _neighbours_matter(case: Case) -> Cause:
    """Do the same sequences agree, made the same way, but alone in their rows?"""
    some = sorted(case.failed.disagreeing)[:4]
    for key in some:
        if not case.again(case.subject.only({key})).is_ok:
            return None
    what = _culprit(case.subject.model) or "something in the model looks across rows or at their lengths"
    return "neighbours", f"{_off(case)}, none when alone in its row ({len(some)} tried): {what}"


def _culprit(model: Any) -> str:
    """A known reason for numbers that depend on what else is computed."""
    rope = (getattr(unwrapped(model).config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in STATELESS_ROPE:
        return ""
    return f"its {rope!r} rotary embedding follows the longest sequence it met; set max_length to its original length"


EXPERIMENTS: tuple[Callable[[Case], Cause], ...] = (
    *(not_finite, _not_deterministic, dtype_noise, _pad_in_text, _mask_ignored, _truncated_only, _neighbours_matter),
)


def _off(case: Case) -> str:
    failed = case.failed
    return f"{len(failed.disagreeing)} completions differ by up to {failed.difference:.1e} ({failed.check})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
