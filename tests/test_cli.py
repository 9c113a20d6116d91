"""The command line as a new user meets it: every mistake is one message, exit 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from prefsel.cli import app, guarded

REPOSITORY = Path(__file__).resolve().parents[1]
PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": 1.0, "score_rejected": 0.0}
BASE: dict[str, Any] = {
    "name": "t",
    "sources": [{"name": "a", "paths": ["a.jsonl"]}],
    "scorers": [{"kind": "imported", "name": "gold"}],
    "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "gold"}}],
    "selections": [{"name": "top", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}}],
}
MODEL = {"kind": "pretrained", "name": "policy", "path": "./model"}
TRAIN = {"name": "dpo", "selection": "top", "model": "policy", "reference": "policy", "learning_rate": 1e-6}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(PAIR | {"prompt": f"p{n}"}) + "\n" for n in range(4)))
    return tmp_path


def refused(here: Path, capsys: pytest.CaptureFixture[str], table: dict[str, Any], *arguments: str) -> str:
    """The message of a run that must exit with 2 and leave no workspace behind."""
    (here / "c.yaml").write_text(yaml.safe_dump(table))
    code = guarded(app, ["run", "c.yaml", "--workspace", "w", *arguments])
    message = capsys.readouterr().err
    assert code == 2, message
    assert "Traceback" not in message
    assert not (here / "w").exists()
    return message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"trian": []}, ["trian", "did you mean 'train'"]),
        ({"sources": [{"name": "a", "paths": ["none.jsonl"]}]}, ["none.jsonl"]),
        (
            {"sources": [{"name": "a", "paths": ["a.jsonl"], "format": "hh"}]},
            ["sources.a.format", "'hh'", "transcript"],
        ),
        ({"metrics": [{"name": "m", "metric": "explicit_margn"}]}, ["explicit_margn", "explicit_margin"]),
        ({"metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rmm": "x"}}]}, ["rmm", "'rm'"]),
        (
            {"metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "x"}}]},
            ["metrics.margin", "'rm_x'", "reward_model, or function, or imported", "made: rm_gold"],
        ),
        ({"selections": [{"name": "s", "rule": {"kind": "tip"}}]}, ["selections.s", "tip", "band"]),
        (
            {"selections": [{"name": "s", "rule": {"kind": "top", "score": "score_x", "ratio": 0.5}}]},
            ["selections.s", "score_x", "score_margin"],
        ),
        (
            {"selections": [{"name": "s", "rule": {"kind": "top", "score": "score_margin"}}]},
            ["selections.s", "ratio and count"],
        ),
        (
            {"scorers": [{"kind": "causal_logps", "model": "policy"}]},
            ["scorers.policy.model", "no policy in `models` or `train`"],
        ),
        ({"models": [MODEL]}, ["./model", "no such directory"]),
        ({"train": [TRAIN]}, ["train.dpo.model", "policy"]),
    ],
)
def test_mistakes_in_the_configuration(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], parts: list[str]
) -> None:
    message = refused(here, capsys, BASE | change)
    for part in parts:
        assert part in message


def test_a_model_directory_without_a_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert "no *.safetensors" in refused(here, capsys, BASE | {"models": [MODEL]})
    (here / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "no tokenizer in the directory" in refused(here, capsys, BASE | {"models": [MODEL]})


def test_training_that_cannot_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {"models": [{"kind": "scratch_policy", "name": "policy"}], "split": {"proxy": 0.3}}
    message = refused(here, capsys, BASE | made | {"train": [TRAIN]})
    assert "train.dpo.reference" in message
    assert "causal_logps" in message
    scored = made | {"scorers": [*BASE["scorers"], {"kind": "causal_logps", "model": "policy"}]}
    message = refused(here, capsys, BASE | scored | {"train": [TRAIN | {"selection": "other"}]})
    assert "train.dpo.selection: got 'other'; valid: all, validation, top" in message
    message = refused(here, capsys, BASE | scored | {"train": [TRAIN | {"deepspeed": {"bf16": {"enabled": True}}}]})
    assert "deepspeed.bf16" in message


@pytest.mark.usefixtures("local_ray")
def test_a_budget_above_the_corpus(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = {"kind": "top", "score": "score_margin", "count": 5}
    (here / "c.yaml").write_text(yaml.safe_dump(BASE | {"selections": [{"name": "s", "rule": rule}]}))
    assert guarded(app, ["run", "c.yaml", "--workspace", "w"]) == 2
    assert "selections.s: rule top: count: got 5; valid: at most the 4 eligible pairs" in capsys.readouterr().err
    assert not (here / "w" / "columns").exists()


@pytest.mark.usefixtures("local_ray")
def test_run_verify_explain_and_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "c.yaml").write_text(yaml.safe_dump(BASE))
    assert guarded(app, ["run", "c.yaml", "--workspace", "w"]) == 0
    first = capsys.readouterr().out
    page = next(line for line in first.splitlines() if line.startswith("  report    ")).split()[1]
    assert Path(page).is_file()
    assert "  eligible  4 of 4 pairs (100.0%)" in first
    assert "  made      1 source, 1 column set, 1 pair score, 1 selection" in first
    assert "  kept      top: 2 of 4 pairs (50.0%)  datasets/top@" in first
    assert first.endswith("next      prefsel explain PAIR_ID --workspace w\n            prefsel verify --workspace w\n")
    assert guarded(app, ["run", "c.yaml", "--workspace", "w"]) == 0
    again = capsys.readouterr().out
    assert "nothing to do" in again
    assert again.splitlines()[-1] == f"report: {page}"
    assert guarded(app, ["status", "w"]) == 0
    assert "missing   nothing that the configuration asks for" in capsys.readouterr().out
    assert guarded(app, ["verify", "--workspace", "w"]) == 0
    assert "verify: clean" in capsys.readouterr().out
    run_file = next((here / "w" / "runs").glob("*.json"))
    manifest = json.loads(run_file.read_text())
    for stage in manifest["stages"]:
        assert stage["rows_in"] == stage["rows_out"] + sum(stage["dropped"].values())
    import pyarrow.parquet as pq

    pair_id = pq.read_table(next((here / "w").glob("datasets/top@*/data/*.parquet")))["pair_id"][0].as_py()
    assert guarded(app, ["explain", pair_id[:12], "--workspace", "w"]) == 0
    told = capsys.readouterr().out
    assert f"pair      {pair_id}" in told
    assert "score     margin: 1, percentile" in told
    assert "selection top: kept" in told
    assert guarded(app, ["explain", "zz", "--workspace", "w"]) == 2
    shard = next((here / "w").glob("pairs/a/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert guarded(app, ["verify", "--workspace", "w"]) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        ([], "Usage:"),
        (["run", "c.yaml"], "Missing option '--workspace'"),
        (["run", "c.yaml", "--bogus", "1"], "No such option"),
    ],
)
def test_wrong_command_lines_exit_with_2(tmp_path: Path, arguments: list[str], told: str) -> None:
    command = [sys.executable, "-c", "from prefsel.cli import main; main()", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert told in found.stderr + found.stdout


def test_secrets_never_reach_a_message(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "s3://AKIAKEY:SEC/RET@bucket/x.jsonl"
    for paths in (secret, [secret]):
        message = refused(here, capsys, BASE | {"sources": [{"name": "a", "paths": paths}]})
        assert "AKIAKEY" not in message
        assert "RET" not in message


def test_a_workspace_that_is_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "c.yaml").write_text(yaml.safe_dump(BASE))
    assert guarded(app, ["run", "c.yaml", "--workspace", "a.jsonl"]) == 2
    assert "is a file; valid: a directory or a URI" in capsys.readouterr().err


def test_verify_of_no_workspace(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(app, ["verify", "--workspace", "nowhere"]) == 2
    assert "is not a workspace" in capsys.readouterr().err


HEAVY = """
import sys
from prefsel.cli import app, guarded
code = guarded(app, sys.argv[1:])
heavy = {"torch", "ray", "transformers", "datasets", "deepspeed"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trian": []}, "did you mean 'train'"),
        ({"metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rmm": "x"}}]}, "rmm"),
        ({"selections": [{"name": "top", "rule": {"kind": "tip"}}]}, "selections.top: rule.kind: got 'tip'"),
        ({"sources": [{"name": "a", "paths": ["b.jsonl"]}]}, "sources.a.paths: source: nothing at 'b.jsonl'"),
        ({"ray": {"num_cpus": 1}, **{"train": [TRAIN | {"workers": 2}]}}, "train.dpo.workers: 2 x 1 CPUs asked"),
        ({"train": [TRAIN | {"reference": "polcy"}]}, "train.dpo.reference: got 'polcy'; valid: policy"),
    ],
)
def test_a_mistake_is_answered_before_torch_and_ray_are_imported(here: Path, change: dict[str, Any], told: str) -> None:
    """Which takes seconds; with models of the configuration, which their files need not be there for."""
    scored = {
        "models": [{"kind": "pretrained", "name": "policy", "path": "org/policy"}],
        "scorers": [*BASE["scorers"], {"kind": "causal_logps", "model": "policy"}],
        "train": [TRAIN],
    }
    (here / "c.yaml").write_text(yaml.safe_dump(BASE | scored | change))
    command = [sys.executable, "-c", HEAVY, "run", "c.yaml", "--workspace", "w"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    assert (found.returncode, found.stderr.count("prefsel: ")) == (2, 1), found.stderr
    assert told in found.stderr
    assert not (here / "w").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scorers": [{"kind": "improted", "name": "gold"}]}, ["scorers.gold.kind: got 'improted'", "'imported'"]),
        ({"scorers": [{"name": "gold"}]}, ["scorers.gold.kind: required", "causal_logps, reward_model"]),
        ({"train": [TRAIN | {"kind": "dop"}]}, ["train.dpo.kind: got 'dop'; did you mean 'dpo'? valid: dpo, reward"]),
        ({"train": [TRAIN | {"divergence": "x"}]}, ["train.dpo: divergence: got 'x' with loss 'dpo'"]),
        ({"train": [TRAIN | {"loss": "dop"}]}, ["train.dpo.loss: got 'dop'"]),
    ],
)
def test_mistakes_are_told_where_they_stand(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], told: list[str]
) -> None:
    message = refused(here, capsys, BASE | change)
    for part in told:
        assert part in message
    assert len(message) < 250


