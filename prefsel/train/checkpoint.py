"""Checkpoints that a killed run continues from: DeepSpeed's own files, read back only after their hashes agree.

    step-00000040/
      engine/…                   what `engine.save_checkpoint` writes: weights, optimizer, schedule; pickled
      rng-rank-<r>.safetensors   random state of worker r
      history.jsonl              everything reported so far
      digest-rank-<r>.json       blake2b of every file worker r wrote
      complete.json              step, consumed pairs, world size, hashes of the digest files, its own; written last

A folder without `complete.json` was interrupted and is never read. Workers may share the folder or each have their
own; what is loaded must be the union.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from prefsel.errors import CheckpointError, UserError
from prefsel.train.run_config import RunConfig
from prefsel.workspace.documents import parse_document, to_document

TAG = "engine"
COMPLETE = "complete.json"
HISTORY = "history.jsonl"
FREE_OPTIONS = {
    "eval_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_optimizer_state",
    "micro_batch_pairs",
    "token_budget",
    "reference_check_pairs",
    "reference_dir",
    "reference_dtype",
    "reference_revision",
    "reference_trust_remote_code",
}
"""Options that may change when a run is continued: they move no weight by more than rounding."""
_OF_RANK = re.compile(r"(?:pp_rank_|-rank-)(\d+)")


def save_checkpoint(
    engine: Any,
    directory: Path,
    *,
    state: Mapping[str, Any],
    history: Iterable[Mapping[str, Any]],
) -> None:
    """Write a checkpoint, without weights that do not train (under adapters); every worker calls this at the same step.

    Args:
        engine: The DeepSpeed engine.
        directory: Where to write; an interrupted checkpoint already there is replaced.
        state: JSON values that say where the run stands (step, consumed_pairs, …).
        history: The records reported so far.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shutil.rmtree(directory, ignore_errors=True)
    dist.barrier()
    (directory / TAG).mkdir(parents=True, exist_ok=True)
    options = {"save_latest": False, "exclude_frozen_parameters": _has_frozen_weights(engine)}
    engine.save_checkpoint(str(directory), tag=TAG, client_state=dict(state), **options)
    save_file(_rng_state(), directory / f"rng-rank-{rank}.safetensors")
    write_history(directory, history)
    # A worker digests what it wrote itself: with a folder per worker the other files are on other machines.
    dist.barrier()
    own = [file for file in _files(directory) if (_rank_in(file.name) or 0) == rank]
    digests = {file.relative_to(directory).as_posix(): _file_digest(file) for file in own}
    digest_file = directory / f"digest-rank-{rank}.json"
    _write(digest_file, json.dumps(digests, indent=1, sort_keys=True).encode())
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, (digest_file.name, _file_digest(digest_file)))
    if rank == 0:
        complete = {"world_size": world_size, "digests": dict(gathered), "state": dict(state)}
        _write(directory / COMPLETE, to_document(COMPLETE, complete, indent=1))
    dist.barrier()


def _read_state(directory: Path) -> dict[str, Any]:
    """What a complete checkpoint says about itself (JSON only, nothing is unpickled): `state` and `world_size`.

    Raises:
        UserError: The folder is no complete checkpoint.
        CheckpointError: What it says is not what was saved.
    """
    if not (directory / COMPLETE).is_file():
        raise UserError(f"resume: {directory} is not a complete checkpoint (no {COMPLETE})")
    try:
        return parse_document(COMPLETE, (directory / COMPLETE).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"resume: {directory / COMPLETE}: {error}") from error


def read_history(directory: Path) -> list[dict[str, Any]]:
    """The records reported before the checkpoint was written."""
    return [json.loads(line) for line in (directory / HISTORY).read_text().splitlines()]


def write_history(output_dir: Path, records: Iterable[Mapping[str, Any]], *, append: bool = False) -> None:
    """Worker 0 writes `history.jsonl`: one JSON object per line."""
    if dist.get_rank() == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / HISTORY).open("a" if append else "w") as file:
            file.writelines(json.dumps(dict(record)) + "\n" for record in records)


