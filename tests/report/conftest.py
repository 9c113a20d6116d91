"""The record of a small finished run, as the report stage hands it over, with hostile text among its examples."""

from __future__ import annotations

import math
from typing import Any

import pytest

CONFIG_YAML = """\
name: demo
sources:
- {name: uf, paths: [uf/*.jsonl.gz], format: auto}
- {name: hh, paths: [hh.jsonl], format: transcript}
split: {holdout: 0.1, proxy: 0.3}
selections:
- name: map30
  rule: {kind: top, score: score_map, ratio: 0.3}
  controls: [random]
"""
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> </pre></div> & \"quoted\" {{ 7*7 }} \x00\ud800"
ADDRESS = "see https://example.org/a?b=1&c=2 and url(https://example.org/x.png)"
LONG_WORD = "supercalifragilistic" * 30


def stage(
    kind: str, name: str, unit: str, rows_in: int, dropped: dict[str, int], seconds: float, **more: Any
) -> dict[str, Any]:
    """A stage whose counts balance."""
    fp = f"{abs(hash_of(kind + name)):016x}"
    return {
        "stage": kind,
        "name": name,
        "unit": unit,
        "rows_in": rows_in,
        "rows_out": rows_in - sum(dropped.values()),
        "dropped": dropped,
        "shards": 4,
        "computed_shards": 4,
        "seconds": seconds,
        "artifact": f"{kind}/{name}@{fp}",
        "fingerprint": fp,
        "details": {},
    } | more


def hash_of(text: str) -> int:
    value = 0
    for letter in text.encode():
        value = (value * 1099511628211 + letter) % 2**64
    return value


def bell(mean: float, std: float, total: int, bins: int = 40) -> dict[str, Any]:
    """A histogram of a normal distribution over four standard deviations to each side."""
    edges = [mean + std * (8 * place / bins - 4) for place in range(bins + 1)]
    mass = [math.exp(-(((edges[b] + edges[b + 1]) / 2 - mean) ** 2) / (2 * std**2)) for b in range(bins)]
    return {"edges": edges, "counts": [round(total * m / sum(mass), 2) for m in mass]}


def top_of(histogram: dict[str, Any], kept: float) -> dict[str, Any]:
    """The highest `kept` rows of a histogram."""
    counts: list[float] = []
    for count in reversed(histogram["counts"]):
        counts.append(min(count, kept - sum(counts)))
    return {"edges": histogram["edges"], "counts": counts[::-1]}


def even(total: int, bins: int = 40) -> dict[str, Any]:
    """A histogram of a uniform distribution over 0 to 1."""
    return {"edges": [place / bins for place in range(bins + 1)], "counts": [total / bins] * bins}


def score(metric: str, kind: str, params: dict[str, Any], mean: float, std: float, r: float | None) -> dict[str, Any]:
    return {
        "metric": metric,
        "kind": kind,
        "params": params,
        "num_eligible": 2_091,
        "dropped": {"holdout": 348, "proxy": 1_021, "missing_rm_rm": 6},
        "histogram": even(2_091) if kind == "random" else bell(mean, std, 2_091),
        "moments": {
            "mean": mean,
            "std": std,
            "min": 0.001 if kind == "random" else -5.72,
            "max": 0.999 if kind == "random" else 4.4,
        },
        "length_correlation": r,
        "length_unit": "tokens",
        "statistics": {"rm": {"count": 2_091, "mean": 0.413, "std": 1.72}} if kind != "random" else {},
    }


def example(kind: str, place: int, prompt: str, chosen: str, rejected: str, value: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "pair_id": f"{hash_of(kind + str(place)):016x}" * 2,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "score": value,
        "percentile": 99.2 - place if "kept" in kind else None,
        "source": "uf",
        "aspect": "helpfulness" if place else None,
        "numbers": {
            "rm_rm_chosen": 2.5 + place,
            "rm_rm_rejected": -0.25,
            "logps_policy_chosen": -412.3125,
            "logps_policy_rejected": -1_388.875,
            "num_tokens_policy_chosen": 118.0,
            "num_tokens_policy_rejected": 342.0,
            "score_random": 0.1234,
        },
    }


def examples() -> list[dict[str, Any]]:
    answer = (
        "First, rinse the rice until the water runs clear.\n\n1. Add one and a half cups of water.\n2. Simmer. " * 12
    )
    return [
        example("just kept", 0, "How do I cook rice without burning it?", answer, "Use a rice cooker.", 3.31),
        example("kept", 1, HOSTILE, ADDRESS, LONG_WORD, 2.94),
        example("just dropped", 0, "user: Hi\n\nassistant: Hello!\n\nuser: \u202etpircs", "Sure.", answer, -3.02),
        example("dropped", 1, "Wie heißt die Hauptstadt von 日本?", "東京です。", "Berlin.", -2.75),
    ]


