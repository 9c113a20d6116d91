"""Two shards in an actor's hand: one computes at a time, the other is read meanwhile; nothing twice, nothing lost."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_scorers import folder, table  # noqa: F401

from prefsel.config import CausalLogps
from prefsel.errors import UserError
from prefsel.score.job import Job
from prefsel.score.kinds import Loaded, load
from prefsel.score.scorers import CausalLogpsScorer
from prefsel.score.summary import measured
from prefsel.stages import actor as actor_module
from prefsel.stages import telemetry
from prefsel.stages.actor import ScoreShards
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

NAMES = [f"s{number}" for number in range(6)]
COLUMNS = "columns/tiny@0"


@pytest.fixture
def storage(tmp_path):
    """Six shards of one group or more."""
    made = Storage(str(tmp_path / "w"))
    for number, name in enumerate(NAMES):
        groups = table().slice(number % 3, 1 + number % 2)
        artifact = Artifact(made, "groups/a")
        artifact.commit(name, groups, made_from=name, attempt="0")
    return made


def job(folder, **options):  # noqa: F811
    settings = {"path": str(folder), "dtype": "fp32", "template": "auto", "max_length": 256, "truncation": "drop"}
    settings |= {"revision": None, "trust_remote_code": False, "gpus_per_replica": 1, "made_here": False}
    return Job(CausalLogps(kind="causal_logps", model="tiny"), ((None, settings | options),), label="tiny")


def call(scoring, name):
    return scoring({"source": ["a"], "shard": [name], "made_from": [name]})


def columns(storage):
    artifact = Artifact(storage, f"{COLUMNS}/a")
    return {name: artifact.read(name)["logps_tiny"].to_pylist() for name in artifact.entries()}


def test_two_threads_give_the_columns_of_one(folder, storage):  # noqa: F811
    seen = []
    scoring = ScoreShards([job(folder)], storage, [COLUMNS], record=lambda *counted: seen.append(counted))
    with ThreadPoolExecutor(2) as pool:
        returned = list(pool.map(lambda name: call(scoring, name), NAMES))
    assert [(one["source"], one["shard"]) for one in returned] == [(["a"], [name]) for name in NAMES]
    tokens = {name: one["tokens"][0] for name, one in zip(NAMES, returned)}
    alone = CausalLogpsScorer(name="tiny", path=str(folder), dtype="fp32", device="cpu")
    for name in NAMES:
        groups = Artifact(storage, "groups/a").read(name)
        assert columns(storage)[name] == alone.score(groups).columns["logps_tiny"]
    entries = Artifact(storage, f"{COLUMNS}/a").entries().values()
    assert tokens == {entry.shard: entry.info["counters"]["trunk_tokens"] for entry in entries}
    assert Artifact(storage, f"{COLUMNS}/a").attempts() == dict.fromkeys(NAMES, 1)
    details = measured([entry.info for entry in entries])
    groups = sum(1 + number % 2 for number in range(6))
    assert details["counters"]["groups_read"] == details["counters"]["groups_tokenised"] == groups
    assert {label for label, _, _ in seen} == {"tiny"}
    for name in ("trunk_tokens", "head_rows", "flops_model", "flops_min"):
        assert sum(counters[name] for _, counters, _ in seen) == details["counters"][name] > 0
    assert 0 < details["shares"]["useful_mfu"] < 1
    assert details["shares"]["useful_mfu"] == pytest.approx(
        details["counters"]["flops_min"] / details["counters"]["flops_possible"]
    )
    assert details["facts"]["token_budget"] == details["facts"]["token_budget_least"] == 8192


def test_one_shard_has_the_models_while_the_next_is_begun(folder, storage, monkeypatch):  # noqa: F811
    """The second shard is read and begun while the first computes, and computes only after it."""
    events, second_begun = [], threading.Event()
    real = load([job(folder)], storage)

    def begin(shard, groups):
        compute = real.begin(shard, groups)
        events.append(f"begin {shard.shard}")
        if len(events) > 1:
            second_begun.set()

        def run():
            events.append(f"in {shard.shard}")
            assert second_begun.wait(10)
            scored = compute()
            events.append(f"out {shard.shard}")
            return scored

        return run

    monkeypatch.setattr(actor_module, "load", lambda jobs, storage: Loaded(begin, None))
    scoring = ScoreShards([job(folder)], storage, [COLUMNS], record=lambda *counted: None)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: call(scoring, name), NAMES[:2]))
    turns = [event for event in events if not event.startswith("begin")]
    first, second = (turn.split()[1] for turn in turns[::2])
    assert turns == [f"in {first}", f"out {first}", f"in {second}", f"out {second}"]
    assert events.index(f"begin {second}") < events.index(f"out {first}")


def test_a_repeated_task_commits_nothing_twice(folder, storage):  # noqa: F811
    scoring = ScoreShards([job(folder)], storage, [COLUMNS], record=lambda *counted: None)
    first, again = call(scoring, "s0"), call(scoring, "s0")
    assert again == {"source": ["a"], "shard": ["s0"], "tokens": [0]}
    assert first["tokens"][0] > 0
    assert Artifact(storage, f"{COLUMNS}/a").attempts() == {"s0": 1}


def test_a_model_that_cannot_be_loaded_is_told_at_the_first_shard(tmp_path, storage):
    scoring = ScoreShards([job(tmp_path / "nowhere")], storage, [COLUMNS])
    with pytest.raises(UserError, match=r"nowhere: .*cannot be loaded"):
        scoring.score(ShardRef("a", "s0", "", 0), "s0")
    assert Artifact(storage, f"{COLUMNS}/a").entries() == {}


def test_metrics_carry_the_scorers_name(monkeypatch):
    """A fake that keeps what Ray's metrics would be told."""
    told = {}

    class Fake:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def inc(self, value, tags):
            told[self.name, tags["scorer"]] = told.get((self.name, tags["scorer"]), 0) + value

        def set(self, value, tags):
            told[self.name, tags["scorer"]] = value

    telemetry._counter.cache_clear()
    telemetry._gauge.cache_clear()
    monkeypatch.setattr(telemetry, "Counter", Fake)
    monkeypatch.setattr(telemetry, "Gauge", Fake)
    for tokens in (5.0, 7.0):
        telemetry.record("tiny", {"trunk_tokens": tokens, "oom_halvings": 0, "other": 1}, {"useful_mfu": tokens / 10})
    telemetry._counter.cache_clear()
    telemetry._gauge.cache_clear()
    assert told == {("prefsel_trunk_tokens_total", "tiny"): 12, ("prefsel_useful_mfu", "tiny"): 0.7}


def test_spans_say_how_busy_the_models_were():
    from prefsel.score.utilization import Span, utilization

    spans = [Span("a", 0, 10 * n + 1, 10 * n + 10, 8) for n in range(4)]  # model 8 of 10 s, first at 1
    found = utilization([*spans, Span("b", 0, 0, 5, 5)])
    # Actor a from 10, when its first left, to 31, when its last entered: two shards of 8 s in 21 s.
    assert found["steady"] == pytest.approx(16 / 21)
    assert found["steady_shards"] == 2
    assert found["overall"] == pytest.approx(37 / (2 * 40))
    assert utilization([]) == {}
