"""A run's record → rows a person reads: cells as text, numbers to the right, what is absent as –.

Every function takes parts of the dictionary that `page.render` documents, any key of which may be missing. Cells are
plain text; escaping is the template's work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from prefsel.reasons import meaning
from prefsel.report.formatting import (
    ABSENT,
    aligned,
    cell,
    duration,
    exact,
    is_number,
    number,
    one_decimal,
    percent,
    plain,
    signed,
    size,
    text_of,
)

STEPS = {
    "ingest": "Ingest",
    "eligible": "Eligibility",
    "prompts": "Prompts",
    "generate": "Answers",
    "pair": "Pairs of answers",
    "scratch": "Models made here",
    "reward": "Reward models",
    "score": "Scoring",
    "tangent": "Tangents",
    "metric": "Metric",
    "fuse": "Fused scores",
    "select": "Selection",
    "holdout": "Held-out pairs",
    "train": "Training",
    "evaluate": "Evaluation",
}
"""Stages in the order of the flow."""
LOOKS_NUMERIC = re.compile(r"[+−–-]?[\d.,]+( ?(%|±|×|[a-zA-Z/]{1,8}\b)[ \d.,%]*)?|–")


@dataclass(frozen=True)
class Table:
    """Cells of text under their titles."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kinds: Sequence[str]
    """Per column: `text`, `num` (to the right), `mono` (hashes, ids), `bar` (a share from 0 to 1), `verdict`."""
    title: str = ""
    note: str = ""


def table(columns: Mapping[str, str], rows: Iterable[Sequence[Any]], *, title: str = "", note: str = "") -> Table:
    """A table of the given title → kind, without the columns that are absent in every row."""
    made = [list(row) for row in rows]
    used = [place for place in range(len(columns)) if place == 0 or any(row[place] != ABSENT for row in made)]
    titles, kinds = list(columns), list(columns.values())
    cells = [[row[place] for place in used] for row in made]
    return Table([titles[place] for place in used], cells, [kinds[place] for place in used], title, note)


# ------------------------------------------------------------------------------------------------------- stages