def selection(name: str, rule: dict[str, Any], metric: str, kept_gap: float, **more: Any) -> dict[str, Any]:
    histogram = bell(0.0, 1.1, 2_091) if metric == "map" else even(2_091)
    fp = f"{hash_of(name):016x}"
    return {
        "name": name,
        "metric": metric,
        "rule": rule,
        "num_eligible": 2_091,
        "num_kept": 627,
        "thresholds": {"all": {"score": 0.5731250000000001 if metric == "map" else 0.7, "pair_id": None}},
        "marks": [0.5731250000000001 if metric == "map" else 0.7],
        "moments": {"min": -5.72, "max": 4.4} if metric == "map" else {"min": 0.001, "max": 0.999},
        "all_histogram": histogram,
        "kept_histogram": top_of(histogram, 627),
        "length": {
            "unit": "tokens",
            "all": {"chosen": 231.4, "rejected": 218.1, "difference": 13.3},
            "kept": {"chosen": 240.0, "rejected": 240.0 - kept_gap, "difference": kept_gap},
        },
        "strata": [
            {"stratum": "uf / helpfulness", "eligible": 1_200, "kept": 400},
            {"stratum": "hh", "eligible": 891, "kept": 227},
        ],
        "examples": [],
        "dataset": f"datasets/{name}@{fp}",
    } | more


def training(name: str, chosen_by: str, reached: float) -> dict[str, Any]:
    steps = range(1, 41)
    history = [
        {
            "event": "step",
            "step": step,
            "loss": 0.6931 - 0.006 * step * reached + 0.03 * math.sin(3.7 * step),
            "accuracy": min(1.0, 0.5 + 0.4 * reached * step / 40 + 0.1 * math.sin(2.3 * step)),
            "margin": 0.02 * step * reached,
            "lr": 3e-4 * min(1, step / 4) * (1 + math.cos(math.pi * step / 40)) / 2,
            "grad_norm": 9.0 + 4 * math.sin(step),
        }
        for step in steps
    ]
    evaluations = [
        {
            "event": "eval",
            "step": step,
            "loss": 0.693147 - 0.0011 * step * reached,
            "accuracy": 0.4885 + 0.0039 * step * reached,
            "margin": 1.3e-6 if step == 0 else 0.011 * step,
            "num_pairs": 348,
        }
        for step in (0, 10, 20, 30, 40)
    ]
    checks = [
        ("loss before the first step", 0.6931467, "ln 2 = 0.693147", 1e-4, True),
        ("recomputed reference log-probs, largest relative error", 2.6e-7, 0.0, 1e-4, True),
    ]
    share = 100 * evaluations[-1]["accuracy"]
    return {
        "name": name,
        "kind": "dpo",
        "selection": chosen_by,
        "model": "policy",
        "reference": "policy",
        "num_pairs": 625,
        "settings": {
            "loss": "dpo",
            "beta": 0.1,
            "learning_rate": 3e-4,
            "dtype": "fp32",
            "lora": None,
            "gradient_checkpointing": False,
            "deepspeed": {},
            "adam_betas": [0.9, 0.999],
        },
        "history": history,
        "evaluations": evaluations,
        "held_out": {
            "before": {"mean": 48.85, "low": 43.6, "high": 54.1, "num_items": 348, "num_prompts": 120},
            "after": {"mean": share, "low": share - 5.5, "high": share + 5.5, "num_items": 348, "num_prompts": 120},
        },
        "self_checks": [dict(zip(("name", "value", "expected", "tolerance", "ok"), check)) for check in checks],
        "seconds": 41.7,
        "artifact": f"models/{name}@{hash_of(name):016x}",
    }


