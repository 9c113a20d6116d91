"""Policy and reference in one pass: the columns of each alone, bit for bit, and the shards tokenised once for both."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
from test_scorers import table
from tiny_models import bpe_tokenizer, randomize, tiny_causal

from prefsel.config import Pool
from prefsel.config.file import parse_config
from prefsel.errors import PrefselError
from prefsel.models.chat import Encoder
from prefsel.plan.nodes import all_nodes, make_plan
from prefsel.plan.passes import in_passes
from prefsel.progress import Progress
from prefsel.score.multi_model import MultiModelScorer, tokenizer_key, weights_bytes
from prefsel.score.scorers import CausalLogpsScorer
from prefsel.stages import pool, sharing
from prefsel.stages.ingest import ingest
from prefsel.stages.score import Pending, score, scoring_job, split_by_pending
from prefsel.workspace.catalog import ShardRef
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with other weights and the same tokenizer."""
    made = {}
    for name, scale in (("policy", 0.3), ("reference", 0.2)):
        made[name] = str(tmp_path_factory.mktemp(name))
        randomize(tiny_causal(), scale).save_pretrained(made[name])
        bpe_tokenizer().save_pretrained(made[name])
    return made


def scorer(folders, name, **options):
    return CausalLogpsScorer(name=name, path=folders[name], dtype="fp32", device="cpu", **options)


def test_columns_are_those_of_each_alone_bit_for_bit(folders):
    groups = table()
    together = MultiModelScorer([scorer(folders, name, token_budget=70) for name in folders])
    shards = together.score(together.begin(groups))
    alone = [scorer(folders, name, token_budget=70).score(groups) for name in folders]
    assert [shard.columns for shard in shards] == [shard.columns for shard in alone]
    assert shards[0].columns["logps_policy"] != shards[1].columns["logps_reference"]
    assert [shard.counters.get("groups_tokenised") for shard in shards] == [4, None]
    for shard, other in zip(shards, alone):
        for name in ("trunk_tokens", "head_rows", "rows", "flops_model", "flops_min"):
            assert shard.counters[name] == other.counters[name]


def test_memory_that_runs_out_for_one_leaves_the_other_alone(folders):
    groups = table()
    both = [scorer(folders, name, token_budget=1000) for name in folders]
    together = MultiModelScorer(both)
    route = both[1].engine.route

    def small(batch):
        if batch.trunk_tokens > 80:
            raise torch.OutOfMemoryError("out of memory")
        return route.forward(batch)

    object.__setattr__(both[1].engine, "route", type(route)(**{**route.__dict__, "forward": small}))
    shards = together.score(together.begin(groups))
    assert "oom_halvings" not in shards[0].counters
    assert shards[1].counters["oom_halvings"] >= 1
    expected = scorer(folders, "reference").score(groups).columns["logps_reference"]
    for row, want in zip(shards[1].columns["logps_reference"], expected):
        assert row == pytest.approx(want, rel=1e-5)


def test_what_tokens_follow_from_is_the_key():
    same, other = bpe_tokenizer(), bpe_tokenizer()
    assert tokenizer_key(same) == tokenizer_key(other)
    other.chat_template = other.chat_template + " "
    assert tokenizer_key(same) != tokenizer_key(other)
    assert Encoder(same).template == "auto"


def test_weights_are_counted_without_being_read(folders):
    count = sum(parameter.numel() for parameter in tiny_causal().parameters())
    assert weights_bytes(folders["policy"], "fp32") == 4 * count
    assert weights_bytes(folders["policy"], "bf16") == 2 * count


def test_shards_that_only_one_lacks_are_a_pass_of_their_own():
    one, two, three = (ShardRef("a", name, "train", number) for number, name in enumerate("xyz"))
    first, second = Pending(None, [one, two], {}), Pending(None, [two, three], {})
    assert split_by_pending([first, second]) == [([first], [one]), ([first, second], [two]), ([second], [three])]


