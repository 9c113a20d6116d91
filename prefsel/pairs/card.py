"""The card of a dataset: what it is, how it was chosen, and how to open it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def dataset_card(*, name: str, split: str, rows: int, columns: list[str], facts: Mapping[str, Any]) -> str:
    """`README.md` in the layout that `datasets` reads: configuration header, then prose.

    Args:
        name: of the selection.
        split: `train` or `test`; the data files are `data/<split>-*.parquet`.
        rows: kept pairs.
        columns: of the data files.
        facts: the rule, the metric, fingerprints; shown as JSON.
    """
    files = f"  data_files:\n  - split: {split}\n    path: data/{split}-*.parquet"
    header = f"---\nconfigs:\n- config_name: default\n{files}\n---\n"
    listed = "\n".join(f"- `{column}`" for column in columns)
    return (
        f"{header}\n# {name}\n\n{rows:,} preference pairs, chosen by prefsel.\n\n"
        f"```json\n{json.dumps(dict(facts), indent=1)}\n```\n\n"
        "`prompt`, `chosen` and `rejected` are lists of role/content messages. `percentile` is read from a binned\n"
        "distribution function (a bin is a sixteenth of a power of two) whose bins are split where the rule cuts.\n"
        f"Log-probs are natural logarithms, summed over the response tokens.\n\nColumns:\n\n{listed}\n"
    )
