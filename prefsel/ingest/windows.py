"""Rows of one file → windows: the tables of one shard each, with every row accounted for.

Inside a window equal prompts are one group row and equal completions are stored once; nothing is merged across windows,
so memory is one window whatever the file's length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any

import pyarrow as pa

from prefsel.config import FieldMap, FormatOptions
from prefsel.errors import UserError, invalid
from prefsel.ingest.carried import carried_fields
from prefsel.ingest.example import Adapter, Completion, Example, Format, PairUp, Preference
from prefsel.ingest.field_use import FieldUse
from prefsel.ingest.formats import FORMATS, detect, mixed, prompt_adapter
from prefsel.ingest.identity import ID_BYTES, completion_id, pair_id, prompt_id
from prefsel.ingest.mapping import mapped
from prefsel.ingest.row_error import RowError
from prefsel.ingest.rows import BadRow, RawRow
from prefsel.ingest.window_tables import Group, Pair, groups_table, pairs_table, quarantine_table
from prefsel.plugins.registry import code_of

DETECT_ROWS = 100
"""At least so many rows, in whole windows, are tried before an automatic format is given up."""
PROMPTS_OF = "prompts of "
MAP = "map"
"""What a window's format is called that was read by the map of its source."""
MAX_EXAMPLE = 200
"""Characters of a quoted row's error."""
MAX_RUN = 1024
"""A window of rows with one response each goes on for so many rows more, to hold a prompt whole."""
WINDOW_BYTES = 256 << 20
"""A window of fewer rows ends after so many raw bytes: rows near the size limit would fill the memory otherwise."""


@dataclass(frozen=True)
class Window:
    """The tables of one shard; `num_rows == num_accepted + num_quarantined + num_duplicate`."""

    groups: pa.Table
    pairs: pa.Table
    quarantine: pa.Table
    num_rows: int
    num_accepted: int
    """Rows that added a prompt, completion, pair or rating to the window."""
    num_quarantined: int
    num_duplicate: int
    """Rows that added nothing."""
    num_ties: int
    """Preferences of accepted rows that are none: equal ratings, or labelled as ties."""
    num_rating_conflicts: int
    """Ratings that came again with another value; the first is kept."""
    num_absent: int
    """Ratings out of their scale, taken as absent."""
    num_opposed: int
    """Two completions that one aspect prefers one way and another aspect the other way."""
    num_unpaired: int
    """Prompts without a pair, where rows hold one response each: theirs do not differ in label or rating."""
    reasons: dict[str, int]
    """Quarantined rows by reason."""
    examples: dict[str, str]
    """The first row of each reason: its number and what was wrong with it."""
    fields: dict[str, dict[str, int]]
    """Accepted rows in which each field was `used`, `kept` or `ignored`; empty fields do not count."""
    digest: str
    """blake2b-128 over the window's raw bytes, the format and its options, 32 hex digits. It depends on nothing outside
    the window, so two equal windows have equal digests."""
    format: str
    """The format the rows were read as; `prompts` for prompts only; `unknown` when no row could be read, none named."""


@dataclass(frozen=True)
class _Settings:
    """What all windows of a file have in common."""

    file: str
    options: FormatOptions
    rows_per_shard: int
    fields: FieldMap | None
    carry: tuple[str, ...]


@dataclass
class _Open:
    """A window being filled."""

    hash: Any
    fields: FieldUse
    groups: dict[bytes, Group] = field(default_factory=dict)
    pairs: dict[bytes, Pair] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    num_rows: int = 0
    num_bytes: int = 0
    num_accepted: int = 0
    num_ties: int = 0
    num_rating_conflicts: int = 0
    num_absent: int = 0
    last_prompt: bytes = b""
    """Of the last row that could be read."""


