"""`prefsel init`: what was seen in data files → a commented configuration that runs as it is.

Numbers that came with the data are selected by; without any, small models are made on the spot, so that the whole job
can be seen to work before real models are put in.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefsel.config import Ingest
from prefsel.config.file import parse_config
from prefsel.config.yaml_text import read_yaml
from prefsel.errors import UserError
from prefsel.ingest.sniff import FieldUse, Sniffed, sniff
from prefsel.reasons import QUARANTINE

WHOLE = ("overall", "score", "fine_grained")
"""Numbers that judge a completion as a whole, the best first; every other one is taken for an aspect."""
MIN_SHARE = 0.5
"""A number that fewer of the pairs have is not selected by: pairs without it would be dropped."""
MIN_PROMPTS = 40
"""Fewer do not make a tokenizer, a policy and a reward model and leave pairs to select from."""
RATIO = 0.3
MIN_SHARD_ROWS, MAX_SHARD_ROWS = 64, 4096
NUM_SHARDS = 8
"""Shards that a small corpus is cut into: several actors can work, and a bar moves."""


@dataclass(frozen=True)
class Draft:
    """A configuration and why it is so."""

    name: str
    text: str
    """YAML, with comments."""
    seen: list[str]
    """What was seen in the files, line by line."""


def draft(paths: Sequence[str], *, name: str | None = None, file: str | None = None) -> Draft:
    """Look at the files and write a configuration for them.

    Args:
        paths: Files, folders, globs or URIs; each becomes a source.
        name: Of the run; default: after the first path.
        file: Where the configuration will stand, for its own first lines; default: after the run.

    Raises:
        UserError: nothing readable at one of them, or no pair in any.
    """
    found = {unique: sniff(absolute(path)) for unique, path in zip(_source_names(paths), paths)}
    seen = [line for source, one in found.items() for line in lines(source, one)]
    num_pairs = sum(one.num_pairs for one in found.values())
    if not num_pairs:
        raise UserError("init: no pair of completions in what was read\n" + "\n".join(f"  {x}" for x in seen))
    name = name or next(iter(found))
    numbers = _summed(one.numbers for one in found.values())
    labelled = _summed(one.aspects for one in found.values())
    frequent = [number for number, count in numbers.items() if count >= MIN_SHARE * num_pairs]
    whole = next((one for one in WHOLE if one in frequent), None)
    aspects = [one for one in numbers if one not in WHOLE and (one in frequent or one in labelled)]
    if whole is None and len(aspects) == 1:
        whole, aspects = aspects[0], []
    num_prompts = sum(one.num_prompts for one in found.values())
    text = _template().render(
        name=name,
        file=shlex.quote(file or f"{name}.yaml"),
        seen=seen,
        sources=found,
        quarantine=_allowed(list(found.values())),
        default_quarantine=Ingest().max_quarantine_fraction,
        rows_per_shard=_shard_rows(list(found.values())),
        whole=whole,
        aspects=aspects if len(aspects) > 1 else [],
        own_aspect=bool(labelled),
        makes_models=whole is None and len(aspects) < 2 and num_prompts >= MIN_PROMPTS,
        # Few pairs, of which a part is held out and made models of, must still leave one to keep.
        ratio=RATIO if num_pairs >= 40 else 0.5,
        holdout=0.05 if num_prompts >= MIN_PROMPTS else 0.0,
    )
    parse_config(read_yaml(text, "draft"))  # a name that the user gave may be none
    return Draft(name, text, seen)


def absolute(path: str) -> str:
    """A local path that means the same from every directory; URIs and names of data sets as they are."""
    if path.startswith("datasets:"):
        inside = Path(path.removeprefix("datasets:")).expanduser()
        return f"datasets:{inside.absolute()}" if inside.exists() else path
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _source_names(paths: Sequence[str]) -> list[str]:
    """A valid name for each path, after its last part."""
    names: list[str] = []
    for path in paths:
        last = path.rstrip("/").rsplit("/", 1)[-1].removeprefix("datasets:").split(".")[0]
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-_")[:40] or "source"
        taken = sum(re.fullmatch(re.escape(name) + r"(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{taken + 1}" if taken else name)
    return names


def _summed(many: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in many:
        total.update(one)
    return dict(total)


def _allowed(found: Sequence[Sniffed]) -> float | None:
    """The share of quarantined rows to allow, where the default would end the run; rounded up to whole percents."""
    bad = sum(sum(one.reasons.values()) for one in found)
    share = bad / sum(one.num_rows for one in found)
    return None if share <= Ingest().max_quarantine_fraction else min(1.0, math.ceil(100 * share + 1) / 100)


def _shard_rows(found: Sequence[Sniffed]) -> int:
    if not all(one.is_all for one in found):
        return MAX_SHARD_ROWS
    rows = -(-sum(one.num_rows for one in found) // NUM_SHARDS)
    return min(max(rows, MIN_SHARD_ROWS), MAX_SHARD_ROWS)


def _template() -> Any:
    environment = Environment(  # nosec B701 # it writes YAML
        loader=PackageLoader("prefsel", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template("draft.yaml.j2")


def lines(name: str, one: Sniffed) -> Iterator[str]:
    """What was seen in one source."""
    extent = "all" if one.is_all else "the first"
    yield f"{name}: {one.format}; {extent} {one.num_rows:,} rows of {one.num_files:,} file(s) {one.path}"
    yield f"  {one.num_prompts:,} prompts, {one.num_completions:,} completions, {one.num_pairs:,} labelled pairs"
    odd = {"rows that repeat others": one.num_duplicate, "ties": one.num_ties}
    odd["pairs that are also there the other way round"] = one.num_contradictions
    if any(odd.values()):
        yield "  " + ", ".join(f"{count:,} {what}" for what, count in odd.items() if count)
    for reason, count in one.reasons.items():
        yield f"  {count:,} rows cannot be used: {reason} ({QUARANTINE[reason]})"
    if one.characters:
        sizes = [f"{side} {half:,} ({most:,}; {top:,})" for side, (half, most, top) in one.characters.items()]
        told = f"chosen is the longer one in {one.longer_share:.0%}"
        yield f"  characters, median (95 %; largest): {', '.join(sizes)}; {told}"
    if one.aspects:
        yield "  pairs by aspect: " + ", ".join(f"{aspect} {count:,}" for aspect, count in one.aspects.items())
    for number, count in one.numbers.items():
        yield f"  number {number!r} of both completions in {count / one.num_pairs:.0%} of the pairs"
    for use in ("read", "ignored"):
        fields = [_field_text(field) for field in one.fields if field.use == use]
        if fields:
            yield f"  fields {'read' if use == 'read' else 'that nothing reads'}: {', '.join(fields)}"


def _field_text(field: FieldUse) -> str:
    return field.name if field.present == field.of else f"{field.name} (missing in {1 - field.present / field.of:.1%})"