def plan(tmp_path, folders, workspace, *, num_rows=12, **pool):
    rows = [{"prompt": f"the cat {n}", "chosen": f"bread rises {n}", "rejected": "why?"} for n in range(num_rows)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [{"kind": "pretrained", "name": name, "path": folder, "dtype": "fp32"} for name, folder in folders.items()]
    scorers = [{"kind": "causal_logps", "model": name, "pool": {"size": 1, **pool}} for name in folders]
    config = {"name": "t", "sources": [{"name": "a", "paths": [str(path)]}], "ingest": {"rows_per_shard": 3}}
    made = parse_config({**config, "models": models, "scorers": scorers})
    storage = Storage(str(tmp_path / workspace))
    ingest(made, storage, QUIET)
    return make_plan(made, storage)


def contents(graph):
    """Content hashes of every column shard."""
    found = {}
    for one in graph.scorers:
        folder = graph.node("columns", one.label).path
        entries = Artifact(graph.storage, f"{folder}/a").entries()
        found[folder] = {name: entry.content for name, entry in entries.items()}
    return found


def score_all(graph):
    return score(graph, [graph.node("columns", one.label) for one in graph.scorers], QUIET)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_shared_pass_makes_the_same_artifacts_and_reads_once(tmp_path, folders):
    apart = plan(tmp_path, folders, "apart", share="never")
    beside = plan(tmp_path, folders, "beside")
    for graph, times in ((apart, 2), (beside, 1)):
        reports = score_all(graph)
        for counter in ("groups_read", "groups_tokenised"):
            assert sum(report.details["counters"].get(counter, 0) for report in reports) == 12 * times
        assert [report.computed_shards for report in reports] == [4, 4]
    assert contents(apart) == contents(beside)
    assert all(len(shards) == 4 for shards in contents(beside).values())
    for one in beside.scorers:
        attempts = Artifact(beside.storage, f"{beside.node('columns', one.label).path}/a").attempts()
        assert set(attempts.values()) == {1}


@pytest.mark.usefixtures("local_ray")
def test_models_that_do_not_fit_together_go_one_after_another(tmp_path, folders, monkeypatch):
    graph = plan(tmp_path, folders, "w")
    jobs = [sharing.Job(one, ((None, {"gpus_per_replica": 1}),), label=one.model) for one in graph.scorers]
    size = weights_bytes(folders["policy"], "fp32")
    monkeypatch.setattr(sharing, "sharing_key", lambda job: "same")
    monkeypatch.setattr(sharing, "_by_tokenizer", lambda jobs, storage: {"same": jobs})
    settings = {"path": folders["policy"], "dtype": "fp32", "revision": None, "trust_remote_code": False}
    monkeypatch.setattr(sharing, "without_weights", lambda job, storage: settings)
    for memory, passes in ((2 * size / sharing.MEMORY_SHARE + 1, [2]), (2 * size / sharing.MEMORY_SHARE - 1, [1, 1])):
        monkeypatch.setattr(sharing, "memory_per_actor", lambda *_, memory=memory: memory)
        assert [len(one) for one in sharing.shared_passes(jobs, graph.storage, 4, QUIET)] == passes


@pytest.mark.usefixtures("local_ray")
def test_share_never_or_another_pool_is_not_alike(tmp_path, folders):
    graph = plan(tmp_path, folders, "w")
    first, second = (scoring_job(graph, graph.node("columns", one.label)) for one in graph.scorers)
    assert sharing.sharing_key(first) == sharing.sharing_key(second) is not None
    alone = replace(first, scorer=first.scorer.model_copy(update={"pool": Pool(size=1, share="never")}))
    assert sharing.sharing_key(alone) is None


@pytest.mark.usefixtures("local_ray")
def test_the_graph_puts_them_side_by_side_and_the_fingerprint_does_not_know(tmp_path, folders):
    graph = plan(tmp_path, folders, "w")
    passes = [[str(node) for node in nodes] for nodes in in_passes(all_nodes(graph))]
    assert ["columns policy", "columns reference"] in passes
    never = plan(tmp_path, folders, "w", share="never")
    assert [graph.node("columns", one.label).path for one in graph.scorers] == [
        never.node("columns", o.label).path for o in never.scorers
    ]


def kill_an_actor(ledger, is_over):
    """SIGKILL to the actor's process when five shards are committed; the thread that does it, and whom it killed."""
    killed = []

    def kill():
        while not killed and not is_over.is_set():
            if len(list(ledger.glob("*.json"))) >= 5:
                for process in psutil.Process().children(recursive=True):
                    if process.name().startswith("ray::MapWorker"):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.002)

    watcher = threading.Thread(target=kill)
    watcher.start()
    return watcher, killed


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_killed_actor_costs_only_the_shards_it_held(tmp_path, folders):
    """Another is started for what it left, which goes on; nothing is committed twice."""
    whole, hurt = (plan(tmp_path, folders, name, num_rows=240) for name in ("whole", "hurt"))
    score_all(whole)
    is_over = threading.Event()
    ledger = hurt.storage.local(f"{hurt.node('columns', hurt.scorers[0].label).path}/a/_ledger")
    watcher, killed = kill_an_actor(ledger, is_over)
    try:
        score_all(hurt)
    finally:
        is_over.set()
        watcher.join()
    assert len(killed) == 1
    assert contents(hurt) == contents(whole)
    for one in hurt.scorers:
        attempts = Artifact(hurt.storage, f"{hurt.node('columns', one.label).path}/a").attempts()
        assert len(attempts) == 80
        assert 80 <= sum(attempts.values()) <= 82  # it may die between two shards


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_actors_that_die_too_often_end_the_run(tmp_path, folders, monkeypatch):
    """As one does that is too large for the memory; what was committed stays, and the next run goes on from there."""
    monkeypatch.setattr(pool, "MAX_LOST_ACTORS", 0)
    graph = plan(tmp_path, folders, "w", num_rows=240)
    is_over = threading.Event()
    artifact = Artifact(graph.storage, f"{graph.node('columns', graph.scorers[0].label).path}/a")
    watcher, _ = kill_an_actor(graph.storage.local(f"{artifact.path}/_ledger"), is_over)
    try:
        with pytest.raises(PrefselError, match=r"an actor died for the 1\. time; too little memory is the usual cause"):
            score_all(graph)
    finally:
        is_over.set()
        watcher.join()
    committed = len(artifact.entries())
    assert 5 <= committed < 80
    assert score_all(graph)[0].computed_shards == 80 - committed