def ingest_windows(
    rows: Iterator[RawRow | BadRow],
    *,
    file: str,
    format: str | None,
    options: FormatOptions,
    rows_per_shard: int,
    prompts_only: bool = False,
    fields: FieldMap | None = None,
    carry: Sequence[str] = (),
) -> Iterator[Window]:
    """Cut the rows of one file into windows of `rows_per_shard` rows and make each one's tables.

    A window depends on its own rows only (and on the format), so appending rows to a file leaves all windows but the
    last as they were. A file without rows is one empty window.

    Args:
        rows: as `read_rows` yields them.
        file: what provenance calls the file.
        format: a key of `FORMATS`, or None or "auto": that of the first row that looks like one.
        options: how rows with several completions become pairs.
        rows_per_shard: input rows per window, at least 1.
        fields: which field is what, instead of a format.
        prompts_only: make groups without completions and no pairs, from rows of which only the prompt counts.
        carry: paths of the fields that go along with a row's pairs; of a pair that several rows give, those of the
            first, and where rows hold one response each, those of the first row of the prompt.

    Raises:
        UserError: an unknown format; or, from the iterator, readable rows of which none among the first looks like one.
    """
    if rows_per_shard < 1:
        raise invalid("rows_per_shard", rows_per_shard, "at least 1")
    if format not in (None, "auto", *FORMATS):
        raise invalid("format", format, ["auto", *FORMATS])
    named = None if format == "auto" else format
    settings = _Settings(file, options, rows_per_shard, fields, () if prompts_only else tuple(carry))
    if fields is not None and not prompts_only:
        return _windows(iter(rows), settings, MAP, mapped(MAP, fields))
    if prompts_only:
        adapt = prompt_adapter(named, fields)
        return _detected(iter(rows), settings, lambda value: (_prompts_name(adapt, value, settings, named), adapt))
    if named is None:
        return _detected(iter(rows), settings, _adapter_of)
    return _windows(iter(rows), settings, named, FORMATS[named])


def _adapter_of(value: dict[str, Any]) -> tuple[str, Adapter]:
    name = detect(value)
    return name, mixed(name)


def _prompts_name(adapt: Adapter, value: Mapping[str, Any], settings: _Settings, named: str | None) -> str:
    try:
        adapt(value, settings.options)
    except RowError as error:
        raise UserError(f"no prompt: {error.detail}") from error
    return f"{PROMPTS_OF}{named}" if named else "prompts"


AdapterOf = Callable[[dict[str, Any]], tuple[str, Adapter]]


def _detected(rows: Iterator[RawRow | BadRow], settings: _Settings, adapter_of: AdapterOf) -> Iterator[Window]:
    """The windows of rows whose format is that of the first row that has one."""
    is_first = True
    while True:
        seen, found = _look_ahead(rows, settings, adapter_of)
        if found is not None:
            yield from _windows(chain(seen, rows), settings, *found)
            return
        if seen or is_first:
            yield from _windows(iter(seen), settings, "unknown", _never)
        if not seen:
            return
        is_first = False


