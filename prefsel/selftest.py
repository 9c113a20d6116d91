"""`prefsel selftest`: whether a model's numbers are the same however its rows are made, on the user's own data.

    first groups ─ template ─▶ tokens ─┬─▶ one sequence at a time, transformers' own attention: the reference
                                       ├─▶ the engine: all groups together, reversed, 1, 2 and 8 groups a row
                                       └─▶ padded: 1, 2 and 8 sequences of unequal length
    a difference above the tolerance ─ experiments ─▶ its cause

All in this process: no Ray, no workspace, nothing written. A cause is named only when an experiment shows it: what is
suspected is taken away, and the numbers agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jinja2
import torch
from torch import Tensor

from prefsel.config import CausalLogps, Config, Ingest, PretrainedModel, RewardModel, Source
from prefsel.errors import PrefselError, UserError, invalid
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.windows import ingest_windows
from prefsel.lineage import Lineage
from prefsel.models.attention import IMPLEMENTATION
from prefsel.models.chat import EncodedGroup, Encoder, Messages, Unconditional
from prefsel.models.loading import STATELESS_ROPE, load_causal, load_reward, load_tokenizer, unwrapped
from prefsel.models.logps import Route, logps_route, model_device
from prefsel.models.padded import PaddedBatch, pad, padded_logps, padded_rewards
from prefsel.models.reward import reward_route
from prefsel.naming import scorer_label
from prefsel.progress import Progress
from prefsel.score.scorers import Engine, Key, Values, calibrate_budget
from prefsel.workspace.storage import Storage, redact

NUM_GROUPS = 32
READ_ROWS = 256
"""Rows read at a time: the first groups must not cost a window of thousands."""
BATCH_SIZES = (1, 2, 8)
LOGITS_BYTES = 4_000_000_000
"""Most memory for the logits of a padded batch; longer sequences are left out of that check, and it says so."""
MOST_TOKENS = 65_536
"""Of a padded batch of a reward model, which has no logits."""
SIGMAS = 4.0
"""Standard deviations of rounding noise that a number may be off."""
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}

# ------------------------------------------------------------------------------------------------------- what it says


@dataclass(frozen=True)
class Finding:
    """Something to know about a model, its tokenizer or the data under them."""

    level: Literal["info", "warn", "FAIL"]
    cause: str
    message: str
    is_input: bool = False
    """Whether a failure lies in what the user gave (exit code 2) rather than in numbers that differ (1)."""


@dataclass(frozen=True)
class Comparison:
    """One way of making rows, against the reference."""

    check: str
    num_compared: int
    difference: float
    """Of the worst completion, relative to its scale (see `compare`); infinite where a number is missing."""
    tolerance: float
    """Of the worst completion."""
    worst: Key
    disagreeing: frozenset[Key]

    @property
    def is_ok(self) -> bool:
        """Whether every completion is within its tolerance."""
        return not self.disagreeing


@dataclass(frozen=True)
class ModelCheck:
    """What was found about the model of one scorer."""

    label: str
    kind: str
    description: str = ""
    skipped: str = ""
    """Why nothing was checked."""
    facts: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    names: dict[Key, str] = field(default_factory=dict)
    """What completions are called in the table."""

    @property
    def failures(self) -> list[Finding]:
        """The findings that must not stay."""
        return [finding for finding in self.findings if finding.level == "FAIL"]


def lines(checks: Sequence[ModelCheck]) -> list[str]:
    """The checks as text: per model its facts, a table and the findings; at the end one line that sums up."""
    told: list[str] = []
    for one in checks:
        told.append(f"{one.label} ({one.kind}): {one.skipped or one.description}")
        told += [f"  {fact}" for fact in one.facts]
        told += _table(one) if one.comparisons else []
        told += [f"  {finding.level}  {finding.cause}: {finding.message}" for finding in one.findings]
        told.append("")
    tested = [one for one in checks if not one.skipped]
    if failed := [one.label for one in tested if one.failures]:
        return [*told, f"selftest: {len(failed)} of {len(tested)} models FAIL: {', '.join(failed)}"]
    if not tested:
        return [*told, "selftest: no causal_logps or reward_model scorer names a pretrained model, nothing to check"]
    return [*told, f"selftest: {len(tested)} model{'s' * (len(tested) > 1)}, all agree"]


def _table(one: ModelCheck) -> list[str]:
    table = [["check", "completions", "max rel. difference", "tolerance", "", "worst completion"]]
    for row in one.comparisons:
        numbers = [str(row.num_compared), f"{row.difference:.1e}", f"{row.tolerance:.1e}"]
        table.append([row.check, *numbers, "ok" if row.is_ok else "FAIL", one.names[row.worst]])
    widths = [max(map(len, column)) for column in zip(*table)]
    cells = [
        [cell.rjust(width) if 1 <= at <= 3 else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths))]
        for row in table
    ]
    return ["  " + "  ".join(row).rstrip() for row in cells]


def require_agreement(checks: Sequence[ModelCheck]) -> None:
    """Raise what the command exits with.

    Raises:
        PrefselError: Numbers of a model do not agree (whatever else is wrong).
        UserError: A template, a tokenizer or a limit makes a model unusable.
    """
    failures = [(one.label, finding) for one in checks for finding in one.failures]
    if failures:
        told = "; ".join(dict.fromkeys(f"{label}: {finding.cause}" for label, finding in failures))
        raise (UserError if all(finding.is_input for _, finding in failures) else PrefselError)(f"selftest: {told}")


# ----------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Sample:
    """The first groups of the training sources."""

    groups: list[tuple[Messages, list[Messages]]]
    """Prompts with their completions, as `Encoder.encode_groups` takes them."""
    names: list[str]
    """The beginning of each prompt_id."""
    origin: str


def read_sample(config: Config, num_groups: int = NUM_GROUPS) -> Sample:
    """The first groups of every training source, in equal shares, through the readers and windows of ingest.

    Raises:
        UserError: A file cannot be read, or no training source holds a group.
    """
    sources = [source for source in config.sources if source.role == "train"]
    rows: list[dict[str, Any]] = []
    told = []
    for number, source in enumerate(sources):
        share = -(-(num_groups - len(rows)) // (len(sources) - number))
        found, num_rows, num_bad = _first_groups(source, config.ingest, share)
        rows += found
        bad = f", {num_bad} of {num_rows} rows unusable" if num_bad else ""
        told.append(f"{source.name}: {len(found)} groups{bad}")
    if not rows:
        raise UserError(f"sources: no training source holds a group to test with ({'; '.join(told)})")
    groups = [(row["prompt"], [completion["messages"] for completion in row["completions"]]) for row in rows]
    return Sample(groups, [row["prompt_id"].hex()[:12] for row in rows], "; ".join(told))


def _first_groups(source: Source, ingest: Ingest, num_groups: int) -> tuple[list[dict[str, Any]], int, int]:
    """(groups, rows read, rows quarantined)."""
    groups: list[dict[str, Any]] = []
    num_rows, num_bad = 0, 0
    for uri in (uri for path in source.paths for uri in list_files(path)):
        if len(groups) >= num_groups:
            break
        windows = ingest_windows(
            read_rows(uri, max_row_bytes=int(ingest.max_row_mib * 2**20)),
            file=redact(uri),
            format=source.format,
            options=source.options,
            rows_per_shard=min(READ_ROWS, ingest.rows_per_shard),
        )
        for window in windows:
            groups += window.groups.to_pylist()
            num_rows, num_bad = num_rows + window.num_rows, num_bad + window.num_quarantined
            if len(groups) >= num_groups:
                break
    return groups[:num_groups], num_rows, num_bad


# --------------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Subject:
    """A loaded model with the token ids it is tried on."""

    model: Any
    encoder: Encoder
    """Its tokenizer, with the template and the length limit of the run."""
    groups: list[EncodedGroup]
    is_reward: bool
    pad_token_id: int | None
    """What fills padded rows: a reward model's own pad token, else the tokenizer's, else 0 where nothing reads it."""
    cut: frozenset[Key] = frozenset()
    """Completions that lost tokens to the length limit."""
    token_budget: int = 0
    """Tokens of the engine's rows."""

    @property
    def tokenizer(self) -> Any:
        """The encoder's."""
        return self.encoder.tokenizer

    @property
    def route(self) -> Route:
        """How a run makes this model's rows."""
        return reward_route(self.model) if self.is_reward else logps_route(self.model, self.pad_token_id)

    @property
    def keys(self) -> list[Key]:
        """The completions that get a number."""
        return [
            (g, c) for g, group in enumerate(self.groups) for c, status in enumerate(group.status) if status == "ok"
        ]

    def sequence(self, key: Key) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, cut as its completion needs it, and of the response."""
        group = self.groups[key[0]]
        start = group.prompt_starts[key[1]] if group.prompt_starts else 0
        return group.prompt_tokens[start:], group.completion_tokens[key[1]]

    def length(self, key: Key) -> int:
        """Tokens of prompt and response."""
        return sum(map(len, self.sequence(key)))

    def only(self, keys: Collection[Key]) -> Subject:
        """The same with all other completions left out."""
        groups = [
            replace(group, status=["ok" if (g, c) in keys else "left_out" for c in range(len(group.status))])
            for g, group in enumerate(self.groups)
        ]
        return replace(self, groups=groups)


def selftest(config: Config, progress: Progress) -> list[ModelCheck]:
    """Try every model that a `causal_logps` or `reward_model` scorer names on the first groups of the data.

    Args:
        config: Of the run that is planned, checked.
        progress: Says what the sample is, and counts the ways of making rows.

    Returns:
        One check per scorer; models that the run itself makes are skipped. What is wrong with one model, its template
        included, is among its findings and does not keep the others from being checked.

    Raises:
        UserError: The data cannot be read, or there is none.
        PrefselError: A model does not fit into memory.
    """
    lineage = Lineage(config, Storage("."))  # pretrained models are found without a workspace
    sample = read_sample(config)
    progress.line(f"selftest: {len(sample.groups)} groups ({sample.origin})\n")
    scorers = [scorer for scorer in config.scorers if isinstance(scorer, CausalLogps | RewardModel)]
    return [_check_scorer(scorer, lineage, sample, progress) for scorer in scorers]


def _check_scorer(
    scorer: CausalLogps | RewardModel, lineage: Lineage, sample: Sample, progress: Progress
) -> ModelCheck:
    """Load the model of a scorer as the run would, and check it."""
    label = scorer_label(scorer)
    spec = next((model for model in lineage.config.models if model.name == scorer.model), None)
    if not isinstance(spec, PretrainedModel):
        return ModelCheck(label, scorer.kind, skipped="made by this run, checked when it is made")
    description = f"{spec.path}, {spec.dtype}"
    try:
        ref = lineage.model(spec.name)
        more: dict[str, Any] = {"revision": ref.revision, "trust_remote_code": spec.trust_remote_code}
        limits = {key: ref.settings[key] for key in ("template", "max_length", "truncation")}
        description += "".join(f", {key} {_short(value)}" for key, value in limits.items())
        tokenizer = load_tokenizer(ref.path, **more)
        encoder = Encoder(tokenizer, **limits)
        load = load_reward if isinstance(scorer, RewardModel) else load_causal
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(ref.path, dtype=spec.dtype, device=device, gpus_per_replica=spec.gpus_per_replica, **more)
        if isinstance(scorer, RewardModel) and scorer.heads and len(scorer.heads) != model.config.num_labels:
            raise invalid("heads", scorer.heads, f"{model.config.num_labels} names, one per output of {spec.path}")
        found = check_model(
            label,
            model,
            encoder,
            sample,
            is_reward=isinstance(scorer, RewardModel),
            is_bare=isinstance(scorer, CausalLogps) and scorer.unconditional,
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
    fills = [unwrapped(model).config.pad_token_id if is_reward else None, encoder.tokenizer.pad_token_id]
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


# -------------------------------------------------------------------------------------- what is seen without a forward


def template_findings(subject: Subject, sample: Sample) -> list[Finding]:
    """Completions that the template cannot share their prompt with.

    A run drops a few such completions and stops at more than half. A template that itself writes another prompt once
    an answer follows it fails here at the first one, a tokenizer that merges across the boundary does not.
    """
    encoder, statuses = subject.encoder, [group.status for group in subject.groups]
    bad = [(g, c) for g, row in enumerate(statuses) for c, status in enumerate(row) if status == "template_error"]
    if not bad:
        return []
    total = sum(map(len, statuses))
    unstable = next(filter(None, (_unstable(encoder, *sample.groups[g], c) for g, c in bad)), "")
    is_failure = bool(unstable) or 2 * len(bad) > total
    told = f"{len(bad)} of {total} completions cannot be told from their prompt{unstable}; {encoder.tolerated}"
    told += "" if is_failure else "; a run drops them as template_error"
    return [Finding("FAIL" if is_failure else "warn", "template", told, is_input=is_failure)]


def _unstable(encoder: Encoder, prompt: Messages, completions: Sequence[Messages], number: int) -> str:
    """How the template's text of a prompt changes when an answer follows; empty when it does not."""
    own = None if encoder.template in ("auto", "tokenizer") else encoder.template
    render = partial(encoder.tokenizer.apply_chat_template, chat_template=own, tokenize=False)
    try:
        asked = render(list(prompt), add_generation_prompt=True)
        whole = render([*prompt, *completions[number]], add_generation_prompt=False)
    except jinja2.TemplateError:  # the template refuses the messages, which the encoder has reported
        return ""
    if whole.startswith(asked):
        return ""
    at = next((i for i, (a, b) in enumerate(zip(asked, whole)) if a != b), min(len(asked), len(whole)))
    shown = [text[max(0, at - 12) : at + 24] for text in (asked, whole)]
    return f", because it is not prefix-stable: it writes …{shown[0]!r}… to ask, but …{shown[1]!r}… once answered"


