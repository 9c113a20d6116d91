"""What another engine is asked to rewrite, and what is kept of its answers: what this package's own would give."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from prefsel.generate.answered import Refusal, Said
from prefsel.generate.engine import Response
from prefsel.generate.requests import PolicyText
from prefsel.generate.shard import PolicyAnswers
from prefsel.schema import GROUPS, ID
from prefsel.selfplay.shard import rewrite, rewritings
from prefsel.selfplay.strategies import load_strategies, strategy_prompt
from prefsel.stages.rewrite import RewritingQuestions
from prefsel.stages.vllm import ShardWork
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

STRATEGIES = tuple(load_strategies(["deepen", "breadth"]))
IDS = [bytes([number]) * 16 for number in range(4)]
PROMPTS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "not chosen"}],
    [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": "la"}],  # no turn to rewrite
    [{"role": "user", "content": "Count to ten."}],
]


def said(prompt_id: bytes, sample: int) -> Said:
    """The third prompt's second strategy is refused, as a template would."""
    if (prompt_id, sample) == (IDS[3], 1):
        return Refusal("too_long", "")
    return [Response([1] * (sample + 1), f"{prompt_id.hex()[:2]} by {sample}", "end")]


class Policy:
    """Says what `said` does."""

    def ask(self, prompts: list[Any], keys: list[int], *, samples: int, first_sample: int) -> list[Said]:
        assert samples == 1
        return [said(key.to_bytes(8, "big") * 2, first_sample) for key in keys]


def test_shards_are_rewritten_alike_by_either_engine(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    groups = pa.table(
        {"prompt_id": IDS, "prompt": PROMPTS, "completions": [[]] * 4, "provenance": [{"row": 0}] * 4}, schema=GROUPS
    )
    Artifact(storage, "groups/s").commit("a", groups, made_from="x", attempt="1")
    chosen = pa.table({"prompt_id": pa.array([IDS[3], IDS[0], IDS[3], IDS[2]], ID)})
    Artifact(storage, "selections/top/s").commit("a", chosen, made_from="x", attempt="1")
    questions = RewritingQuestions(STRATEGIES, storage, "selections/top", "rewritten/e")
    asked = questions.ask("s", "a")
    assert [(one.prompt_id, list(one.samples)) for one in asked] == [
        *((IDS[0], [0]), (IDS[3], [0])),
        *((IDS[0], [1]), (IDS[3], [1])),
    ]
    assert [one.messages for one in asked] == [
        strategy_prompt(strategy, PROMPTS[place]) for strategy in STRATEGIES for place in (0, 3)
    ]
    answers = [said(one.prompt_id, one.samples[0]) for one in asked]
    shard = ShardWork("s", "a", "hash", "attempt")
    questions.commit(shard, answers, {"decoded_tokens": 4.0}, cast(PolicyText, None))
    artifact = Artifact(storage, "rewritten/e/s")
    assert artifact.is_done("a", "hash")
    found = artifact.read("a")
    kept = groups.take([0, 2, 3]).select(["prompt_id", "prompt"])
    assert found.equals(rewrite(cast(PolicyAnswers, Policy()), kept, STRATEGIES))
    assert [(row["strategy"], row["answer"], row["stop"]) for row in found.to_pylist()] == [
        ("deepen", "00 by 0", "end"),
        ("deepen", "no_user_turn", "not_asked"),
        ("deepen", "03 by 0", "end"),
        ("breadth", "00 by 1", "end"),
        ("breadth", "no_user_turn", "not_asked"),
        ("breadth", "too_long", "not_asked"),
    ]


def test_workers_need_no_file_of_a_strategy(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("{name: own, kind: depth, template: 'Longer: {prompt}'}")
    own = load_strategies([str(file)])
    file.write_text("{name: own, kind: depth, template: 'Shorter: {prompt}'}")
    prompts = pa.table({"prompt_id": pa.array(IDS[:1], ID), "prompt": PROMPTS[:1]})
    (asked,) = pickle.loads(pickle.dumps(partial(rewritings, strategies=own)))(prompts)
    assert asked.messages == [{"role": "user", "content": "Longer: Why is the sky blue?"}]
