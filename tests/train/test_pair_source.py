"""What a training reads beside its rows: the divergence of each pair, from the scores of its metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from prefsel.metrics import score_table
from prefsel.pairs import score_shards
from prefsel.train.losses import dfpo_loss
from prefsel.train.pair_source import Dataset, PairSource
from prefsel.workspace.folders import write_seal
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage

IDS = [bytes([n]) * 16 for n in range(4)]
RATINGS = {
    "aspect": ["a", "a", "a", "a", "b"],
    "ratings_a_chosen": [5.0] * 5,
    "ratings_a_rejected": [1.0] * 5,
    "ratings_b_chosen": [1.0, 5.0, 3.0, None, None],
    "ratings_b_rejected": [5.0, 1.0, 3.0, 1.0, None],
}
"""The other aspect, b, contradicts the label of the first pair, agrees with the second, and has no view of the third.

The last pair is of aspect b: it gives the scale of a, and is not in the dataset.
"""


def committed(root: Path) -> Storage:
    """A dataset of the four pairs, and their scores by preference divergence in two shards."""
    storage = Storage(str(root))
    texts = {name: ["t"] * 4 for name in ("prompt", "chosen", "rejected", "source")}
    rows = {"pair_id": [one.hex() for one in IDS], "prompt_id": [one.hex() for one in IDS], "aspect": ["a"] * 4}
    data = Artifact(storage, "datasets/d/data")
    name = "train-00000-of-00001"
    table = pa.table({**rows, **texts, "score": [0.0] * 4})
    entry = data.commit(name, table, made_from="x", attempt=data.log_attempt(name))
    write_seal(
        storage, "datasets/d", {f"data/{name}.parquet": {"bytes": entry.bytes, "blake2b": entry.content}}, {"rows": 4}
    )
    found_N = score_table(RATINGS, "preference_divergence", aspects=["a", "b"], source="ratings", gamma=1.0)
    artifact = Artifact(storage, "scores/pd/s")
    for shard, at in (("one", slice(0, 1)), ("two", slice(1, 4))):
        score_N = np.asarray(found_N)[at]
        names = pa.array(["s"] * len(score_N))
        like = {"pair_id": pa.array(IDS[at], pa.binary(16)), "source": names, "aspect": names}
        dropped = pa.array([None if known else "missing_b" for known in np.isfinite(score_N)], pa.string())
        lengths = (np.ones(len(score_N)), np.ones(len(score_N)))
        table = score_shards.score_table(like, score_N, dropped, lengths)
        artifact.commit(shard, table, made_from="x", attempt=artifact.log_attempt(shard), info={})
    return storage


def test_divergence_is_positive_where_the_other_aspects_contradict_the_label(tmp_path: Path) -> None:
    """PD = -Δr of b, scaled by its largest: 1 in conflict, -1 in consensus. Scores are -PD, larger selected first."""
    table, dropped = PairSource(Dataset(committed(tmp_path), "datasets/d"), divergence="scores/pd").table()
    assert table is not None
    assert table["pair_id"].to_pylist() == [one.hex() for one in IDS[:3]]
    assert table["preference_divergence"].to_pylist() == [1.0, -1.0, 0.0]
    assert dropped == {"missing_divergence": 1}


def test_a_weight_is_the_score_of_its_metric(tmp_path: Path) -> None:
    """Read by pair_id from two shards; of two metrics the rows that have both are left."""
    storage = committed(tmp_path)
    source = PairSource(Dataset(storage, "datasets/d"), weight="scores/pd")
    table, dropped = source.table()
    assert table is not None
    assert table["pair_id"].to_pylist() == [one.hex() for one in IDS[:3]]
    assert table["weight"].to_pylist() == [-1.0, 1.0, 0.0]
    assert "preference_divergence" not in table.column_names
    assert dropped == {"missing_weight": 1}
    both, dropped = PairSource(Dataset(storage, "datasets/d"), divergence="scores/pd", weight="scores/pd").table()
    assert both is not None
    assert both["preference_divergence"].to_pylist() == [1.0, -1.0, 0.0]
    assert both["weight"].to_pylist() == [-1.0, 1.0, 0.0]
    assert dropped == {"missing_divergence": 1}
    none, dropped = PairSource(Dataset(storage, "datasets/d"), weight="scores/nowhere").table()
    assert (none, dropped) == (None, {"missing_weight": 4})


def test_a_conflict_weighs_less_and_a_consensus_more(tmp_path: Path) -> None:
    """The gradient of softplus(-(κ m + PD)) with respect to m is -κ σ(-(κ m + PD)): least where PD is 1."""
    table, _ = PairSource(Dataset(committed(tmp_path), "datasets/d"), divergence="scores/pd").table()
    assert table is not None
    divergence_N = torch.tensor(table["preference_divergence"].to_pylist(), dtype=torch.float64)
    chosen_N = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    zero_N = torch.zeros(3, dtype=torch.float64)
    loss_N = dfpo_loss(chosen_N, zero_N, zero_N, zero_N, beta=1.0, num_aspects=2, preference_divergence=divergence_N)
    torch.testing.assert_close(loss_N, -F.logsigmoid(divergence_N))
    loss_N.sum().backward()
    assert chosen_N.grad is not None
    torch.testing.assert_close(chosen_N.grad, -2 * torch.sigmoid(-divergence_N))