def length_findings(subject: Subject, uncut: Sequence[EncodedGroup]) -> list[Finding]:
    """Whether the length limit leaves anything, and what it cuts."""
    statuses = [status for group in subject.groups for status in group.status]
    num_ok, num_long, limit = statuses.count("ok"), statuses.count("too_long"), subject.encoder.max_length
    if num_long and not num_ok:
        lengths = [len(whole.prompt_tokens) + len(tokens) for whole in uncut for tokens in whole.completion_tokens]
        told = f"got {limit}, but the shortest completion has {min(lengths)} tokens with its prompt; raise it"
        return [Finding("FAIL", "max_length", told, is_input=True)]
    found = []
    if 2 * num_long > len(statuses):
        told = f"{num_long} of {len(statuses)} completions are dropped as too_long at {limit} tokens"
        found.append(Finding("warn", "max_length", told))
    if subject.cut:
        is_right = subject.encoder.truncation == "right"
        lost = "their end and its end-of-turn" if is_right else "the beginning of their prompt"
        told = f"{len(subject.cut)} of {num_ok} scored completions lost {lost} at {limit} tokens"
        found.append(Finding("warn", "truncation", told))
    return found


def vocabulary_findings(subject: Subject) -> list[Finding]:
    """Whether every token of the tokenizer has a row of the embedding."""
    rows, size = unwrapped(subject.model).get_input_embeddings().weight.shape[0], len(subject.tokenizer)
    if size <= rows:
        return []
    first = subject.tokenizer.convert_ids_to_tokens(rows)
    told = f"the tokenizer has {size:,} tokens, the embedding {rows:,} rows, none for {first!r}; use the model's own"
    return [Finding("FAIL", "vocabulary", told, is_input=True)]


