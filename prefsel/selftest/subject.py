"""What a self-test is about, and what it says: the first groups of the data, a loaded model, findings and tables.

sources ─ readers, windows ─▶ Sample ─ template ─▶ Subject ─▶ … ─▶ ModelCheck ─ lines ─▶ text
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prefsel.config import Config, Ingest, Source
from prefsel.display import redact
from prefsel.errors import PrefselError, UserError
from prefsel.ingest.readers import list_files, read_rows
from prefsel.ingest.windows import ingest_windows
from prefsel.models.chat import EncodedGroup, Encoder
from prefsel.models.logps import Route, logps_route
from prefsel.models.reward import reward_route
from prefsel.models.writer import Messages
from prefsel.score.engine import Key

NUM_GROUPS = 32
READ_ROWS = 256
"""Rows read at a time: the first groups must not cost a window of thousands."""

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


# ---------------------------------------------------------------------------------------------------- the loaded model


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
