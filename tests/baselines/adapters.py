"""Where the baselines touch the package. When code moves, this file follows; no recorded number does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from golden import digest, table_digest

from prefsel.config.file import parse_config
from prefsel.pipeline import run
from prefsel.plan.derived import derived_scores
from prefsel.plan.nodes import all_nodes, make_plan, selection_rule, writes_dataset
from prefsel.plan.plan import Plan
from prefsel.progress import Progress
from prefsel.rules import parse_rule
from prefsel.select.compose import compile_rule
from prefsel.stages.ingest import ingest
from prefsel.stages.select import write_holdout
from prefsel.workspace.storage import Storage

QUIET = Progress(quiet=True)

# ------------------------------------------------------------------------------------------------- fingerprints

KEPT = 17
"""How many pairs every selection is said to have kept: its random control has as many."""


def ingested(table: Mapping[str, Any], workspace: Path) -> None:
    """Ingest a configuration's sources, and let the content of every pairs shard be that of its values.

    The real content is a hash of the Parquet file, which another version of pyarrow writes differently.
    """
    ingest(parse_config(dict(table)), Storage(str(workspace)), QUIET)
    for file in workspace.glob("pairs/*/_ledger/*.json"):
        entry = json.loads(file.read_text())
        values = table_digest(pq.read_table(file.parents[1] / f"{entry['shard']}.parquet"))
        # Without a digest it is read as an earlier version's.
        file.write_text(
            json.dumps({key: value for key, value in entry.items() if key != "digest"} | {"content": values})
        )


def artifact_names(table: Mapping[str, Any], workspace: Path) -> dict[str, str]:
    """Every artifact of a configuration, `kind/name` → fingerprint; nothing but `ingested` has run.

    What comes later is named after what was made before: the content of a model's folder, the size of a selection. So
    the record that a stage would leave is left here in its place, as the stage does, with numbers of ours.
    """
    plan = make_plan(parse_config(dict(table)), Storage(str(workspace)))
    found = {"corpus": plan.corpus}
    for path in _made(plan, workspace):
        name, _, fingerprint = path.partition("@")
        assert found.setdefault(name, fingerprint) == fingerprint, f"{name} has two fingerprints"
    return dict(sorted(found.items()))


def _made(plan: Plan, workspace: Path) -> Iterator[str]:
    for node in all_nodes(plan):
        if node.path.startswith(("models/", "tangents/")):
            _leave(
                workspace / node.path / "_ledger/files.json", {"content": digest(node.path), "files": {}, "info": {}}
            )
        if node.kind == "selection":
            rule = selection_rule(plan, node)
            yield from (one.folder for one in derived_scores(plan, node.name, compile_rule(parse_rule(rule))))
            if writes_dataset(plan, node.name):
                yield plan.node("dataset", node.name).path
            _leave(workspace / node.path / "summary.json", _summary())
        yield node.path


def _leave(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def _summary() -> dict[str, Any]:
    counts = {"rows_in": KEPT, "rows_out": KEPT, "dropped": {}, "shards": 1, "computed_shards": 1, "seconds": 0.0}
    return {"stage": "select", "name": "", "unit": "pairs", "artifact": "", **counts}


# --------------------------------------------------------------------------------------------------- selections


def select_all(table: Mapping[str, Any], workspace: Path) -> None:
    """Ingest, score and select on the real pipeline, and write the held-out pairs."""
    config = parse_config(dict(table))
    run(config, str(workspace), QUIET, until="select")
    write_holdout(make_plan(config, Storage(str(workspace))), QUIET)


# ------------------------------------------------------------------------------------------------- trajectories


def train_policy(
    options: Mapping[str, Any], train: pa.Table, held_out: pa.Table, *, model: Path, output: Path
) -> tuple[list[dict[str, Any]], Path]:
    """Train on one worker, in this process.

    Args:
        options: As in a configuration's `train`, with what the rest of it says about the models.
        train: Pairs with reference log-probs.
        held_out: Pairs to evaluate on.
        model: The initial policy.
        output: A new folder.

    Returns:
        Every record of the run's history, and the folder of the trained model.
    """
    from prefsel.train.data import TrainingPairs
    from prefsel.train.loop import train as train_on
    from prefsel.train.preference import Preference
    from prefsel.train.run_config import DpoConfig

    config = DpoConfig.model_validate({"policy_is_reference": False, "max_length": 128, **options})
    tables = (TrainingPairs.from_table(table) for table in (train, held_out))
    result = train_on(Preference(config), *tables, model_dir=model, output_dir=output)
    return result["history"], Path(result["model_dir"])


def train_reward_model(
    options: Mapping[str, Any], train: pa.Table, *, model: Path, output: Path
) -> tuple[list[dict[str, Any]], Path]:
    """As `train_policy`; the training splits off what it evaluates on."""
    from prefsel.train.data import TrainingPairs
    from prefsel.train.loop import train as train_on
    from prefsel.train.reward import BradleyTerry
    from prefsel.train.run_config import RewardConfig

    config = RewardConfig.model_validate({"max_length": 128, **options})
    result = train_on(BradleyTerry(config), TrainingPairs.from_table(train), model_dir=model, output_dir=output)
    return result["history"], Path(result["model_dir"])


def train_scratch_policy(texts: list[str], conversations: list[Any], **options: Any) -> list[float]:
    """The loss of every step of a policy made from its corpus."""
    from prefsel.scratch import models as scratch

    losses: list[float] = []
    tokenizer = scratch.train_tokenizer(texts, kind="bpe", vocab_size=300)
    scratch.train_policy(tokenizer, conversations, on_step=lambda step, total, loss: losses.append(loss), **options)
    return losses


def train_scratch_reward(
    texts: list[str], pairs: list[tuple[Any, Any, str]], heads: list[str], **options: Any
) -> tuple[list[float], dict[str, float]]:
    """The loss of every step of a reward model made from its corpus, and its accuracy by head on what it held out."""
    from prefsel.scratch import models as scratch

    losses: list[float] = []
    tokenizer = scratch.train_tokenizer(texts, kind="word", vocab_size=64)
    labelled = [scratch.RewardPair(*pair) for pair in pairs]
    _, accuracy = scratch.train_reward(
        tokenizer, labelled, heads=heads, on_step=lambda step, total, loss: losses.append(loss), **options
    )
    return losses, accuracy


# ------------------------------------------------------------------------------------------------------ metrics


def score_pairs(table: pa.Table, metric: str, params: Mapping[str, Any]) -> list[float | None]:
    """A metric's scores of a flat table, as a notebook gets them; None where a column it needs is null."""
    from prefsel.metrics import score_table

    return [None if math.isnan(score) else score for score in score_table(table, metric, **params).tolist()]
