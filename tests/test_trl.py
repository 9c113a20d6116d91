"""TRL trains on stored reference log-probs as on its own, and is refused where they belong to other tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

sys.path.append(str(Path(__file__).parent / "train"))
from tiny_policy import CHAT_TEMPLATE, TinyRun, make_tiny_run, make_tokenizer, naive_logps

from prefsel.cli import app, guarded
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.ingest.identity import completion_id, pair_id, prompt_id
from prefsel.pipeline import run
from prefsel.progress import Progress

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from prefsel.trl import DPOTrainer  # noqa: E402

CALL = [{"type": "function", "function": {"name": "w3", "arguments": {"place": "w4"}}}]
TOOLS = [{"type": "function", "function": {"name": "w3", "parameters": {"type": "object", "properties": {}}}}]
TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}"
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is not none %}{{ m['content'] }} {% endif %}"
    "{% if m['tool_calls'] is defined %}{% for c in m['tool_calls'] %}{{ c['function']['name'] }} "
    "{% for k, v in c['function']['arguments'].items() %}{{ v }} {% endfor %}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"), make_tokenizer())


def rows_of(tiny: TinyRun) -> list[dict[str, Any]]:
    """Pairs with the naive oracle's log-probs under the names that a data set has."""
    rows = tiny.train.to_pylist()
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"logps_policy_{side}"] = row.pop(f"reference_logps_{side}")
    return rows


def load(tiny: TinyRun) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.model_dir, dtype=torch.float32)