def text_findings(subject: Subject, sample: Sample) -> list[Finding]:
    """A doubled bos, answers that do not end, and control tokens that stand in the user's own text."""
    tokenizer, found = subject.tokenizer, []
    bos, control = tokenizer.bos_token_id, _control_tokens(tokenizer)
    if twice := sum(group.prompt_tokens[:2] == [bos, bos] for group in subject.groups):
        told = f"{twice} of {len(subject.groups)} prompts begin with two {tokenizer.bos_token!r}: one too many"
        found.append(Finding("warn", "bos twice", told))
    ends = [key for key in subject.keys if subject.encoder.truncation != "right" or key not in subject.cut]
    open_ended = [key for key in ends if not _is_closed(tokenizer, subject.sequence(key)[1], control)]
    if open_ended:
        told = f"{len(open_ended)} of {len(ends)} responses end in no control token: that they stop is not scored"
        found.append(Finding("warn", "end of turn", told))
    texts = sorted({m["content"] for prompt, rest in sample.groups for messages in (prompt, *rest) for m in messages})
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    hits = [hit for hit in (next((i for i in row if i in control), None) for row in ids) if hit is not None]
    if hits:
        token = tokenizer.convert_ids_to_tokens(hits[0])
        told = f"{len(hits)} of {len(texts)} messages hold text that becomes a control token, first {token!r}"
        found.append(Finding("warn", "control tokens", told))
    return found


