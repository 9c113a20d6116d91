"""The command line as a new user meets it: every mistake is one message, exit 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
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
            ["metrics.margin", "'rm_x'", "reward_model or imported", "made: rm_gold"],
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
    (here / "model" / "config.json").write_text("{}")
    assert "no *.safetensors" in refused(here, capsys, BASE | {"models": [MODEL]})
    (here / "model" / "model.safetensors").write_bytes(b"")
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
    assert "report: " in first
    assert guarded(app, ["run", "c.yaml", "--workspace", "w"]) == 0
    again = capsys.readouterr().out
    assert "nothing to do" in again
    assert first.splitlines()[-1] == again.splitlines()[-1]
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


def test_the_schema_lists_rules_and_metrics() -> None:
    schema = json.loads(CliRunner().invoke(app, ["config-schema"]).stdout)
    assert "sources" in schema["properties"]
    assert {"top", "band", "quota"} <= set(schema["rules"])
    assert "gamma" in schema["metrics"]["preference_divergence"]["properties"]


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
    from prefsel.configfile import load_config
    from prefsel.select.rules import parse_rule

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