def _look_ahead(
    rows: Iterator[RawRow | BadRow], settings: _Settings, adapter_of: AdapterOf
) -> tuple[list[RawRow | BadRow], tuple[str, Adapter] | None]:
    """The rows up to the first that has a format, and that format; None when there are only bad ones.

    It stops after some whole windows: a file that begins with a million bad rows is still read in flat memory.
    """
    limit = settings.rows_per_shard * -(-DETECT_ROWS // settings.rows_per_shard)
    seen: list[RawRow | BadRow] = []
    num_bytes = 0
    refusal: UserError | None = None
    for row in rows:
        seen.append(row)
        if isinstance(row, RawRow):
            try:
                return seen, adapter_of(row.value)
            except UserError as error:
                refusal = refusal or UserError(f"{settings.file}, row {row.row}: {error}")
        num_bytes += len(row.raw)
        if len(seen) == limit or num_bytes >= WINDOW_BYTES:
            break
    if refusal is not None:
        raise refusal
    return seen, None


def _never(value: Mapping[str, Any], options: FormatOptions) -> Example:
    raise AssertionError("a readable row, yet no format")


def _windows(rows: Iterator[RawRow | BadRow], settings: _Settings, name: str, adapt: Adapter) -> Iterator[Window]:
    code = code_of("formats", name.removeprefix(PROMPTS_OF))
    mapped_by = [] if settings.fields is None else [settings.fields.model_dump()]
    carried = [{"carry": settings.carry}] if settings.carry else []
    named = [name, settings.options.identity, *mapped_by, *code.values(), *carried]
    salt = json.dumps(named, sort_keys=True).encode()
    is_first = True
    window = _opened(salt, adapt, settings)
    for row in rows:
        is_full = window.num_rows >= settings.rows_per_shard or window.num_bytes >= WINDOW_BYTES
        if is_full and not _continues(window, row, adapt, settings):
            yield _closed(window, settings, name, adapt)
            is_first = False
            window = _opened(salt, adapt, settings)
        try:
            _take(window, row, adapt, settings)
        except Exception as error:  # of a format from elsewhere
            error.add_note(f"{settings.file}, row {row.row}")
            raise
    if window.num_rows or is_first:
        yield _closed(window, settings, name, adapt)


def _opened(salt: bytes, adapt: Adapter, settings: _Settings) -> _Open:
    return _Open(blake2b(salt, digest_size=ID_BYTES), FieldUse(adapt, settings.options, settings.carry))


def _continues(window: _Open, row: RawRow | BadRow, adapt: Adapter, settings: _Settings) -> bool:
    """Whether a row belongs to the prompt that a full window ends with, where rows hold one response each."""
    is_long = window.num_rows >= settings.rows_per_shard + MAX_RUN
    if not isinstance(adapt, Format) or adapt.pair_up is None or is_long or not isinstance(row, RawRow):
        return False
    try:
        found = adapt(row.value, settings.options)
    except RowError:
        return False
    return isinstance(found, Example) and prompt_id(found.prompt) == window.last_prompt


def _take(window: _Open, row: RawRow | BadRow, adapt: Adapter, settings: _Settings) -> None:
    window.num_rows += 1
    window.num_bytes += len(row.raw)
    # With both lengths before them, no two different sequences of rows hash the same bytes.
    tag = json.dumps([row.reason, row.detail]).encode() if isinstance(row, BadRow) else b""
    window.hash.update(len(tag).to_bytes(8, "little") + len(row.raw).to_bytes(8, "little") + tag)
    window.hash.update(row.raw)
    if isinstance(row, BadRow):
        window.bad.append(row)
        return
    try:
        found = adapt(row.value, settings.options)
        examples = [found] if isinstance(found, Example) else found
        carried = carried_fields(row.value, settings.carry)
        identified = [(one, *_ids(one)) for one in examples]
    except RowError as error:
        window.bad.append(BadRow(row.row, row.byte_position, row.raw, error.reason, error.detail))
    else:
        window.last_prompt = identified[-1][1] if identified else b""
        new = [example for example, prompt, ids in identified if _merge(window, example, prompt, ids, row.row, carried)]
        window.num_accepted += bool(new)
        window.num_ties += sum(example.ties for example in new)
        window.fields.count(row.value)
        window.num_absent += sum(example.absent for example in new)


def _ids(example: Example) -> tuple[bytes, list[bytes]]:
    prompt = prompt_id(example.prompt)
    return prompt, [completion_id(prompt, completion.messages) for completion in example.completions]


def _merge(
    window: _Open, example: Example, prompt: bytes, ids: list[bytes], row: int, carried: tuple[tuple[str, str], ...]
) -> bool:
    """Put an example into the window; whether it added anything."""
    group = window.groups.get(prompt)
    is_new = group is None
    if group is None:
        group = window.groups[prompt] = Group(prompt, example.prompt, row, carried)
    for one, completion in zip(ids, example.completions):
        place = group.places.setdefault(one, len(group.messages))
        if place == len(group.messages):
            group.messages.append(completion.messages)
            group.ratings.append(dict(completion.ratings))
            is_new = True
            continue
        ratings = group.ratings[place]
        for name, rating in completion.ratings.items():
            is_new |= name not in ratings
            window.num_rating_conflicts += ratings.setdefault(name, rating) != rating
    for preference in example.preferences:
        sides = ids[preference.chosen], ids[preference.rejected]
        is_new |= _add_pair(window, group, *sides, preference, row, carried)
    return is_new


def _add_pair(
    window: _Open,
    group: Group,
    chosen: bytes,
    rejected: bytes,
    told: Preference,
    row: int,
    carried: tuple[tuple[str, str], ...],
) -> bool:
    """Put a pair into the window; whether it was not there."""
    prompt = group.prompt_id
    one = pair_id(prompt, chosen, rejected, told.aspect)
    if one in window.pairs:
        return False
    mirror = pair_id(prompt, rejected, chosen, told.aspect)
    places = group.places[chosen], group.places[rejected]
    window.pairs[one] = Pair(one, mirror, prompt, *places, told.aspect, told.margin, row, carried)
    return True


def _pair_up(window: _Open, pair_up: PairUp, options: FormatOptions) -> None:
    """The pairs among the responses that the window's rows gave to each prompt."""
    for group in window.groups.values():
        ids = list(group.places)
        completions = [Completion(*one) for one in zip(group.messages, group.ratings)]
        preferences, ties = pair_up(group.prompt, completions, options)
        window.num_ties += ties
        for one in preferences:
            _add_pair(window, group, ids[one.chosen], ids[one.rejected], one, group.row, group.carried)


def _num_opposed(pairs: Iterable[Pair]) -> int:
    ways: dict[tuple[bytes, int, int], set[str | None]] = {}
    for one in pairs:
        ways.setdefault((one.prompt_id, one.chosen, one.rejected), set()).add(one.aspect)
    return sum(
        chosen < rejected and len(aspects | ways.get((prompt, rejected, chosen), set())) > 1
        for (prompt, chosen, rejected), aspects in ways.items()
        if (prompt, rejected, chosen) in ways
    )


def shortened(text: str) -> str:
    """A text of one line that fits into a message."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_EXAMPLE else f"{flat[: MAX_EXAMPLE - 1]}…"


def _closed(window: _Open, settings: _Settings, name: str, adapt: Adapter) -> Window:
    file = settings.file
    is_paired_up = False
    if isinstance(adapt, Format) and adapt.pair_up is not None:
        is_paired_up = True
        _pair_up(window, adapt.pair_up, settings.options)
    reasons: dict[str, int] = {}
    examples: dict[str, str] = {}
    for row in window.bad:
        reasons[row.reason] = reasons.get(row.reason, 0) + 1
        examples.setdefault(row.reason, f"row {row.row}: {shortened(row.detail)}")
    return Window(
        groups=groups_table(list(window.groups.values())),
        pairs=pairs_table(list(window.pairs.values()), has_carried=bool(settings.carry)),
        quarantine=quarantine_table(window.bad, file),
        num_rows=window.num_rows,
        num_accepted=window.num_accepted,
        num_quarantined=len(window.bad),
        num_duplicate=window.num_rows - window.num_accepted - len(window.bad),
        num_ties=window.num_ties,
        num_rating_conflicts=window.num_rating_conflicts,
        num_absent=window.num_absent,
        num_opposed=_num_opposed(window.pairs.values()),
        num_unpaired=len(window.groups.keys() - {one.prompt_id for one in window.pairs.values()})
        if is_paired_up
        else 0,
        reasons=reasons,
        examples=examples,
        fields=window.fields.totals(),
        digest=window.hash.hexdigest(),
        format=name,
    )