def _control_tokens(tokenizer: Any) -> set[int]:
    """Special and added tokens; not the unknown one, which stands for text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}


def _is_closed(tokenizer: Any, response: Sequence[int], control: Collection[int]) -> bool:
    """Whether the last token that is not blank is a control token: ChatML ends a turn with one and a line break."""
    for token in reversed(response):
        if token in control:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def pad_findings(subject: Subject) -> list[Finding]:
    """What a pad token that is also the eos, or not the model's, does and does not do here."""
    tokenizer, found = subject.tokenizer, []
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if subject.is_reward:
        own = unwrapped(subject.model).config.pad_token_id
        if own is not None and own == eos_id:
            told = "the classifier reads the token before the last eos, as transformers does, alone and in batches"
            found.append(Finding("info", "pad = eos", told))
        if own is not None and pad_id not in (None, own):
            told = f"the model's pad token is {own}, the tokenizer's {pad_id}; rows here are padded with the model's"
            found.append(Finding("warn", "pad token", told))
        if subject.pad_token_id is None:
            told = "neither model nor tokenizer has one: padded rows hold one sequence"
            found.append(Finding("info", "pad token", told))
    elif pad_id is not None and pad_id == eos_id:
        responses = [subject.sequence(key)[1] for key in subject.keys]
        lost, total = sum(ids.count(pad_id) for ids in responses), sum(map(len, responses))
        told = f"all {total:,} response tokens are counted; a mask of `ids != pad` would lose {lost:,} of them"
        found.append(Finding("info", "pad = eos", told))
    return found


