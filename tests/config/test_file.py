"""Bad configurations: one readable message that names field, value and valid ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefsel.config.file import apply_override, load_config, parse_config
from prefsel.errors import UserError

BASE: dict[str, Any] = {"name": "x", "sources": [{"name": "uf", "paths": ["a.jsonl"]}]}
TRAIN = {"name": "t", "selection": "s", "model": "m", "reference": "m", "learning_rate": 1e-6}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"trian": []}, ["trian", "unknown key", "did you mean 'train'"]),
        ({"scorers": [{"kind": "causal_logps", "modle": "a"}]}, ["modle", "did you mean 'model'", "token_budget"]),
        (
            {"models": [{"kind": "pretraind", "name": "a"}]},
            ["models.a.kind: got 'pretraind'", "did you mean 'pretrained'?", "scratch_policy"],
        ),
        ({"train": [TRAIN | {"zero_stage": 4}]}, ["train.t.zero_stage", "got 4", "0, 1, 2 or 3"]),
        ({"train": [TRAIN | {"zero_stage": 2, "offload": "optimizer_and_weights"}]}, ["offload", "zero_stage 3"]),
        ({"split": {"holdout": 0.6, "proxy": 0.6}}, ["split", "1.2", "below 1"]),
        ({"sources": []}, ["sources", "at least 1"]),
        ({"name": "a b"}, ["name", "'a b'"]),
        ({"scorers": [{"kind": "causal_logps", "model": "a", "pool": {"size": 2, "max_size": 3}}]}, ["pool", "size"]),
    ],
)
def test_messages_name_field_value_and_valid_ones(change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(BASE | change)
    for part in parts:
        assert part in str(caught.value)


MODEL = {"name": "m", "path": "./m"}
SCRATCH = {"name": "m", "kind": "scratch_policy"}
SCORER = {"model": "m"}


def test_an_entry_without_a_kind_has_the_default_where_there_is_one() -> None:
    config = parse_config(BASE | {"models": [MODEL], "train": [TRAIN]})
    assert config == parse_config(
        BASE | {"models": [MODEL | {"kind": "pretrained"}], "train": [TRAIN | {"kind": "dpo"}]}
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"models": [MODEL | {"kind": None}]}, "models.m.kind: got None; valid: pretrained, scratch_policy, scratch_r"),
        ({"models": [MODEL | {"kind": 3}]}, "models.m.kind: got 3; valid: pretrained"),
        ({"models": [MODEL | {"kind": ["pretrained"]}]}, "models.m.kind: got ['pretrained']; valid: pretrained"),
        ({"models": [MODEL | {"kind": "Pre-Trained"}]}, "got 'Pre-Trained'; did you mean 'pretrained'? valid: "),
        ({"models": ["./m"]}, "models.0: got './m'; valid: a table of keys"),
        ({"models": MODEL}, "models: got {'name': 'm', 'path': './m'}; valid: a list"),
        (
            {"models": [{"name": "m"}]},
            "models.m.path: required, but missing (`kind` is missing, so it",
        ),
        (
            {"models": [MODEL | {"hidden_size": 8}]},
            "(`kind` is missing, so it is 'pretrained'; kinds with this key: scratch_policy, scratch_reward)",
        ),
        (
            {"models": [SCRATCH | {"tokenizer": {"kind": "bp"}}]},
            "tokenizer.kind: got 'bp'; did you mean 'bpe'? ",
        ),
        ({"scorers": [SCORER]}, "scorers.m.kind: required, but missing; valid: causal_logps, reward_model"),
        ({"scorers": [SCORER | {"kind": None}]}, "scorers.m.kind: got None; valid: causal_logps"),
        ({"scorers": [SCORER | {"kind": "logps"}]}, "got 'logps'; did you mean 'causal_logps'? valid: causal_logps"),
        ({"scorers": ["imported"]}, "scorers.0: got 'imported'; valid: a table of keys"),
        ({"train": [TRAIN | {"kind": None}]}, "train.t.kind: got None; valid: dpo, reward"),
        (
            {"train": [TRAIN | {"kind": "rewrd"}]},
            "train.t.kind: got 'rewrd'; did you mean 'reward'? valid: dpo",
        ),
        ({"train": [TRAIN | {"aspects": ["a"]}]}, "(`kind` is missing, so it is 'dpo'; kinds with this key: reward)"),
        ({"train": [TRAIN | {"lora": {"rank": 8}}]}, "train.t.lora.rank: unknown key; "),
        ({"selections": [{"name": "s", "rule": "top"}]}, "selections.s.rule: got 'top'; valid: a table of keys"),
    ],
)
def test_a_kind_that_is_missing_or_wrong(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(BASE | change)
    assert told in str(caught.value)


def test_overrides_reach_lists_by_name_and_index() -> None:
    table = {"sources": [{"name": "uf", "paths": ["a"]}], "train": [{"name": "t", "learning_rate": 1}]}
    apply_override(table, "sources.uf.paths=[b, c]")
    apply_override(table, "train.0.learning_rate=1e-4")
    apply_override(table, "split.holdout=0.1")
    assert table == {
        "sources": [{"name": "uf", "paths": ["b", "c"]}],
        "train": [{"name": "t", "learning_rate": 1e-4}],
        "split": {"holdout": 0.1},
    }


@pytest.mark.parametrize("override", ["nothing", "sources.hh.paths=x", "sources.uf.name.deep=1", "a=[1"])
def test_bad_overrides_say_so(override: str) -> None:
    with pytest.raises(UserError, match="--set"):
        apply_override({"sources": [{"name": "uf", "paths": ["a"]}]}, override)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="table of keys"):
        load_config(tmp_path / "list.yaml")


def test_a_file_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: x\nsources:\n- {name: uf, paths: [a.jsonl]}\n")
    config = load_config(tmp_path / "c.yaml", ["split.holdout=0.2", "sources.uf.format=transcript"])
    assert config.split.holdout == 0.2
    assert config.sources[0].format == "transcript"
