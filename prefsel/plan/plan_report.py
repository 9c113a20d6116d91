"""The document of `prefsel plan` as text: a few tables of at most 100 columns, and sentences."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from prefsel.progress import clock

WIDTH = 100
Document = Mapping[str, Any]


def lines(plan: Document) -> Iterator[str]:
    """The whole report."""
    yield from _corpus(plan["corpus"])
    yield ""
    yield from _nodes(plan["nodes"])
    if any(not one["missing"] for one in plan["work"]):
        yield from _work(plan["work"])
        yield from _gpus(plan["gpus"])
    for sentence in _sentences(plan):
        yield from textwrap.wrap(sentence, WIDTH, subsequent_indent=" " * 10, break_on_hyphens=False)


def _sentences(plan: Document) -> Iterator[str]:
    if plan["seconds_here"] is not None:
        told = clock(plan["seconds_here"])
        yield f"here      about {told} for what is left, starting Ray and loading models apart"
    yield from _storage(plan["storage"])
    for one in plan["break_even"]:
        told = f"s {one['s']:.2f}, reference {one['s_ref']:.2f}, τ {one['tau']:g}, E {one['epochs']}"
        yield f"{one['training']:<9} {one['sentence']} ({told})"
    for why in dict.fromkeys(plan["missing"].values()):
        nodes = [node for node, reason in plan["missing"].items() if reason == why]
        yield f"not estimated: {', '.join(nodes)}: {why}"
    for note in plan["notes"]:
        yield f"note: {note}"


def _corpus(corpus: Document) -> Iterator[str]:
    how = (
        "all of it read and tokenised"
        if corpus["is_all"]
        else (
            f"{corpus['windows_read']:,} windows read, {corpus['groups_tokenised']:,} of their "
            f"{corpus['groups_read']:,} groups tokenised; ranges are 95 % intervals"
        )
    )
    yield f"corpus    {_bytes(corpus['bytes'])}: {how}"
    parts = (f"{_count(corpus[name])} {called}" for name, called in _COUNTED.items())
    yield f"          {', '.join(parts)}"


_COUNTED = {"groups": "prompts", "completions": "completions", "pairs": "pairs", "eligible_pairs": "of them selectable"}


def _nodes(nodes: Sequence[Document]) -> Iterator[str]:
    yield from _table(
        ["node", "", "why"],
        [[one["node"], one["state"], one["why"]] for one in nodes if one["state"] != "there"],
        "Nodes to make",
    )
    there = [one["node"] for one in nodes if one["state"] == "there"]
    if there:
        yield from textwrap.wrap(f"there already, {len(there)}: {', '.join(there)}", WIDTH)


def _work(rows: Sequence[Document]) -> Iterator[str]:
    found = []
    for one in rows:
        if one["missing"]:
            continue
        memory = one["memory_gib"]["total"]
        gpus = f" x {one['gpus']}" if one["gpus"] > 1 else ""
        found.append(
            [
                one["node"],
                "-" if not one["left"] else f"{one['left']:.0%}",
                _number(one["items"]),
                _number(one["tokens"]),
                _number(one["computed_flops"] if one["left"] else one["flops"]),
                f"{memory:,.1f}{gpus}",
                one["smallest_gpu"] or "none",
            ]
        )
    if found:
        columns = ["node", "left", "rows", "tokens", "FLOPs", "GiB a GPU", "smallest GPU"]
        yield from _table(columns, found, "What runs models", right={1, 2, 3, 4, 5})


def _gpus(rows: Sequence[Document]) -> Iterator[str]:
    has_price, has_wall = any(one["usd"] for one in rows), any(one["wall_s"] for one in rows)
    columns = ["GPU", "GiB", "scoring h", "training h", "GPU-hours", *(["wall"] if has_wall else [])]
    columns += [*(["USD"] if has_price else []), "efficiency", "does not hold"]
    found = []
    for one in rows:
        hours = one["gpu_hours"]
        row = [
            one["name"],
            f"{one['memory_gib']:g}",
            *(_number(hours[key]) for key in ("scoring", "training", "total")),
        ]
        row += [clock(one["wall_s"]["value"])] if has_wall else []
        row += [_number(one["usd"]) if one["usd"] else ""] if has_price else []
        too_small = one["too_small_for"]
        row += ["measured" if one["is_measured"] else "stated", ", ".join(too_small)]
        found.append(row)
    yield from _table(columns, found, "GPU-hours by kind of GPU", right={1, 2, 3, 4})


def _storage(rows: Sequence[Document]) -> Iterator[str]:
    parts = [f"{one['artifact']} {_bytes(one['bytes']['value'])}" for one in rows if one["bytes"]["value"]]
    if parts:
        yield f"storage   {_bytes(sum(one['bytes']['value'] for one in rows))}: {', '.join(parts)}"


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, right: set[int] | None = None
) -> Iterator[str]:
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number in (right or set()) else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False).print(table)
    yield from (line.rstrip() for line in text.getvalue().splitlines())
    yield ""


def _count(estimate: Document) -> str:
    return f"{estimate['value']:,.0f}" if estimate["low"] == estimate["high"] else _number(estimate)


def _number(estimate: Document) -> str:
    """A number with how far its interval reaches: `1.23e+18 ±4 %`, or both ends where they lie unevenly."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if low == high or not value:
        return _short(value)
    up, down = (high - value) / value, (value - low) / value
    return (
        f"{_short(value)} ±{100 * up:.0f} %"
        if abs(up - down) < 0.005
        else f"{_short(value)} ({_short(low)}–{_short(high)})"
    )


def _short(value: float) -> str:
    if value and (value >= 1e7 or value < 1e-3):
        return f"{value:.2e}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
