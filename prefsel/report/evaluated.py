"""Evaluations of a run → what the page shows of them: rows, values per prompt, answers side by side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefsel.evaluate.intervals import Values
from prefsel.report.examples import transcript
from prefsel.report.formatting import ABSENT, is_number, number, percent, signed, text_of
from prefsel.report.tables import Table, table
from prefsel.report.verdict import judgement
from prefsel.workspace.folders import SEAL, read_seal, read_sealed
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.manifest import StageReport
from prefsel.workspace.storage import Storage

PROMPTS = "prompts.parquet"
"""The row of every prompt, in the folder of an evaluation."""


# -------------------------------------------------------------------------------------------------- from a workspace


def evaluated_sections(
    storage: Storage, reports: Sequence[StageReport], examples: int, rounds: Mapping[str, tuple[str, int, str]]
) -> list[dict[str, Any]]:
    """What the page shows of each evaluation, as plain values.

    Args:
        storage: The workspace.
        reports: Of the run's stages; others than evaluations are left out.
        examples: Prompts whose answers are shown beside those of the baseline.
        rounds: Model → the self-play whose round trained it, which one, and the policy that it began with.
    """
    found = []
    for report in reports:
        if report.stage == "evaluate":
            details = {key: value for key, value in report.details.items() if key not in ("warnings", "shards")}
            shown = side_by_side(storage, report, examples) if examples and details["baseline"] else []
            arm, number, first = rounds.get(report.name, (None, None, None))
            found.append(
                details
                | {"num_prompts": report.rows_out, "dropped": report.dropped, "examples": shown}
                | {"arm": arm, "round": number, "first": first}
            )
    return found


def reward_measures(storage: Storage, reports: Sequence[StageReport]) -> dict[str, dict[str, Values]]:
    """The mean reward of every prompt: measure → model → values, for paired differences of any two models."""
    found: dict[str, dict[str, Values]] = {}
    for report in reports:
        if report.stage == "evaluate":
            rows = read_prompts(storage, report.artifact)
            for judge in report.details["judges"]:
                if (name := f"reward_{judge}") in rows.column_names:
                    known = rows.filter(rows[name].is_valid())
                    prompts = known["prompt_id"].to_pylist()
                    values = Values(prompts, prompts, known[name].to_numpy())
                    found.setdefault(f"reward by {judge}", {})[report.name] = values
    return found


def read_prompts(storage: Storage, folder: str) -> pa.Table:
    """The row of every prompt of an evaluation."""
    seal = read_seal(storage, folder)
    if seal is None:
        raise storage.damaged(f"{folder}/{SEAL}", "missing")
    return pq.read_table(io.BytesIO(read_sealed(storage, folder, PROMPTS, seal["files"][PROMPTS])))


def side_by_side(storage: Storage, report: StageReport, examples: int) -> list[dict[str, Any]]:
    """Answers of a model and of its baseline to the same prompts: those with the smallest ids, which are hashes."""
    rows = read_prompts(storage, report.artifact).sort_by("prompt_id").slice(0, examples).to_pylist()
    details = report.details
    texts = {
        model: first_answers(storage, details["groups"][model], {row["prompt_id"]: row["shard"] for row in rows})
        for model in (details["model"], details["baseline"])
    }
    found = []
    for row in rows:
        ours, theirs = (texts[model][row["prompt_id"]] for model in (details["model"], details["baseline"]))
        numbers = {name: row[name] for name in row if name.split("_")[0] in ("reward", "baseline", "win", "kl")}
        found.append(
            {"prompt_id": row["prompt_id"], "prompt": ours[0], "answer": ours[1], "baseline": theirs[1]}
            | {"numbers": {name: value for name, value in numbers.items() if value is not None}}
        )
    return found


def first_answers(storage: Storage, groups: str, shards: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Prompt and first answer, as text, of some prompts.

    Args:
        storage: The workspace.
        groups: Folder of a model's answers.
        shards: prompt_id → the shard that holds it.
    """
    found = {}
    for shard in dict.fromkeys(shards.values()):
        table = Artifact(storage, groups).read(shard, ["prompt_id", "prompt", "completions"])
        wanted = [key for key, one in shards.items() if one == shard]
        ids = np.array([one.hex() for one in table["prompt_id"].to_pylist()])
        for row in table.take(pa.array(np.flatnonzero(np.isin(ids, wanted)))).to_pylist():
            answer = transcript(row["completions"][0]["messages"])
            found[row["prompt_id"].hex()] = (transcript(row["prompt"]), answer)
    return found


# ------------------------------------------------------------------------------------------------------------- shown