def test_the_wrong_name_of_a_model_is_told_where_it_stands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not where something else refers to what it should have been."""
    table = BASE | {
        "split": {"proxy": 0.2},
        "models": [{"kind": "scratch_policy", "name": "policy"}],
        "scorers": [*BASE["scorers"], {"kind": "causal_logps", "model": "polcy"}],
        "train": [TRAIN],
    }
    assert "scorers.polcy.model: got 'polcy'; valid: policy" in refused(here, capsys, table)


@pytest.mark.usefixtures("local_ray")
def test_more_than_the_ray_that_runs_has(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration leaves the sizes to Ray, so that they are known once it runs; still nothing is written."""
    made = {
        "split": {"proxy": 0.3},
        "models": [{"kind": "scratch_policy", "name": "policy"}],
        "scorers": [*BASE["scorers"], {"kind": "causal_logps", "model": "policy", "pool": {"num_gpus": 1}}],
    }
    message = refused(here, capsys, BASE | made)
    assert "scorers.policy.pool.num_gpus: 1 x 1 GPUs asked, 1 in all, but this Ray has 0" in message


@pytest.mark.usefixtures("local_ray")
def test_an_imported_number_that_no_row_has(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known after ingest, and told before any model runs."""
    scorers = [{"kind": "imported", "name": "gold", "field": "scroe"}]
    (here / "c.yaml").write_text(yaml.safe_dump(BASE | {"scorers": scorers}))
    assert guarded(app, ["run", "c.yaml", "--workspace", "w"]) == 2
    assert "scorers.gold.field: got 'scroe'; valid: score" in capsys.readouterr().err
    assert not (here / "w" / "columns").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_number_that_only_the_last_shard_has_is_found(here: Path) -> None:
    late = PAIR | {"prompt": "p9", "rare_chosen": 1.0, "rare_rejected": 0.0}
    with (here / "a.jsonl").open("a") as stream:
        stream.write(json.dumps(late) + "\n")
    scorers = [{"kind": "imported", "name": "gold", "field": "rare"}]
    rule = {"kind": "top", "score": "score_margin", "count": 1}
    table = BASE | {"scorers": scorers, "ingest": {"rows_per_shard": 2}, "selections": [{"name": "s", "rule": rule}]}
    (here / "c.yaml").write_text(yaml.safe_dump(table))
    assert guarded(app, ["run", "c.yaml", "--workspace", "w"]) == 0


@pytest.mark.usefixtures("local_ray")
def test_a_workspace_that_cannot_be_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "c.yaml").write_text(yaml.safe_dump(BASE))
    assert guarded(app, ["run", "c.yaml", "--workspace", "/proc/w"]) == 2
    assert "workspace: cannot write '/proc/w'" in capsys.readouterr().err
    assert guarded(app, ["run", "c.yaml", "--workspace", "a.jsonl/w"]) == 2
    assert "workspace: cannot write" in capsys.readouterr().err


@pytest.mark.usefixtures("local_ray")
def test_the_home_directory_is_meant_by_a_tilde(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "base.yaml").write_text(yaml.safe_dump(BASE | {"sources": [{"name": "a", "paths": ["~/a.jsonl"]}]}))
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "c.yaml").write_text("base: ~/base.yaml\n")
    assert guarded(app, ["ingest", "~/elsewhere/c.yaml", "--workspace", "~/w"]) == 0
    assert (here / "w" / "catalog.json").is_file()
    kept = yaml.safe_load((here / "w" / "config.yaml").read_text())
    assert kept["sources"][0]["paths"] == [str(here / "a.jsonl")]


def test_version_and_completion() -> None:
    import prefsel

    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout == f"prefsel {prefsel.__version__}\n"
    assert "--install-completion" in runner.invoke(app, ["--help"], terminal_width=100).stdout
    command = [sys.executable, "-c", "from prefsel.cli import app; app(prog_name='prefsel')"]
    asked = {"_PREFSEL_COMPLETE": "complete_bash", "COMP_WORDS": "prefsel sta", "COMP_CWORD": "1"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | asked)
    assert found.stdout.split() == ["status"]


def test_the_schema_lists_rules_and_metrics() -> None:
    schema = json.loads(CliRunner().invoke(app, ["config-schema"]).stdout)
    assert "sources" in schema["properties"]
    kinds = {found.get("properties", {}).get("kind", {}).get("const") for found in schema["$defs"].values()}
    assert {"top", "band", "quota"} <= kinds
    assert "gamma" in schema["$defs"]["PreferenceDivergence"]["properties"]


def test_jobs_take_the_option_with_an_equals_sign(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "jobs" / "run_ingest.py"), "--config=none.yaml", "-w", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (found.returncode, found.stderr) == (2, "prefsel: config: no such file: none.yaml\n")


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "jobs").glob("*.py")))
def test_job_scripts_take_the_configuration_as_an_option(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "jobs" / script), "--config", "none.yaml", "--workspace", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (found.returncode, found.stderr) == (2, "prefsel: config: no such file: none.yaml\n")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_configurations_are_valid(path: Path) -> None:
    from prefsel.config.file import load_config
    from prefsel.rules import parse_rule

    config = load_config(path)
    for selection in config.selections:
        parse_rule(selection.rule)


WARMED = {
    "models": [{"kind": "scratch_policy", "name": "policy"}],
    "scorers": [{"kind": "imported", "name": "given"}, {"kind": "causal_logps", "model": "policy"}],
    "train": [{**TRAIN, "name": "theta", "selection": "all"}],
}
V = {"name": "v", "model": "theta", "reference": "policy"}
RM = {"kind": "reward", "name": "rm", "model": "policy", "learning_rate": 1e-3}
PD = {"name": "pd", "metric": "preference_divergence", "params": {"aspects": ["a", "b"], "source": "ratings"}}
RATED = [*WARMED["scorers"], {"kind": "imported", "name": "rated", "field": ["a", "b"], "as": "ratings"}]
INFLUENCE = {"policy": "theta", "reference": "policy", "tangent": "v"}
WITH_DLOGPS = [
    *WARMED["scorers"],
    {"kind": "causal_logps", "model": "theta"},
    {"kind": "directional_logps", "tangent": "v"},
]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"tangents": [V], "split": {"proxy": 0.2}}, ["tangents.v", "split.validation"]),
        ({"tangents": [{**V, "model": "phi"}]}, ["tangents.v.model", "phi", "theta"]),
        ({"tangents": [{**V, "reference": "theta"}]}, ["tangents.v.reference", "theta", "policy"]),
        ({"tangents": [{**V, "preconditioner": "adam"}]}, ["tangents.v.model", "keep_optimizer_state"]),
        ({"tangents": [{**V, "by": "aspect"}]}, ["tangents.v: ", "by and values go together"]),
        ({"scorers": [*WARMED["scorers"], {"kind": "directional_logps", "tangent": "v"}]}, ["tangent", "empty"]),
        (
            {"tangents": [V], "scorers": [*WARMED["scorers"], {"kind": "pair_gradients", "tangent": "v"}]},
            ["tangents.v.model", "keep_optimizer_state"],
        ),
        (
            {
                "tangents": [V],
                "scorers": WITH_DLOGPS,
                "metrics": [{"name": "if", "metric": "influence", "params": {**INFLUENCE, "beta": 0.2}}],
            },
            ["metrics.if.params.beta", "0.2", "0.1", "any_beta"],
        ),
        (
            {"metrics": [{"name": "if", "metric": "influence", "params": INFLUENCE}]},
            ["metrics.if", "logps_theta", "causal_logps"],
        ),
        (
            {"train": [RM], "scorers": [*WARMED["scorers"], {"kind": "reward_model", "model": "rm"}]},
            ["scorers.rm", "trained on", "cross_fit"],
        ),
        ({"train": [{**TRAIN, "selection": "validation"}], "split": {"proxy": 0.2}}, ["train.dpo", "split.validation"]),
        ({"train": [{**TRAIN, "selection": "all", "loss": "simpo", "simpo_gamma": 1.0}]}, ["reference", "simpo"]),
        ({"train": [{**TRAIN, "selection": "all", "order": "score"}]}, ["train.dpo.order", "score"]),
        (
            {"train": [{**TRAIN, "selection": "all", "loss": "dfpo", "num_aspects": 2, "divergence": "margin"}]},
            ["train.dpo.divergence", "margin", "preference_divergence"],
        ),
        (
            {
                "scorers": RATED,
                "metrics": [PD],
                "train": [{**TRAIN, "selection": "all", "loss": "dfpo", "num_aspects": 3, "divergence": "pd"}],
            },
            ["train.dpo.num_aspects", "3", "2"],
        ),
        ({"selections": [{"name": "all", "rule": {}}]}, ["selections.name", "part of the corpus"]),
        (
            {
                "tangents": [V],
                "scorers": WITH_DLOGPS,
                "metrics": [{"name": "if", "metric": "influence", "params": {**INFLUENCE, "policy": "policy"}}],
            },
            ["metrics.if.params.policy", "'theta', the tangent's"],
        ),
        (
            {"metrics": [{"name": "if", "metric": "influence", "params": {**INFLUENCE, "beta": "high"}}]},
            ["metrics.if", "beta", "high"],
        ),
        (
            {
                "scorers": [*WARMED["scorers"], {"kind": "causal_logps", "model": "theta"}],
                "metrics": [
                    {
                        "name": "easy",
                        "metric": "selective_dpo",
                        "params": {"policies": ["theta"], "reference": "policy"},
                    }
                ],
            },
            ["metrics.easy.params.policies", "theta", "cross_fit"],
        ),
        (
            {
                "train": [
                    {**TRAIN, "selection": "all", "name": "half", "cross_fit": {}},
                    {**TRAIN, "selection": "all", "model": "half"},
                ]
            },
            ["train.dpo.model", "half", "one per fold"],
        ),
        (
            {"train": [*WARMED["train"], {**RM, "model": "theta", "aspects": ["a", "b"]}]},
            ["train.rm.model", "theta", "remember"],
        ),
        (
            {
                "train": [{**RM, "aspects": ["a", "b"]}],
                "scorers": [*WARMED["scorers"], {"kind": "generated_reward", "model": "rm", "policy": "policy"}],
            },
            ["scorers.rm-generated.model", "rm", "one per fold or aspect"],
        ),
        (
            {
                "train": [{**RM, "aspects": ["a", "b"]}],
                "sources": [{"name": "a", "paths": ["a.jsonl"], "options": {"aspects": "all"}}],
            },
            ["train.rm.cross_fit", "several aspects"],
        ),
        (
            {
                "train": [{**RM, "aspects": ["a", "b"], "length_penalty_rho": 0.01}],
                "scorers": [*WARMED["scorers"], {"kind": "reward_model", "model": "rm"}],
                "metrics": [{**PD, "params": {"aspects": ["a", "b"]}}],
            },
            ["metrics.pd.params.rho", "0.01", "fit"],
        ),
        ({"split": {"validation": 0.2}}, ["split.proxy", "policy"]),
        ({"metrics": [*BASE["metrics"], {"name": "random-margin", "metric": "random"}]}, ["metrics.name", "controls"]),
        (
            {"metrics": [{**PD, "params": {"aspects": ["a"], "source": "ratings"}}], "scorers": RATED},
            ["aspects", "at least two"],
        ),
    ],
)
def test_mistakes_with_methods(
    here: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], parts: list[str]
) -> None:
    message = refused(here, capsys, BASE | {"split": {"proxy": 0.2, "validation": 0.2}} | WARMED | change)
    for part in parts:
        assert part in message
