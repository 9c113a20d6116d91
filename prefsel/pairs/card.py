"""The card of a dataset: what it is, how it was chosen, and how to open it, by itself and in the field's trainers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefsel.pairs.trainers import FILE, TRAINERS, Trainer
from prefsel.schema import FLIPPED

REFERENCE = re.compile(r"logps_(.+)_chosen")


def dataset_card(
    *, name: str, split: str, rows: int, columns: list[str], facts: Mapping[str, Any], has_rest: bool
) -> str:
    """`README.md` in the layout that `datasets` reads: configuration header, then prose.

    Args:
        name: of the selection.
        split: `train` or `test`; the data files are `data/<split>-*.parquet`.
        rows: kept pairs.
        columns: of the data files.
        facts: the rule, the metric, fingerprints; shown as JSON.
        has_rest: some message of the corpus holds more than role and content.
    """
    listed = "\n".join(f"- `{column}`" for column in columns)
    return (
        f"{_header(f'data/{split}-*.parquet', split)}\n# {name}\n\n{rows:,} preference pairs, chosen by prefsel.\n\n"
        f"```json\n{json.dumps(dict(facts), indent=1)}\n```\n\n"
        "`prompt`, `chosen` and `rejected` are lists of role/content messages. `percentile` is read from a binned\n"
        "distribution function (a bin is a sixteenth of a power of two) whose bins are split where the rule cuts.\n"
        "Log-probs are natural logarithms, summed over the response tokens."
        f"{_flipped(facts)}\n\nColumns:\n\n{listed}\n\n"
        f"{_opening(name, split, columns, has_rest)}"
    )


def _flipped(facts: Mapping[str, Any]) -> str:
    """What is said of turned labels; nothing where the rule turns none."""
    if FLIPPED not in facts:
        return ""
    return (
        f"\n\nThe label of {facts[FLIPPED]:,} pairs is turned: where `flipped` is true all judges of the rule\n"
        "preferred the rejected response. There `chosen` and `rejected` are exchanged, with every number of either\n"
        "side, and `score` is below 0; `pair_id` is that of the pair as it was labelled."
    )


def folder_page(trainer: Trainer, *, folder: str, name: str, rows: int, columns: Sequence[str], left: str) -> str:
    """`README.md` of a folder that was written for a trainer.

    Args:
        trainer: which.
        folder: its path, as people typed it.
        name: of the selection.
        rows: pairs written.
        columns: of the data file.
        left: what was left out, in words; empty: nothing.
    """
    left = f"Left out, because {trainer.title} cannot hold them: {left}.\n\n" if left else ""
    stored = _reference_lines(folder, columns) if trainer is TRAINERS["trl"] else ""
    listed = "\n".join(f"- `{column}`" for column in columns)
    return (
        f"{_header(FILE, 'train')}\n# {name}\n\n{rows:,} preference pairs for {trainer.title}, chosen by prefsel.\n\n"
        f"{left}{_block(trainer.lines(folder, name), trainer.language)}{stored}Columns:\n\n{listed}\n"
    )


def _header(path: str, split: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: {path}\n---\n"


def _opening(name: str, split: str, columns: Sequence[str], has_rest: bool) -> str:
    """How to open the dataset; FOLDER is the one that the card lies in, W the workspace."""
    lines = f'import datasets\n\ndata = datasets.load_dataset("FOLDER", split="{split}")'
    text = f"## Opening it\n\nThis folder as it is:\n\n{_block(lines, 'python')}"
    if split != "train":
        return text.rstrip("\n") + "\n"
    if has_rest:
        text += (
            "What a message holds besides role and content (tool calls, tools, reasoning) stands in its field `rest`\n"
            "as JSON text, which no trainer reads from there: write a folder for it, below.\n"
        )
    else:
        text += "TRL takes `data` as its `train_dataset`.\n"
    text += (
        f"{_reference_lines('FOLDER', columns)}"
        'Other trainers cut a path at the "@" in this folder\'s name, or want other columns. Write them a folder:\n\n'
    )
    for key, trainer in TRAINERS.items():
        command = f"prefsel export W --selection {name} --for {key} --output {name}-{key}"
        lines = trainer.lines(f"{name}-{key}", name)
        text += f"{trainer.title}:\n\n{_block(command, 'bash')}{_block(lines, trainer.language)}"
    return text.rstrip("\n") + "\n"


def _reference_lines(folder: str, columns: Sequence[str]) -> str:
    """How TRL takes the stored log-probs; nothing where there are none."""
    found = [match.group(1) for column in columns if (match := REFERENCE.fullmatch(column))]
    if not found:
        return "\n"
    lines = (
        "import datasets\nimport trl\n\nfrom prefsel.trl import DPOTrainer\n\n"
        f'data = datasets.load_dataset({json.dumps(folder, ensure_ascii=False)}, split="train")\n'
        'args = trl.DPOConfig("out", max_length=None)\n'
        f'DPOTrainer(model=MODEL, args=args, train_dataset=data, reference="{found[0]}").train()'
    )
    which = " or ".join(f"`{one}`" for one in found)
    return (
        f"\nWith the stored log-probs of {which} as the reference, TRL computes none of its own; `template`,\n"
        "`max_length` and `truncation` are given as that model has them in the run's configuration:\n\n"
        f"{_block(lines, 'python')}"
    )


def _block(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```\n\n"