# --------------------------------------------------------------------------------------------- ways of making the rows


@dataclass(frozen=True)
class Path:
    """One way of making rows."""

    label: str
    compute: Callable[[Subject], Values]
    is_padded: bool


def paths(subject: Subject) -> list[Path]:
    """Every way that must give the reference's numbers."""
    is_padded = not subject.route.is_packed
    rows = "padded by length" if is_padded else "packed"
    engine = [("all groups together", together), ("reversed", in_reverse)]
    engine += [(f"{size} group{'s' * (size > 1)} a row", partial(grouped, size=size)) for size in BATCH_SIZES]
    found = [Path(f"{rows}, {what}", compute, is_padded) for what, compute in engine]
    sizes = BATCH_SIZES if subject.pad_token_id is not None else (1,)
    padded = [(f"padded, {n} sequence{'s' * (n > 1)}", partial(padded_unequal, size=n)) for n in sizes]
    return found + [Path(label, compute, True) for label, compute in padded]


def reference(subject: Subject) -> Values:
    """Every completion alone: the model's plain forward without padding, mask or packing, its own attention."""
    found: Values = {}
    with torch.inference_mode(), own_attention(subject.model):
        for key in subject.keys:
            prompt, response = subject.sequence(key)
            ids_1T = torch.tensor([prompt + response], device=model_device(subject.model))
            output = subject.model(input_ids=ids_1T).logits[0]
            found[key] = output.tolist() if subject.is_reward else [_summed(output, len(prompt), response)]
    return found


def _summed(logits_TV: Tensor, start: int, response: Sequence[int]) -> float:
    """Log-prob of a response in fp64, 256 tokens at a time."""
    total = 0.0
    for first in range(0, len(response), 256):
        targets_R = torch.tensor(response[first : first + 256], device=logits_TV.device)
        rows_RV = logits_TV[start - 1 + first :][: len(targets_R)].double()
        total += float((rows_RV.gather(1, targets_R[:, None])[:, 0] - rows_RV.logsumexp(1)).sum())
    return total


def together(subject: Subject) -> Values:
    """Through the engine of a run, which isolates what the model cannot score: it is NaN here."""
    engine = Engine(subject.model, subject.encoder, subject.route, subject.token_budget)
    found, _ = engine.score_window(subject.groups, defaultdict(float))
    return {key: found.get(key, [math.nan]) for key in subject.keys}


def in_reverse(subject: Subject) -> Values:
    """Groups from the last to the first, and so the completions of each."""
    turned = [
        replace(
            group,
            completion_tokens=group.completion_tokens[::-1],
            status=group.status[::-1],
            prompt_starts=group.prompt_starts[::-1],
        )
        for group in reversed(subject.groups)
    ]
    values = _forward(subject, subject.route.rows(turned, subject.token_budget), subject.route.forward)
    return {(len(turned) - 1 - g, len(turned[g].status) - 1 - c): numbers for (g, c), numbers in values.items()}


