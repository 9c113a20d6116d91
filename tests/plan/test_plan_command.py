"""`prefsel plan`: what it says of FLOPs, a run counts; and what else it says, refuses and keeps."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage_runs import run

from prefsel.cli import app, guarded
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.ingest.readers import read_rows
from prefsel.ingest.windows import ingest_windows
from prefsel.models.architecture import model_shape
from prefsel.models.chat import Encoder
from prefsel.plan import sizes
from prefsel.plan.accelerators import find_accelerator
from prefsel.plan.changes import changes
from prefsel.plan.counted import counted_work, former_rates, keep_plan, kept_plan
from prefsel.plan.estimate import require_fit
from prefsel.plan.nodes import make_plan
from prefsel.plan.sample import Sample, take_sample
from prefsel.plan.work import Work, Works
from prefsel.report.planned import planned_table
from prefsel.score.scorers import CausalLogpsScorer, RewardModelScorer
from prefsel.workspace.manifest import StageReport, config_text
from prefsel.workspace.storage import Storage

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_models import bpe_tokenizer, tiny_causal, tiny_reward

TEXT = "the cat sat on mat a dog saw who where please write short story bake bread explain why"
WORDS = TEXT.split()


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts with a pair, some with two, of lengths that differ tenfold; some answers are too long."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=max(1, int(rng.lognormvariate(2.5, 0.9)))))

    found = []
    for _ in range(count):
        prompt = text()
        found += [{"prompt": prompt, "chosen": text(), "rejected": text()} for _ in range(rng.choice([1, 1, 2]))]
    return found


def written(folder: Path, many: int = 60) -> dict[str, Any]:
    """Two tiny models, three files of two sources, and the configuration of a scoring."""
    tokenizer = bpe_tokenizer()
    for name, model in (("policy", tiny_causal()), ("rm", tiny_reward())):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for number, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl.gz")):
        text = "".join(json.dumps(row) + "\n" for row in rows(many, number)).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    shape = {"dtype": "fp32", "max_length": 120}
    return {
        "name": "t",
        "sources": [
            {"name": "ab", "paths": [str(folder / "a.jsonl"), str(folder / "b.jsonl")]},
            {"name": "c", "paths": [str(folder / "c.jsonl.gz")], "role": "holdout"},
        ],
        "ingest": {"rows_per_shard": 32},
        "models": [
            {"name": "policy", "path": str(folder / "policy"), **shape},
            {"name": "rm", "path": str(folder / "rm"), **shape, "truncation": "left"},
        ],
        "scorers": [
            {"kind": "causal_logps", "model": "policy"},
            {"kind": "causal_logps", "model": "policy", "unconditional": True},
            {"kind": "reward_model", "model": "rm"},
        ],
        "metrics": [{"name": "ap", "metric": "alignment_potential", "params": {"rm": "rm", "policy": "policy"}}],
        "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_ap", "ratio": 0.3}}],
        "ray": {"num_cpus": 2},
    }


TRAINING = {"selection": "top", "model": "policy", "reference": "policy", "learning_rate": 1e-5, "dtype": "fp32"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return written(tmp_path_factory.mktemp("corpus"))


def works(table: dict[str, Any], sample: Sample | None = None, models: Any = None) -> dict[str, Work]:
    config = parse_config(table)
    plan = make_plan(config, Storage("nowhere"))
    made = Works(plan, sample or take_sample(config, num_groups=None), _models={} if models is None else models)
    names = [("columns", one.label) for one in plan.scorers]
    names += [("model", one.label) for spec in config.train for one in spec.trained_models]
    return {work.node: work for kind, name in names if (work := made.of(plan.node(kind, name)))}


def scored(scorer: Any, config: Any) -> dict[str, float]:
    """What a scorer counts over every window of the corpus, in this process."""
    found: dict[str, float] = {"rows_out": 0.0}
    for source in config.sources:
        for path in source.paths:
            windows = ingest_windows(
                read_rows(path, max_row_bytes=1 << 20),
                file=path,
                format=None,
                options=source.options,
                rows_per_shard=config.ingest.rows_per_shard,
            )
            for window in windows:
                shard = scorer.score(window.groups)
                (column, *_) = shard.columns.values()
                found["rows_out"] += sum(value is not None for row in column for value in row)
                for name, value in shard.counters.items():
                    found[name] = found.get(name, 0.0) + value
    return found


@pytest.mark.parametrize("label", ["policy", "policy-uncond", "rm"])
def test_what_is_planned_of_everything_is_what_a_scorer_counts(table: dict[str, Any], label: str) -> None:
    config = parse_config(table)
    work = works(table)[f"columns {label}"]
    name = label.removesuffix("-uncond")
    spec = next(one for one in config.models if one.name == name)
    more = {"name": name, "path": spec.path, "dtype": "fp32", "max_length": 120, "truncation": spec.truncation}
    scorer: Any = RewardModelScorer(**more) if name == "rm" else CausalLogpsScorer(**more, unconditional=label != name)
    counters = scored(scorer, config)
    assert work.flops.is_exact
    assert work.flops.value == pytest.approx(counters["flops_min"], rel=1e-12)
    repeated = counters["repeated_prompt_tokens"]
    assert work.tokens.value == counters["trunk_tokens"] + counters["shared_tokens"] - repeated
    assert work.items.value == counters["rows_out"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_is_planned_of_everything_is_what_a_run_counts(table: dict[str, Any], tmp_path: Path) -> None:
    planned = works(table)
    plan, reports = run(parse_config(table), tmp_path / "w")
    scored = [report for report in reports if report.stage == "score"]
    assert len(scored) == 3
    for report in scored:
        work, counted = planned[f"columns {report.name}"], counted_work(vars(report))
        assert counted is not None
        assert work.flops.is_exact
        assert work.flops.value == pytest.approx(counted["flops"], rel=1e-12)
        assert work.items.value == report.rows_out
        assert report.rows_out < report.rows_in or report.name == "rm"  # some were too long
        assert work.tokens.value == counted["tokens"]
    seen = take_sample(plan.config, num_groups=None)
    eligible = next(report for report in reports if report.stage == "eligible")
    assert seen.counted("num_groups").value == sum(
        one.rows for one in plan.catalog.entries(plan.storage, "groups").values()
    )
    assert seen.counted("eligible_pairs").value == eligible.rows_out
    assert seen.counted("num_pairs").value == eligible.rows_in


@pytest.mark.parametrize("read_bytes", [1 << 30, 1000])
def test_intervals_hold_what_is_counted(table: dict[str, Any], tmp_path: Path, read_bytes: int) -> None:
    """Of 40 seeded draws, of groups or of windows and groups, at least nine of ten, two scorers counted together."""
    plain = [model | {"template": "plain"} for model in table["models"]]
    table = table | {"sources": table["sources"][:1], "scorers": table["scorers"][::2], "models": plain}
    table["ingest"] = {"rows_per_shard": 24}
    (tmp_path / "large.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(600, 5)))
    table["sources"][0] = table["sources"][0] | {"paths": [str(tmp_path / "large.jsonl")]}
    config = parse_config(table)
    models: dict[Any, Any] = {}
    truth = works(table, models=models)
    held = 0
    for seed in range(40):
        found = works(table, take_sample(config, num_groups=150, seed=seed, read_bytes=read_bytes), models)
        for node, work in found.items():
            assert not work.flops.is_exact
            held += work.flops.low <= truth[node].flops.value <= work.flops.high
    assert held >= 0.9 * 40 * len(truth)


def test_a_training_takes_three_forwards_of_its_pairs(table: dict[str, Any]) -> None:
    half = table | {"train": [{"name": "dpo", **TRAINING}, {"name": "two", **TRAINING, "num_epochs": 2}]}
    checkpointed = {"name": "all", **TRAINING, "selection": "all", "gradient_checkpointing": True}
    planned = works(half | {"train": [*half["train"], checkpointed]})
    one, two, everything = (planned[f"model {name}"] for name in ("dpo", "two", "all"))
    assert two.flops.value == pytest.approx(2 * one.flops.value)
    pairs = everything.items.value
    assert one.items.value == int(0.3 * pairs)
    assert everything.flops.value / 4 * int(0.3 * pairs) / pairs == pytest.approx(one.flops.value / 3)
    shape, counted = model_shape(tiny_causal()), 0.0
    encoder = Encoder(bpe_tokenizer(), "auto", 120)
    for group in take_sample(parse_config(table), num_groups=None).every_group:
        encoded = encoder.encode_group(group.prompt, group.completions)
        for sides in group.pairs:
            if all(encoded.status[side] == "ok" for side in sides):
                prompt, said = len(encoded.prompt_tokens), [len(encoded.completion_tokens[side]) for side in sides]
                # Every token looks at itself and at all before it.
                area = sum(range(prompt + 1)) + sum(prompt + place for length in said for place in range(1, length + 1))
                tokens = prompt + sum(said)
                counted += shape.flops(trunk_tokens=tokens, head_rows=sum(said), attention_area=area)
    assert everything.flops.value == pytest.approx(4 * counted, rel=0.01)  # the formula halves squares


def config_file(folder: Path, table: dict[str, Any]) -> str:
    (folder / "c.yaml").write_text(yaml.safe_dump(table))
    return str(folder / "c.yaml")


def test_the_document(table: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = {"name": "far", "path": "nobody/nothing", "max_length": 64}
    asked = table | {
        "models": [*table["models"], far],
        "scorers": [*table["scorers"], {"kind": "causal_logps", "model": "far"}],
        "train": [{"name": "dpo", **TRAINING}],
    }
    file = config_file(tmp_path, asked)
    words = ["plan", file, "--sample", "all", "--accelerator", "H100", "--gpus", "2", "--price", "H100=2.5"]
    assert guarded(app, [*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert guarded(app, words) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert list(document["missing"]) == ["columns far"]
    assert "not estimated: columns far: model nobody/nothing" in text
    (gpu,) = document["gpus"]
    work = {one["node"]: one for one in document["work"] if not one["missing"]}
    score = sum(work[f"columns {name}"]["flops"]["value"] for name in ("policy", "policy-uncond", "rm"))
    hours = score / (989e12 * 0.33) / 3600
    assert gpu["gpu_hours"]["scoring"]["value"] == pytest.approx(hours)
    assert gpu["usd"]["value"] == pytest.approx(2.5 * gpu["gpu_hours"]["total"]["value"])
    (even,) = document["break_even"]
    forward = work["model dpo"]["flops"]["value"] / 3 / even["b"]
    read = work["columns policy"]["flops"]["value"] + work["columns rm"]["flops"]["value"]
    expected = (read / forward + even["b"] * 3) / (work["columns policy"]["flops"]["value"] / forward + 3)
    assert even["R"] == pytest.approx(expected)
    assert f"costs {expected:.2f} of training on all" in text
    assert {one["artifact"] for one in document["storage"]} >= {"groups and pairs", "columns", "models"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--max-gpu-hours", "0"], 2, "an hour of which GPU"),
        (["--accelerator", "H100", "--max-gpu-hours", "1e-15"], 3, "GPU-hours on H100.*--max-gpu-hours allows"),
        (["--accelerator", "H100", "--max-gpu-hours", "1"], 0, ""),
        (["--accelerator", "Z80"], 2, "--accelerator: got 'Z80'.*H100"),
        (["--price", "H100"], 2, "--price: got 'H100'.*USD"),
        (["--sample", "some"], 2, "--sample: got 'some'.*all"),
        (["--set", "ray.num_gpus=0", "--set", "scorers.policy.pool.num_gpus=1"], 2, "0"),
        (
            ["--accelerator", "T4", "--set", "models.policy.dtype=bf16"],
            2,
            "bf16, which T4 does not multiply; valid: fp16",
        ),
    ],
)
def test_exit_codes(
    table: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert guarded(app, ["plan", config_file(tmp_path, table), "--sample", "20", *words]) == code
    assert not said or re.search(said, capsys.readouterr().err.replace("\n", " "))


def test_a_model_that_cannot_fit_names_what_would_help(table: dict[str, Any]) -> None:
    """A Llama of 8 B by its configuration alone: nothing of its weights has to be there for that."""
    config = tiny_causal().config
    config.update(
        {
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128, "max_position_embeddings": 8192},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "declared_config", lambda *_: config)
        size = sizes.model_size("large", None, False, "policy")
    assert size.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert size.shape.trunk_parameters == pytest.approx(6.98e9, rel=1e-3)
    asked = table | {"train": [{"name": "dpo", **TRAINING, "dtype": "bf16"}]}
    spec = parse_config(asked).train[0]
    alone = sizes.training_memory(size, spec, workers=1)
    assert alone.weights + alone.optimizer == pytest.approx(16 * size.parameters / 2**30)
    shared = sizes.training_memory(size, spec.model_copy(update={"zero_stage": 3}), workers=8)
    assert shared.weights + shared.optimizer == pytest.approx(2 * size.parameters / 2**30)
    work = Work("model dpo", "training", memory=alone, dtype="bf16")
    with pytest.raises(UserError, match=r"needs 1\d\d.* GiB on each GPU.*H100 has 79.*zero_stage 3 over more workers"):
        require_fit([work], find_accelerator("H100"))
    scoring = sizes.scoring_memory([(size, "bf16")], token_budget=None, gpus=1)
    assert scoring.weights == pytest.approx(15, rel=0.01)
    full = sizes.scoring_memory([(size, "fp32")], token_budget=None, gpus=1)
    with pytest.raises(UserError, match=r"A10G has 22.*gpus_per_replica above 1"):
        require_fit([Work("columns policy", "scoring", memory=full)], find_accelerator("A10G"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_makes_a_node_anew(table: dict[str, Any], tmp_path: Path) -> None:
    config, workspace = parse_config(table), tmp_path / "w"
    plan, _ = run(config, workspace)
    plan.storage.write("config.yaml", config_text(config).encode())
    assert {one.state for one in changes(make_plan(config, plan.storage)) if "eligible" not in one.node} == {"there"}
    other = parse_config(
        table
        | {"models": [table["models"][0] | {"max_length": 100}, table["models"][1]]}
        | {
            "selections": [
                *table["selections"],
                {"name": "more", "rule": {"kind": "top", "score": "score_ap", "ratio": 0.6}},
            ]
        }
    )
    found = {one.node: one for one in changes(make_plan(other, plan.storage))}
    assert found["columns policy"].why == "policy.max_length: 100, was 120"
    assert found["columns rm"].state == "there"
    assert found["scores ap"].why == "columns policy made anew"
    assert found["selection more"].why == "new: the last run had none of this name"


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_files_that_come_make_anew_what_saw_the_corpus(tmp_path: Path) -> None:
    table = written(tmp_path, many=12)
    table["sources"] = [{"name": "ab", "paths": [str(tmp_path / "[ab].jsonl")]}]
    config, workspace = parse_config(table), tmp_path / "w"
    plan, _ = run(config, workspace)
    plan.storage.write("config.yaml", config_text(config).encode())
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(12, 9)))
    found = {one.node: one for one in changes(make_plan(config, plan.storage))}
    assert found["scores ap"].why == found["eligible all"].why == "input files: 1 changed"
    assert found["columns policy"].state == "partly there"
    sizes = [(tmp_path / name).stat().st_size for name in ("a.jsonl", "b.jsonl")]
    assert found["columns policy"].left == pytest.approx(sizes[1] / sum(sizes))


def test_planned_beside_counted(table: dict[str, Any], tmp_path: Path) -> None:
    config, storage = parse_config(table), Storage(str(tmp_path))
    row = {"node": "columns policy", "kind": "scoring", "missing": "", "note": "", "seconds_here": 4.0}
    row |= {name: {"value": v, "low": v, "high": v} for name, v in (("flops", 2e9), ("tokens", 70), ("items", 9))}
    keep_plan(storage, config, {"work": [row, {"node": "columns far", "missing": "out of reach"}]})
    assert kept_plan(storage, "another: one") == []
    planned = kept_plan(storage, config_text(config))
    counters = {"flops_min": 3e9, "trunk_tokens": 60, "shared_tokens": 15, "repeated_prompt_tokens": 5}
    report = StageReport(
        *("score", "policy", "completions", 10, 9, {"too_long": 1}, 2, 2, 5.0, "columns/policy@0"),
        details={"counters": counters},
    )
    found = planned_table(planned, [report])
    assert found is not None
    assert found["rows"] == [["columns policy", 2.0, "exact", 3.0, 70, 70, 9, 9, 4.0, 5.0]]
    # Read whole, but with a tokenizer that the run trains anew.
    noted = planned_table([planned[0] | {"note": "with a tokenizer trained on the sample"}], [report])
    assert noted is not None
    assert noted["rows"][0][2] == "about"
    assert planned_table([], [report]) is None
    assert former_rates(storage) == {}