def config(folder: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam makes whole steps of gradients that are rounding alone
        "logging_steps": 1,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return trl.DPOConfig(str(folder), **{**arguments, **options})


def make(tiny: TinyRun, folder: Path, rows: Any, *, tokenizer: Any = None, args: Any = None, **options: Any) -> Any:
    data = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    return DPOTrainer(
        options.pop("model", None) or load(tiny),
        args=args or config(folder),
        train_dataset=data,
        processing_class=tokenizer or AutoTokenizer.from_pretrained(tiny.model_dir),
        **{"reference": "policy", **options},
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_two_steps_on_stored_log_probs_are_trls_own(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trl.DPOTrainer(
        load(tiny),
        ref_model=load(tiny),
        args=config(tmp_path / "own"),
        train_dataset=datasets.Dataset.from_list(rows_of(tiny)),
        processing_class=AutoTokenizer.from_pretrained(tiny.model_dir),
    )
    wanted = losses(own)
    passes = []
    whole = trl.DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(trl.DPOTrainer, "compute_ref_log_probs", lambda *given: passes.append(1) or whole(*given))
    ours = make(tiny, tmp_path / "ours", rows_of(tiny), check_pairs=0)
    assert ours.ref_model is None
    assert losses(ours) == pytest.approx(wanted, abs=1e-6)
    assert not passes, "TRL's own pass was to be off"
    assert len(wanted) == 2
    assert wanted[0] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(wanted[1] - np.log(2)) > 1e-2, "the second step must depend on the reference"
    for (name, one), other in zip(own.model.named_parameters(), ours.model.parameters()):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5, msg=name)


def test_some_pairs_are_run_through_the_reference(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    whole = trl.DPOTrainer.compute_ref_log_probs

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        seen.append(len(inputs["input_ids"]) // 2)
        return whole(self, model, inputs)

    monkeypatch.setattr(trl.DPOTrainer, "compute_ref_log_probs", counted)
    make(tiny, tmp_path, rows_of(tiny), check_pairs=6)
    assert sum(seen) == 6
    torch.manual_seed(9)
    other = LlamaForCausalLM(load(tiny).config)
    with pytest.raises(UserError, match=r"it is not the model that scored logps_policy"):
        make(tiny, tmp_path, rows_of(tiny), model=other)
    make(tiny, tmp_path, rows_of(tiny), model=other, ref_model=load(tiny))
    turned = rows_of(tiny)
    turned[0]["logps_policy_chosen"] -= 0.06 * 20
    with pytest.raises(
        UserError, match=rf"the reference gives .* for chosen of pair {turned[0]['pair_id']}, stored is"
    ):
        make(tiny, tmp_path, turned)


def test_the_pairs_that_are_run_are_spread_over_the_data_set(tiny: TinyRun, tmp_path: Path) -> None:
    """Two data sets behind one another, of which the second one was scored by another model."""
    rows = rows_of(tiny)
    for row in rows[11:]:
        row["logps_policy_rejected"] -= 0.06 * 20
    with pytest.raises(UserError, match=r"for rejected of pair 0{30}(0b|0c|0d|0e|0f|1\d), stored is"):
        make(tiny, tmp_path, rows)
    assert len(make(tiny, tmp_path, rows[:1]).train_dataset) == 1


def test_a_reference_that_gives_no_number_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    broken = load(tiny)
    with torch.no_grad():
        broken.lm_head.weight[:] = torch.nan
    with pytest.raises(UserError, match=r"the reference gives nan nats for chosen of pair 0{32}, stored is"):
        make(tiny, tmp_path, rows_of(tiny), model=broken)


def identified(tiny: TinyRun) -> list[dict[str, Any]]:
    """Rows with the ids that ingest gives them."""
    rows = rows_of(tiny)
    for number, row in enumerate(rows):
        prompt = prompt_id(row["prompt"])
        row |= {"prompt_id": prompt.hex(), "aspect": "help" if number % 2 else None}
        chosen, rejected = (completion_id(prompt, row[side]) for side in ("chosen", "rejected"))
        row["pair_id"] = pair_id(prompt, chosen, rejected, row["aspect"]).hex()
    return rows


def of_as_many_words(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Another answer of the same length in the rows behind the second."""
    words = row["chosen"][0]["content"].split()
    return {"chosen": [{"role": "assistant", "content": " ".join(reversed(words))}]} if number >= 2 else {}


def swapped(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {"chosen": row["rejected"], "rejected": row["chosen"]} if number == 5 else {}


def another_prompt(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": "w1 w2"}]} if number == 21 else {}


@pytest.mark.parametrize(("change", "count"), [(of_as_many_words, 20), (swapped, 1), (another_prompt, 1)])
def test_text_that_was_changed_since_is_refused(tiny: TinyRun, tmp_path: Path, change: Any, count: int) -> None:
    data = datasets.Dataset.from_list(identified(tiny))
    told = rf"of {count} of 22 pairs is not the one that was scored, first [0-9a-f]{{32}}: its pair_id was made"
    with pytest.raises(UserError, match=f"train: the text or the aspect {told}"):
        make(tiny, tmp_path, data.map(change, with_indices=True), check_pairs=0)
    late = {"late": data.map(change, with_indices=True)}
    with pytest.raises(UserError, match=f"late: the text or the aspect {told}"):
        make(tiny, tmp_path, data, eval_dataset=late, check_pairs=0)


def flipped(row: dict[str, Any], number: int) -> dict[str, Any]:
    """As a rule with the action `flip` writes a pair whose label it turns: under the name of the labelled one."""
    sides = [f"{name}{side}" for name in ("", "logps_policy_") for side in ("chosen", "rejected")]
    if number % 3:
        return {"flipped": False}
    exchanged = {one: row[other] for one, other in zip(sides, [sides[1], sides[0], sides[3], sides[2]])}
    return {"flipped": True, **exchanged}


def test_a_turned_pair_is_the_one_that_was_scored(tiny: TinyRun, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(identified(tiny)).map(flipped, with_indices=True)
    trainer = make(tiny, tmp_path, data, check_pairs=22, tolerance=1e-5)
    by_id = {row["pair_id"]: row for row in identified(tiny)}
    for row in trainer.train_dataset:
        side = "rejected" if row["flipped"] else "chosen"
        assert row["ref_chosen_logps"] == pytest.approx(by_id[row["pair_id"]][f"logps_policy_{side}"])
    lost = data.remove_columns("flipped")
    with pytest.raises(UserError, match="the text or the aspect of 8 of 22 pairs is not the one that was scored"):
        make(tiny, tmp_path, lost, check_pairs=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.shuffle(seed=1),
        lambda data: data.select([3, 1, 20]),
        lambda data: data.filter(lambda row: row["aspect"] is None),
        lambda data: data.map(lambda row: {"note": "mine"}),
        lambda data: data.with_format("torch"),
        lambda data: data.with_format("numpy", columns=["prompt", "logps_policy_chosen"]),
    ],
    ids=["shuffled", "selected", "filtered", "with a column more", "as tensors", "some columns as arrays"],
)
def test_other_rows_of_the_same_text_are_trained_on(tiny: TinyRun, tmp_path: Path, change: Any) -> None:
    data = change(datasets.Dataset.from_list(identified(tiny)))
    trainer = make(tiny, tmp_path, data, check_pairs=22, tolerance=1e-5)
    stored = {row["pair_id"]: row["logps_policy_chosen"] for row in identified(tiny)}
    found = trainer.train_dataset
    assert len(found) == len(data) > 0
    assert [stored[one] for one in found["pair_id"]] == pytest.approx(list(found["ref_chosen_logps"]))


def test_pairs_that_trl_leaves_out_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """All but one fit; the prompt of that one alone is longer, and TRL would drop it with no word."""
    rows, model = rows_of(tiny), load(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model_dir)
    long = rows[4]
    long["prompt"] = [{"role": "user", "content": " ".join(["w1"] * 70)}]
    for side in ("chosen", "rejected"):
        long[f"logps_policy_{side}"] = naive_logps(model, tokenizer, long["prompt"], long[side]).item()
    make(tiny, tmp_path, rows)
    told = r"TRL leaves out 1 of 22 pairs, whose prompt alone fills max_length=60 of DPOConfig; raise it"
    with pytest.raises(UserError, match=told):
        make(tiny, tmp_path, rows, args=config(tmp_path, max_length=60))


def test_a_data_set_that_is_not_what_was_written_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(rows_of(tiny))
    for changed, told in (
        (data.select([]), "train: the data set has no rows"),
        (data.with_transform(lambda rows: rows), "the data set has a transform"),
        (data.map(lambda row: {"prompt": row["prompt"][0]["content"]}), "got text in prompt; valid: lists of messages"),
        (data.add_column("ref_chosen_logps", [0.0] * 22), "has ref_chosen_logps already; remove them"),
    ):
        with pytest.raises(UserError, match=told):
            make(tiny, tmp_path, changed)


@pytest.mark.parametrize(
    ("scored", "trained", "told"),
    [
        (
            {"template": CHAT_TEMPLATE.replace("{{ m['role'] }}", "w0").replace("assistant", "w0")},
            {},
            "part at token 1:",
        ),
        ({"template": CHAT_TEMPLATE.replace(" {{ eos_token }}", " ")}, {}, "TRL would train on other tokens"),
        ({}, {"max_length": 12}, "TRL has 12 tokens"),
        ({"max_length": 12, "truncation": "right"}, {}, "TRL would train on other tokens"),
        ({"max_length": 12}, {}, "scoring leaves it out as too_long"),
        ({"max_length": 20, "truncation": "left"}, {"max_length": 20}, "TRL would train on other tokens"),
    ],
    ids=["another role", "no end of turn", "TRL cuts", "scoring cut", "scoring left out", "cut on the other side"],
)
def test_other_tokens_are_refused(
    tiny: TinyRun, tmp_path: Path, scored: dict[str, Any], trained: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        make(tiny, tmp_path, rows_of(tiny), args=config(tmp_path, **trained), check_pairs=0, **scored)
    assert "The first is pair 000" in str(caught.value)
    assert "or train with trl.DPOTrainer" in str(caught.value)


def test_what_both_sides_cut_alike_is_trained_on(tiny: TinyRun, tmp_path: Path) -> None:
    args = config(tmp_path, max_length=20)
    trainer = make(tiny, tmp_path, rows_of(tiny), args=args, check_pairs=0, max_length=20, truncation="right")
    assert len(trainer.train_dataset) == 22


def test_a_tokenizer_that_counts_otherwise_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    rows = rows_of(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model_dir)
    for row in rows:
        for side in ("chosen", "rejected"):
            words = len(row[side][0]["content"].split())
            row[f"num_tokens_policy_{side}"] = float(words + 1)  # the end of the turn
    make(tiny, tmp_path, rows, tokenizer=tokenizer)
    rows[5]["num_tokens_policy_rejected"] += 1
    with pytest.raises(UserError, match=rf"for 1 of 44 responses. The first is pair {rows[5]['pair_id']}, rejected"):
        make(tiny, tmp_path, rows, tokenizer=tokenizer)


def test_gaps_and_wrong_names_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    rows = rows_of(tiny)
    with pytest.raises(UserError, match="lacks logps_other_chosen, logps_other_rejected; it has pair_id, prompt"):
        make(tiny, tmp_path, rows, reference="other")
    rows[3]["logps_policy_rejected"] = None
    with pytest.raises(UserError, match=rf"1 of 22 pairs have no logps_policy_rejected, the first is pair {3:032x}"):
        make(tiny, tmp_path, rows)
    with pytest.raises(UserError, match="ld_alpha weighs single tokens"):
        make(tiny, tmp_path, rows_of(tiny), args=config(tmp_path, ld_alpha=0.5))
    with pytest.raises(UserError, match=r"got IterableDataset; valid: datasets\.Dataset"):
        make(tiny, tmp_path, datasets.Dataset.from_list(rows_of(tiny)).to_iterable_dataset())


@pytest.mark.parametrize("stored_as", ["rest beside role and content", "messages as they came"])
def test_tool_calls_and_tools_reach_trls_template(tiny: TinyRun, tmp_path: Path, stored_as: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model_dir)
    tokenizer.chat_template = TOOL_TEMPLATE
    history = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "w7"},
    ]
    model, rows = load(tiny).eval(), []
    for number in range(4):
        prompt = history if number % 2 else history[:1]
        row: dict[str, Any] = {"pair_id": f"{number:032x}"}
        sides = {side: [{"role": "assistant", "content": f"w{number} {word}"}] for side, word in SIDES.items()}
        for side, messages in sides.items():
            tokenizer.chat_template = TOOL_TEMPLATE.replace("if tools", "if true").replace(
                "tools[0]['function']['name']", "'w3'"
            )
            row[f"logps_policy_{side}"] = naive_logps(model, tokenizer, prompt, messages).item()
        tokenizer.chat_template = TOOL_TEMPLATE
        if stored_as.startswith("rest"):
            first = {**prompt[0], "tools": TOOLS}
            row |= {
                name: [kept(one) for one in found] for name, found in {"prompt": [first, *prompt[1:]], **sides}.items()
            }
        else:
            row |= {"prompt": prompt, **sides, "tools": json.dumps(TOOLS)}
        rows.append(row)
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    args = config(tmp_path, per_device_train_batch_size=2)
    trainer = make(tiny, tmp_path, data, tokenizer=tokenizer, args=args, tolerance=1e-4)
    written = [tokenizer.decode(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert ["w3 w4" in text for text in written] == [False, True, False, True]
    assert all(text.startswith("<bos> w3 ") for text in written)
    assert losses(trainer)[0] == pytest.approx(np.log(2), abs=1e-5)


SIDES = {"chosen": "w8", "rejected": "w9 w10"}


def kept(message: dict[str, Any]) -> dict[str, Any]:
    """A message as data sets of `select` keep it."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"role": message["role"], "content": message["content"], "rest": json.dumps(rest) if rest else None}


@pytest.fixture(scope="module")
def selected(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A run on text and on calls, scored by the tiny policy with a template that writes them; everything is kept."""
    home = tmp_path_factory.mktemp("selected")
    model_dir = home / "model"
    shutil.copytree(tiny.model_dir, model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(model_dir)
    text = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in tiny.train.to_pylist()[:6]]
    calls = []
    for number in range(5):
        history = [
            {"role": "user", "content": f"w{number} w2"},
            {"role": "assistant", "content": None, "tool_calls": CALL},
            {"role": "tool", "content": "w7"},
        ]
        sides = {side: [{"role": "assistant", "content": f"w{number} {words}"}] for side, words in SIDES.items()}
        calls.append({"prompt": history, **sides, "tools": TOOLS})
    for name, rows in {"text": text, "calls": calls}.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "trl",
        "sources": [{"name": name, "paths": [str(home / f"{name}.jsonl")]} for name in ("text", "calls")],
        "models": [{"kind": "pretrained", "name": "policy", "path": str(model_dir), "dtype": "fp32"}],
        "scorers": [{"kind": "causal_logps", "model": "policy"}],
        "metrics": [{"name": "margin", "metric": "implicit_margin", "params": {"policy": "policy"}}],
        "selections": [{"name": "every", "rule": {"kind": "top", "score": "score_margin", "ratio": 1.0}}],
    }
    run(parse_config(settings), str(home / "w"), Progress(quiet=True))
    return home


@pytest.mark.parametrize("opened_as", ["the data set of select", "the folder of export"])
def test_a_run_s_log_probs_are_those_of_its_data_set(selected: Path, tmp_path: Path, opened_as: str) -> None:
    (folder,) = (selected / "w/datasets").iterdir()
    if opened_as == "the folder of export":
        folder = tmp_path / "exported"
        chosen = ["--selection", "every", "--for", "trl", "--output", str(folder)]
        assert guarded(app, ["export", str(selected / "w"), *chosen]) == 0
    assert 'reference="policy"' in (folder / "README.md").read_text()
    data = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(selected / "model", dtype=torch.float32)
    trainer = DPOTrainer(
        model,
        args=config(tmp_path / "out", learning_rate=0.01),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(selected / "model"),
        reference="policy",
        check_pairs=11,
        tolerance=1e-5,  # of 40 nats in fp32, whose last digit is 4e-6
    )
    assert len(trainer.train_dataset) == 11
    decoded = [trainer.processing_class.decode(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert sum("assistant w3 w4 " in text and text.startswith("<bos> w3 ") for text in decoded) == 5
    assert losses(trainer)[0] == pytest.approx(np.log(2), abs=1e-5)


def test_a_missing_trl_is_named() -> None:
    code = "import sys; sys.modules['trl'] = None; import prefsel; prefsel.trl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "install it with: pip install -c constraints.txt 'prefsel[trl]'" in done.stderr