def carried(stage: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> set[str]:
    """Reasons a metric repeats: pairs that eligibility had already dropped, counted again because all are read."""
    for before in stages:
        if before.get("stage") == "eligible" and stage.get("stage") in ("metric", "fuse"):
            if before.get("rows_in") != stage.get("rows_in"):
                continue
            ours, theirs = stage.get("dropped") or {}, before.get("dropped") or {}
            return {reason for reason, count in ours.items() if theirs.get(reason) == count}
    return set()


def losses(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Every reason at every step, once."""
    rows = []
    for stage in stages:
        again = carried(stage, stages)
        for reason, count in (stage.get("dropped") or {}).items():
            if count and reason not in again:
                shown = (number(count), text_of(stage.get("unit")), percent(count, stage.get("rows_in")))
                rows.append((*_where(stage), reason, meaning(reason) or ABSENT, *shown))
    columns = {"Step": "text", "Name": "text", "Reason": "mono", "Meaning": "text"}
    return table(columns | {"Lost": "num", "Unit": "text", "Of what came in": "num"}, rows)


def stage_title(stage: Mapping[str, Any]) -> str:
    """Step and name of a stage."""
    return " ".join(_where(stage))


def _where(stage: Mapping[str, Any]) -> tuple[str, str]:
    name = text_of(stage.get("stage"))
    return STEPS.get(name, name), text_of(stage.get("name"))


def timings(stages: Sequence[Mapping[str, Any]]) -> Table:
    """What was computed, how long it took, and the rate where this run computed all of it."""
    longest = max((stage["seconds"] for stage in stages if is_number(stage.get("seconds"))), default=0) or 1
    rows = []
    for stage in stages:
        shards, computed, seconds = (stage.get(key) for key in ("shards", "computed_shards", "seconds"))
        is_reused = computed == 0 and bool(shards)
        is_whole = is_number(seconds) and seconds > 0 and bool(computed) and computed == shards
        rate = stage["rows_in"] / seconds if is_whole and is_number(stage.get("rows_in")) else None
        rows.append(
            [
                *_where(stage),
                f"{number(computed)} of {number(shards)}" if is_number(shards) else ABSENT,
                "reused" if is_reused else duration(seconds),
                ABSENT if is_reused or not is_number(seconds) else seconds / longest,
                f"{rate:,.0f} {stage.get('unit', 'rows')}/s" if rate is not None else ABSENT,
                f"{tokens:,.0f}" if (tokens := tokens_per_s(stage.get("details") or {})) else ABSENT,
            ]
        )
    columns = {"Step": "text", "Name": "text", "Shards computed": "num", "Time": "num", "": "bar", "Rate": "num"}
    return table(columns | {"Model tokens/s": "num"}, rows)


def tokens_per_s(details: Mapping[str, Any]) -> float | None:
    """Tokens through a model per second inside it, of one copy of the model."""
    counters = {**details, **(details.get("counters") or {})}
    tokens, seconds = counters.get("trunk_tokens"), counters.get("seconds_model")
    if is_number(tokens) and is_number(seconds) and seconds:
        return float(tokens / seconds)
    given = counters.get("tokens_per_s")
    return float(given) if given is not None and is_number(given) else None


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.") or [(f"{prefix}{key}", "none")]
        else:
            rows.append((f"{prefix}{key}", plain(value)))
    return rows


def key_values(values: Mapping[str, Any], *, title: str = "") -> Table:
    """Settings, one per row."""
    return table({"Key": "mono", "Value": "mono"}, flat(values), title=title)


def artifacts(found: Sequence[Mapping[str, Any]]) -> Table:
    """What lies in the workspace, with its hashes."""
    rows = [
        (
            text_of(one.get("path")),
            number(one.get("rows")),
            size(one.get("bytes")),
            text_of(one.get("fingerprint")),
            text_of(one.get("content")),
        )
        for one in found
    ]
    return table({"Path": "mono", "Rows": "num", "Size": "num", "Recipe": "mono", "Content": "mono"}, rows)


# ---------------------------------------------------------------------------------------- scores and selections


def scores(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row per metric: how many pairs, where their scores lie, and how they lean on length."""
    rows = []
    for score in found:
        moments = score.get("moments") or {}
        rows.append(
            [
                text_of(score.get("metric")),
                text_of(score.get("kind")),
                number(score.get("num_eligible")),
                *(number(moments.get(key)) for key in ("mean", "std", "min", "max")),
                signed(score.get("length_correlation")),
            ]
        )
    columns = {"Metric": "text", "Kind": "mono", "Pairs": "num", "Mean": "num", "Std": "num", "Min": "num"}
    return table(columns | {"Max": "num", "Corr. with length": "num"}, rows)


def tails(histogram: Mapping[str, Any] | None, moments: Mapping[str, Any] | None = None) -> str:
    """What the outermost bins of a histogram hold beyond its edges, for its caption; empty when they hold nothing."""
    edges = (histogram or {}).get("edges") or []
    low, high = ((moments or {}).get(key) for key in ("min", "max"))
    beyond = []
    if edges and is_number(low) and low < edges[0]:
        beyond.append(f"the first bin also holds scores down to {number(low)}")
    if edges and is_number(high) and high > edges[-1]:
        beyond.append(f"the last bin also holds scores up to {number(high)}")
    return "; " + ", ".join(beyond) if beyond else ""


def length_bias(selections: Sequence[Mapping[str, Any]]) -> Table:
    """Mean lengths of chosen and rejected, over all eligible pairs and over the kept ones."""
    rows = []
    for selection in selections:
        length = selection.get("length") or {}
        before, after = length.get("all") or {}, length.get("kept") or {}
        gap, kept_gap = before.get("difference"), after.get("difference")
        if not before and not after:
            continue
        shift = kept_gap - gap if is_number(gap) and is_number(kept_gap) else None
        sides = [one_decimal(part.get(side)) for part in (before, after) for side in ("chosen", "rejected")]
        gaps = [signed(value, 1) for value in (gap, kept_gap, shift)]
        name, unit = text_of(selection.get("name")), text_of(length.get("unit"))
        rows.append([name, unit, *sides[:2], gaps[0], *sides[2:], gaps[1], gaps[2]])
    columns = {"Selection": "text", "Unit": "text"}
    for part in ("Eligible", "Kept"):
        columns |= {f"{part}: chosen": "num", f"{part}: rejected": "num", f"{part}: difference": "num"}
    return table(columns | {"Shift": "num"}, rows)


def _budget_words(rule: Mapping[str, Any]) -> str:
    """A share or a number of pairs."""
    ratio, count = rule.get("ratio"), rule.get("count")
    return f"{plain(100 * ratio)} %" if is_number(ratio) else f"{number(count)} pairs"


def _compound_sentence(rule: Mapping[str, Any], budget: str, end: str) -> str:
    """What a rule made of scores or rules keeps; empty for a leaf."""
    inside = [rule_sentence(one) for one in rule.get("rules") or []]
    if rule.get("kind") == "fuse":
        joined = " + ".join(map(str, rule.get("scores") or []))
        kind = "ranks" if rule.get("how") == "rank" else "z-scores"
        return f"the {budget} with the {end} sum of {kind} of {joined}"
    if rule.get("kind") == "agree":
        judges = ", ".join(map(str, rule.get("scores") or []))
        told = f"the pairs whose label all of {judges} confirm"
        told += ", and turned around those that all contradict" if rule.get("action") == "flip" else ""
        return f"all but {told}" if rule.get("reverse") else told
    if rule.get("kind") == "random":
        return f"{budget} at random"
    if rule.get("kind") == "intersect" and (most := rule.get("budget")):
        return f"the {_budget_words(most)} nearest to the medians of all of: {'; '.join(inside)}"
    if rule.get("kind") == "intersect":
        return f"what {'not ' if rule.get('reverse') else ''}all of these keep: {'; '.join(inside)}"
    if rule.get("kind") == "dedupe":
        what = "prompt" if rule.get("by") == "prompt" else "pair of completions"
        return f"of the best pair of each {what}: {rule_sentence(rule.get('rule') or {})}"
    return ""


def rule_sentence(rule: Mapping[str, Any]) -> str:
    """What a rule keeps, in words; empty for a kind that is not known here."""
    score, reverse = rule.get("score"), bool(rule.get("reverse"))
    end = "lowest" if reverse else "highest"
    budget = _budget_words(rule)
    if compound := _compound_sentence(rule, budget, end):
        return compound
    if not score:
        return ""
    if rule.get("kind") == "above":
        return f"the pairs with {score} {'up to' if reverse else 'above'} {plain(rule.get('threshold'))}"
    if rule.get("kind") == "threshold":
        return _threshold_words(rule, reverse)
    if rule.get("kind") == "top":
        return f"the {budget} with the {end} {score}"
    if rule.get("kind") == "quota":
        by = rule.get("by") or []
        names = plain([by] if isinstance(by, str) else list(by)) if by else "stratum"
        return f"the {budget} with the {end} {score}, shared out by {names}"
    if rule.get("kind") == "band":
        inside = f"percentiles {plain(rule.get('low'))} and {plain(rule.get('high'))} of {score}"
        return f"the pairs outside {inside}" if reverse else f"the pairs between {inside}"
    return ""


def _threshold_words(rule: Mapping[str, Any], reverse: bool) -> str:
    """What a rule keeps whose values were given."""
    ends = [
        f"{word} {'its value' if isinstance(value, Mapping) else plain(value)}"
        for word, value in (("from", rule.get("low")), ("up to", rule.get("high")))
        if value is not None
    ]
    by = rule.get("by") or []
    strata = f", of each {plain([by] if isinstance(by, str) else list(by))}" if by else ""
    return f"the pairs {'but those ' if reverse else ''}with {rule.get('score')} {' '.join(ends)}{strata}"


LIMIT_ITSELF = "itself kept"


def thresholds(selection: Mapping[str, Any]) -> Table:
    """Where the cut lies: per stratum the last pair kept, the two edges of a band, or two values that were given."""
    found = selection.get("thresholds") or {}
    rows = []
    for stratum, cut in found.items():
        if isinstance(cut, Mapping) and not {"from", "to"}.isdisjoint(cut):
            rows += [(f"{stratum} {end}", exact(value), LIMIT_ITSELF) for end, value in cut.items()]
        elif isinstance(cut, Mapping):
            tie = cut.get("pair_id")
            rows.append((stratum, exact(cut.get("score")), text_of(tie) if tie else "all ties kept"))
        elif cut is None:
            rows.append((stratum, ABSENT, "nothing kept"))
        elif stratum.split(" ")[-1] in ("from", "to"):
            rows.append((stratum, exact(cut), "itself not kept" if found.get("reverse") else LIMIT_ITSELF))
        elif not isinstance(cut, bool):
            rows.append((f"{stratum} edge", exact(cut), "all ties kept" if found.get("reverse") else "strict: none"))
    return table({"Threshold of": "text", "Score": "mono", "Last pair_id kept among ties": "mono"}, rows)


def close_note(selection: Mapping[str, Any]) -> str:
    """How many pairs another sharding might decide otherwise about; empty where no score rests on moments."""
    close = selection.get("close") or {}
    if not is_number(close.get("count")):
        return ""
    shown = len(close.get("pairs") or [])
    more = f"; the nearest {shown} are shown" if shown < close["count"] else ""
    return (
        f"{number(close['count'])} pairs lie closer to a threshold than the rounding of the corpus's moments "
        f"({plain(close.get('tolerance'))}): another sharding might decide otherwise about them{more}."
    )


def close_pairs(selection: Mapping[str, Any]) -> Table:
    """Pairs that lie closer to a threshold than the moments' rounding."""
    found = (selection.get("close") or {}).get("pairs") or []
    rows = [(text_of(one.get("pair_id")), exact(one.get("score")), exact(one.get("threshold"))) for one in found]
    return table({"Pair": "mono", "Score": "mono", "Threshold": "mono"}, rows)


def overlap(found: Sequence[Mapping[str, Any]]) -> Table:
    """Every two selections: what they share, and what two of their size would share by chance."""
    rows = []
    for one in found:
        shared, expected = one.get("num_shared"), one.get("expected")
        times = shared / expected if is_number(shared) and is_number(expected) and expected > 0 else None
        rows.append(
            [
                text_of(one.get("first")),
                text_of(one.get("second")),
                number(one.get("num_first")),
                number(one.get("num_second")),
                number(shared),
                one_decimal(expected),
                f"{times:.2f} ×" if times is not None else ABSENT,
                percent(one.get("jaccard")),
                one["jaccard"] if is_number(one.get("jaccard")) else ABSENT,
            ]
        )
    columns = {"Selection": "text", "and": "text", "Kept by it": "num", "by the other": "num", "by both": "num"}
    columns |= {"Expected at random": "num", "Against chance": "num", "Jaccard": "num", "": "bar"}
    return table(columns, rows)


def strata(selection: Mapping[str, Any]) -> Table:
    """What was kept of each part of the corpus."""
    found = selection.get("strata") or []
    total = sum(row["kept"] for row in found if is_number(row.get("kept")))
    rows = []
    for row in found:
        eligible, kept = row.get("eligible"), row.get("kept")
        share = kept / eligible if is_number(kept) and is_number(eligible) and eligible else ABSENT
        counts = (number(eligible), number(kept), percent(kept, eligible), share, percent(kept, total))
        rows.append((text_of(row.get("stratum")), *counts))
    columns = {"Stratum": "text", "Eligible": "num", "Kept": "num", "Kept of it": "num", "": "bar"}
    return table(columns | {"Of the kept set": "num"}, rows)


def example_numbers(numbers: Mapping[str, Any]) -> Table:
    """The numbers that decided about a pair: both sides beside each other, and their difference."""
    sides: dict[str, dict[str, Any]] = {}
    for name, value in numbers.items():
        stem, _, side = name.rpartition("_")
        if stem and side in ("chosen", "rejected"):
            sides.setdefault(stem, {})[side] = value
        else:
            sides.setdefault(name, {})["pair"] = value
    rows = []
    for stem, pair in sides.items():
        chosen, rejected = pair.get("chosen"), pair.get("rejected")
        gap = chosen - rejected if is_number(chosen) and is_number(rejected) else None
        rows.append((stem, *aligned([chosen, rejected, gap], digits=5), cell(pair.get("pair"))))
    return table({"": "mono", "Chosen": "num", "Rejected": "num", "Difference": "num", "Pair": "num"}, rows)


# ------------------------------------------------------------------------------------------------- tables as given


def given(one: Mapping[str, Any]) -> Table:
    """A table that a run brought along: columns of numbers are aligned, whatever they hold."""
    columns, rows = list(one.get("columns") or []), [list(row) for row in one.get("rows") or []]
    width = max([len(columns), *(len(row) for row in rows)], default=0)
    columns += [""] * (width - len(columns))
    rows = [row + [None] * (width - len(row)) for row in rows]
    cells, kinds = [], []
    for place in range(width):
        values = [row[place] for row in rows]
        is_numeric = all(value is None or (isinstance(value, Real) and not isinstance(value, bool)) for value in values)
        texts = aligned(values) if is_numeric else [cell(value) for value in values]
        cells.append(texts)
        kinds.append("num" if all(LOOKS_NUMERIC.fullmatch(text) for text in texts) else "text")
    title, note = str(one.get("title") or ""), str(one.get("note") or "")
    return Table(columns, [list(row) for row in zip(*cells)], kinds, title, note)