def rewards(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row per model and judge: its reward, and how it compares with the baseline."""
    rows = []
    for one in found:
        for judge, record in (one.get("judges") or {}).items():
            reward, gain, wins = (record.get(key) or {} for key in ("reward", "reward_difference", "win_rate"))
            raw, controlled = (wins.get(key) or {} for key in ("raw", "length_controlled"))
            warned = record.get("warnings") or ()
            notes = ["chose the pairs too"] if any("also chose" in one for one in warned) else []
            notes += [one.removeprefix(f"judge {judge!r} ") for one in warned if "also chose" not in one]
            if is_number(turned := wins.get("num_inconsistent")) and turned:
                notes.append(f"{percent(turned, raw.get('num_items'))} of the verdicts turn with the order")
            if controlled and wins.get("is_extrapolated"):
                notes.append("one model's answers are all the longer ones: equal lengths were not seen")
            shown = gain or ({**raw, **_around_half(raw)} if raw else {})
            rows.append(
                [
                    text_of(one.get("model")),
                    text_of(judge),
                    number(reward.get("mean")),
                    _interval(reward, number),
                    text_of(one.get("baseline")),
                    signed(gain.get("mean")),
                    _interval(gain, signed),
                    judgement(shown) if shown else ABSENT,
                    percent(raw.get("mean")),
                    percent(controlled.get("mean")),
                    number(raw.get("num_prompts") or reward.get("num_prompts")),
                    "; ".join(notes) or ABSENT,
                ]
            )
    columns = {"Model": "text", "Judge": "text", "Reward": "num", "95 % interval": "num", "Against": "text"}
    columns |= {"Difference": "num", "Its interval": "num", "Shown": "verdict", "Wins": "num"}
    columns |= {"At equal lengths": "num", "Prompts": "num", "Note": "text"}
    return table(columns, rows)


def _around_half(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A share of wins as a difference from one half."""
    return {end: raw[end] - 0.5 for end in ("mean", "low", "high") if is_number(raw.get(end))}


def answers(found: Sequence[Mapping[str, Any]]) -> Table:
    """One row per model: how far it went from its baseline, and what its answers are like."""
    rows = []
    for one in found:
        record = one.get("overall") or {}
        kl, variety, tokens = (record.get(key) or {} for key in ("kl", "diversity", "tokens"))
        held_out = record.get("held_out") or {}
        counts = (one.get("answers") or {}).get(one.get("model")) or {}
        lost = sum((counts.get("dropped") or {}).values())
        distinct = variety.get("distinct") or [None, None]
        accuracy = held_out.get("accuracy") or {}
        rows.append(
            [
                text_of(one.get("model")),
                number(record.get("num_answers")),
                _reasons(counts.get("dropped") or {}, lost),
                number((kl.get("per_response") or {}).get("mean")),
                _interval(kl.get("per_response") or {}, number),
                number(kl.get("per_token")),
                number(tokens.get("mean")),
                *(number((value or {}).get("mean")) for value in (distinct[1], variety.get("self_similarity"))),
                percent((variety.get("repetition") or {}).get("mean")),
                number(variety.get("num_empty")) if variety.get("num_empty") else ABSENT,
                percent(accuracy.get("mean")),
                _interval(accuracy, percent),
                number((held_out.get("margin") or {}).get("mean")),
                number(held_out.get("calibration_error")),
            ]
        )
    columns = {"Model": "text", "Answers": "num", "Left out": "text", "KL per answer": "num", "95 % interval": "num"}
    columns |= {"KL per token": "num", "Tokens": "num", "distinct-2": "num", "Self-similarity": "num"}
    columns |= {"Repeated": "num", "Empty": "num", "Held-out accuracy": "num", "Its interval": "num"}
    return table(columns | {"Held-out margin": "num", "Calibration error": "num"}, rows)


def _reasons(dropped: Mapping[str, int], lost: int) -> str:
    if not lost:
        return ABSENT
    return f"{number(lost)}: " + ", ".join(f"{number(count)} {reason}" for reason, count in dropped.items() if count)


def _interval(found: Mapping[str, Any], shown: Any) -> str:
    low, high = found.get("low"), found.get("high")
    return f"{shown(low)} to {shown(high)}" if is_number(low) and is_number(high) else ABSENT


def points(found: Iterable[Mapping[str, Any]], judge: str) -> list[dict[str, Any]]:
    """What a plot needs of each model by one judge: `model`, `reward`, `difference` (estimates), `kl` per answer."""
    found = list(found)
    baselines, rows = {one.get("baseline") for one in found}, []
    for one in found:
        record = (one.get("judges") or {}).get(judge) or {}
        kl = ((record.get("kl") or {}).get("per_response") or {}).get("mean")
        # A baseline is no distance from itself; a model that is compared with none has none.
        kl = 0.0 if kl is None and one.get("baseline") is None and one.get("model") in baselines else kl
        shown = {"reward": record.get("reward"), "difference": record.get("reward_difference"), "kl": kl}
        rows.append({"model": text_of(one.get("model"))} | shown)
    return rows


def judges(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every judge that gave rewards, in the order in which they first appear."""
    names = [name for one in found for name, record in (one.get("judges") or {}).items() if record.get("reward")]
    return list(dict.fromkeys(names))