def stages() -> list[dict[str, Any]]:
    at_eligibility = {"holdout": 348, "proxy": 1_021, "duplicate": 12, "contradiction": 17}
    counters = {"trunk_tokens": 1_204_311.0, "seconds_model": 12.5, "head_rows": 930_112.0, "padding_tokens": 0.0}
    kept = {"not_selected": 1_464}
    return [
        stage(
            "ingest",
            "uf",
            "rows",
            1_000,
            {"quarantined:empty_completion": 3, "quarantined:not_json": 1, "duplicate": 7},
            1.31,
            details={"files": 2, "groups": 940, "pairs": 2_450, "ties": 41},
        ),
        stage(
            "ingest", "hh", "rows", 1_156, {"duplicate": 0}, 0.9, details={"files": 1, "groups": 1_002, "pairs": 1_045}
        ),
        stage("eligible", "all", "pairs", 3_495, at_eligibility, 0.45),
        stage("scratch", "policy", "pairs", 1_021, {"unused": 221}, 38.2, shards=1, computed_shards=1),
        stage(
            "score",
            "causal_logps-policy",
            "completions",
            5_512,
            {"too_long": 9},
            14.02,
            details={"counters": counters, "range": {"logps_policy": [-1_388.875, -3.5]}},
        ),
        stage("score", "rm-rm", "completions", 5_512, {"poisoned": 2}, 0.0, computed_shards=0),
        stage("metric", "map", "pairs", 3_495, at_eligibility | {"missing_rm_rm": 6}, 0.74),
        stage("metric", "random", "pairs", 3_495, at_eligibility, 0.2),
        stage("select", "map30", "pairs", 2_091, kept, 0.31),
        stage("select", "map30-random", "pairs", 2_091, kept, 0.29),
        stage("train", "dpo-map30", "pairs", 627, {"too_long": 2}, 41.7, shards=1, computed_shards=1),
        stage("train", "dpo-random", "pairs", 627, {"too_long": 2}, 40.9, shards=1, computed_shards=1),
    ]


def comparison(measure: str, mean: float, low: float, high: float) -> dict[str, Any]:
    estimate = {"mean": mean, "low": low, "high": high, "num_items": 348, "num_prompts": 120}
    return {
        "training": "dpo-map30",
        "selection": "map30",
        "control": "random",
        "against": "dpo-random",
        "measure": measure,
        "difference": estimate,
        "unlike": [],
    }


def record() -> dict[str, Any]:
    """Everything a run can say."""
    made = stages()
    return {
        "run": {
            "run": "demo-20261121-021000-8d3f01ac",
            "name": "demo",
            "started": "2026-11-21T02:10:00+00:00",
            "seconds": 192.4,
            "versions": {"prefsel": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu"},
            "hardware": {"cpus": 2, "gpus": 0, "memory_gib": 23.4, "machine": "x86_64"},
            "config_yaml": CONFIG_YAML,
            "status": "done",
            "workspace": "s3://bucket/demo",
        },
        "stages": made,
        "scores": [
            score("map", "alignment_potential", {"rm": "rm", "policy": "policy"}, 0.0, 1.1, 0.214),
            score("random", "random", {}, 0.5, 0.289, None),
        ],
        "selections": [
            selection("map30", {"kind": "top", "score": "score_map", "ratio": 0.3}, "map", 31.9, examples=examples()),
            selection("map30-random", {"kind": "top", "score": "score_random", "count": 627}, "random", 12.4),
        ],
        "random": ["map30-random"],
        "overlap": [
            {
                "first": "map30",
                "second": "map30-random",
                "num_first": 627,
                "num_second": 627,
                "num_shared": 200,
                "jaccard": 200 / 1054,
                "expected": 627 * 627 / 2_091,
            }
        ],
        "training": [training("dpo-map30", "map30", 1.0), training("dpo-random", "map30-random", 0.4)],
        "comparisons": [
            comparison("gold reward", 0.63, 0.5, 0.76),
            comparison("held-out accuracy, points", 9.4, -1.2, 20.0),
        ],
        "warnings": ["metric map: warning: a lot of ties"],
        "tables": [
            {
                "title": "What each selection cost",
                "note": "In forwards.",
                "columns": ["selection", "together"],
                "rows": [["map30", 2.5], ["map30-random", 1.0]],
            }
        ],
        "evaluations": [
            {
                "title": "Gold reward of 512 held-out prompts",
                "note": "Δ against all data, ± standard error.",
                "columns": ["Trained on", "Pairs", "Mean gold", "Δ", "Greedy"],
                "rows": [
                    ["map30", 627, 0.31234, "+0.34 ± 0.04", 0.5],
                    ["map30-random", 627, -0.29, "−0.29 ± 0.07", None],
                    ["all", 2_091, float("nan"), "–", 0.25],
                ],
            }
        ],
        "artifacts": [
            {
                "path": one["artifact"],
                "fingerprint": one["fingerprint"],
                "rows": one["rows_out"],
                "bytes": 1_234_567 * place if place else None,
                "content": f"{hash_of(one['artifact']):016x}" * 2 if place else None,
            }
            for place, one in enumerate(made)
        ],
    }


@pytest.fixture
def report() -> dict[str, Any]:
    """A fresh record for every test, to be changed at will."""
    return record()


@pytest.fixture
def texts() -> dict[str, str]:
    """The hostile texts that stand among the examples of the record."""
    return {"hostile": HOSTILE, "address": ADDRESS, "long word": LONG_WORD}