def grouped(subject: Subject, size: int) -> Values:
    """Few groups at a time."""
    found: Values = {}
    for first in range(0, len(subject.groups), size):
        rows = subject.route.rows(subject.groups[first : first + size], subject.token_budget)
        values = _forward(subject, rows, subject.route.forward)
        found |= {(first + g, c): numbers for (g, c), numbers in values.items()}
    return found


def padded_unequal(subject: Subject, size: int) -> Values:
    """Rows of `size` sequences, long ones beside short ones, padded and called as transformers would be."""
    config = unwrapped(subject.model).config.get_text_config()
    most_tokens = MOST_TOKENS
    if not subject.is_reward:
        most_tokens = LOGITS_BYTES // (config.vocab_size * subject.model.dtype.itemsize)
    keys = [key for key in subject.keys if size == 1 or subject.length(key) * size <= most_tokens]
    keys.sort(key=subject.length)
    mixed = [keys[at // 2] if at % 2 == 0 else keys[-1 - at // 2] for at in range(len(keys))]
    found: Values = {}
    for first in range(0, len(mixed), size):
        beside = set(mixed[first : first + size])
        budget = size * max(map(subject.length, beside))
        found |= _padded(subject, pad(subject.only(beside).groups, budget, pad_token_id=subject.pad_token_id))
    return found


def _padded(subject: Subject, rows: Iterable[PaddedBatch]) -> Values:
    forward = partial(padded_rewards if subject.is_reward else padded_logps, subject.model)
    with pad_token(subject.model, subject.pad_token_id):
        return _forward(subject, rows, forward)


def _forward(subject: Subject, rows: Iterable[Any], forward: Callable[[Any], Tensor]) -> Values:
    found: Values = {}
    with torch.inference_mode():
        for row in rows:
            output = forward(row.to(model_device(subject.model)))
            found |= zip(row.completion_index, output.reshape(len(row.completion_index), -1).tolist())
    return found


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Attention that transformers ships, in place of ours."""
    model = unwrapped(model)
    before = model.config._attn_implementation
    if before == IMPLEMENTATION:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def pad_token(model: Any, token: int | None) -> Iterator[None]:
    """Another pad token in the model's configuration, as a script sets it before it makes batches."""
    config = unwrapped(model).config.get_text_config()
    before = config.pad_token_id
    config.pad_token_id = token
    try:
        yield
    finally:
        config.pad_token_id = before


@contextmanager
def precision(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The same weights in a wider dtype; afterwards every tensor is what it was, for widening loses nothing."""
    before = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    try:
        model.to(dtype)
        yield
    finally:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(before[name])


# ----------------------------------------------------------------------------------------------- comparison and causes


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
            cause = diagnose(Case(subject, path, failed[path.label], expected))
            causes.setdefault(cause.cause, cause)
    return comparisons, list(causes.values())


def diagnose(case: Case) -> Finding:
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


def not_deterministic(case: Case) -> Cause:
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


def pad_in_text(case: Case) -> Cause:
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


def mask_ignored(case: Case) -> Cause:
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
    masked = _padded(subject, [replace(row, input_ids_BT=ids, attention_mask_BT=mask)])
    alone = compare("", subject, masked, case.expected)
    if alone.is_ok:
        return None
    unmasked = _padded(subject, [replace(row, input_ids_BT=ids, attention_mask_BT=torch.ones_like(mask))])
    is_same = compare("", subject, masked, case.expected | unmasked).is_ok
    told = "as much as without attention_mask: the model ignores it" if is_same else "attention_mask does not hide all"
    return "mask", f"{width} pad tokens after one sequence alone change it by {alone.difference:.1e}: {told}"


def truncated_only(case: Case) -> Cause:
    """Are only truncated completions off, and do all agree without them?"""
    subject, bad = case.subject, case.failed.disagreeing
    whole = set(subject.keys) - subject.cut
    if not bad <= subject.cut or not whole or not case.again(subject.only(whole)).is_ok:
        return None
    return "truncation", (
        f"{_off(case)}, all of them truncated; the other {len(whole)} agree without them: the model does not hold at "
        "max_length; lower it, or drop what is longer"
    )


def neighbours_matter(case: Case) -> Cause:
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
    *(not_finite, not_deterministic, dtype_noise, pad_in_text, mask_ignored, truncated_only, neighbours_matter),
)


def _off(case: Case) -> str:
    failed = case.failed
    return f"{len(failed.disagreeing)} completions differ by up to {failed.difference:.1e} ({failed.check})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