def run_identity(config: RunConfig, digest: str) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: the data, and every option that shapes the trajectory."""
    # The groups that an optimizer's state is saved by; a checkpoint of an earlier version has another number of them.
    groups = {"decayed": "matrices"} if config.weight_decay else {}
    return {"pairs": digest, **config.model_dump(mode="json", exclude=FREE_OPTIONS), **groups}


def load_checkpoint(engine: Any, directory: Path, *, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Verify every file, then restore the engine and the random state; every worker calls this.

    Args:
        engine: A freshly initialised DeepSpeed engine of the same model and options.
        directory: A complete checkpoint.
        identity: `run_identity` of this run; the checkpoint's `state["identity"]` must be equal.

    Returns:
        The `state` given to `save_checkpoint`.

    Raises:
        UserError: Not a complete checkpoint, or written by another number of workers, for other data or options.
        CheckpointError: A file is missing or altered; nothing was unpickled.
    """
    complete = _read_state(directory)
    saved = complete["state"]["identity"]
    if changed := [key for key in identity if identity[key] != saved.get(key)]:
        shown = "; ".join(f"{key}: got {identity[key]!r}, saved with {saved.get(key)!r}" for key in changed)
        raise UserError(f"resume: {directory} belongs to another run ({shown})")
    if complete["world_size"] != dist.get_world_size():
        raise UserError(f"resume: got {dist.get_world_size()} workers; valid: {complete['world_size']}, as when saved")
    # With elastic checkpoints DeepSpeed reads every worker's optimizer state, else only its own.
    rank = None if engine.zero_elastic_checkpoint() else dist.get_rank()
    altered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(altered, altered_files(directory, rank=rank))
    if offenders := sorted({name for names in altered for name in names}):
        raise CheckpointError(f"resume: {directory} does not match its digests, nothing was loaded: {offenders[:5]}")
    path, _ = engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=not _has_frozen_weights(engine))
    if path is None:
        raise CheckpointError(f"resume: DeepSpeed found no checkpoint in {directory / TAG}")
    _restore_rng(load_file(directory / f"rng-rank-{dist.get_rank()}.safetensors"))
    return complete["state"]


def _has_frozen_weights(engine: Any) -> bool:
    """Whether some of the engine's weights do not train."""
    return not all(parameter.requires_grad for parameter in engine.module.parameters())


def altered_files(directory: Path, *, rank: int | None = None) -> list[str]:
    """Names of the files that are missing, added, or whose blake2b differs.

    Args:
        directory: A complete checkpoint.
        rank: Read only what this worker is going to load: its own files and worker 0's common ones; None: everything.
    """
    digests: dict[str, str] = _read_state(directory)["digests"]
    expected = dict(digests)
    for name, digest in digests.items():
        if _digest_or_none(directory / name) == digest:
            expected |= json.loads((directory / name).read_text())
    added = {file.relative_to(directory).as_posix() for file in _files(directory / TAG)} - set(expected)
    read = [name for name in expected if rank is None or _rank_in(name) in (rank, None) or name in digests]
    return sorted(added) + sorted(name for name in read if _digest_or_none(directory / name) != expected[name])


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint with the highest step below `root`, or None."""
    complete = sorted(folder.parent for folder in root.glob(f"step-*/{COMPLETE}"))
    return complete[-1] if complete else None


def prune_checkpoints(root: Path, *, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints below `root`, oldest first."""
    for folder in sorted(root.glob("step-*"))[:-keep]:
        # The marker goes first: a deletion that is interrupted leaves an incomplete checkpoint, not a broken one.
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _file_digest(path: Path) -> str:
    """blake2b-128 of a file's bytes, hex, read in one-MiB pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _digest_or_none(path: Path) -> str | None:
    return _file_digest(path) if path.is_file() else None


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def _rank_in(name: str) -> int | None:
    """The rank that DeepSpeed and we put into the names of per-worker files; None: common, written by worker 0."""
    match = _OF_RANK.search(name.rsplit("/", 1)[-1])
    return int(match.group(1)) if match else None


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_rng(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
