"""One row each from the published schemas through ingest, a model and a selection, and back: nothing changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from published import ASK, BAD, GOOD, ROWS
from stage_runs import run

from prefsel.config.file import parse_config

sys.path.append(str(Path(__file__).parent / "models"))

NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "Nectar": {"rank": (1.0, 2.0)},
    "SHP": {"score": (12.0, 3.0)},
    "Capybara": {"rating": (5.0, 2.0)},
    "UltraFeedback, binarized": {"score": (8.5, 3.0)},
    "UltraFeedback, cleaned": {"rating": (4.75, 2.5)},
    "WebGPT": {"score": (0.5, -0.5)},
    "WebGPT, question as text": {"score": (0.25, -0.25)},
    "OpenAssistant": {"rank": (0.0, 1.0)},
    "RLHFlow": {"score": (2.0, -1.5)},
    "distilabel, several generations": {"score": (5.0, 2.0)},
    "Tulu": {"rating": (4.5, 1.5)},
}
"""What a schema says of chosen and rejected in numbers."""


def own(value: Any, number: int) -> Any:
    """The row of one schema with texts that no other one has, so that none is a duplicate."""
    text = json.dumps(value)
    for each in (ASK, GOOD, BAD):
        text = text.replace(json.dumps(each)[1:-1], f"{json.dumps(each)[1:-1]} ({number})")
    return json.loads(text)


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[str, dict[str, Any]]:
    """The rows of the written dataset by the name of the schema that they came from."""
    from tiny_models import bpe_tokenizer, tiny_causal

    folder = tmp_path_factory.mktemp("round_trip")
    tiny_causal().save_pretrained(folder / "policy")
    bpe_tokenizer().save_pretrained(folder / "policy")
    sources = []
    for number, (_, row, _, _) in enumerate(ROWS.values()):
        path = folder / f"{number}.jsonl"
        path.write_text(json.dumps(own(row, number)) + "\n")
        sources.append({"name": f"s{number}", "paths": [str(path)]})
    imported = [{"kind": "imported", "name": name, "field": name} for name in ("rank", "rating", "score")]
    config = parse_config(
        {
            "name": "trip",
            "sources": sources,
            "models": [{"kind": "pretrained", "name": "policy", "path": str(folder / "policy"), "dtype": "fp32"}],
            "scorers": [{"kind": "causal_logps", "model": "policy"}, *imported],
            "metrics": [{"name": "lot", "metric": "random"}],
            "selections": [{"name": "all", "rule": {"kind": "top", "score": "score_lot", "ratio": 1.0}}],
        }
    )
    plan, _ = run(config, folder / "W")
    dataset = folder / "W" / plan.node("dataset", "all").path
    rows = [row for file in sorted(dataset.glob("data/*.parquet")) for row in pq.read_table(file).to_pylist()]
    names = list(ROWS)
    return {names[int(row["source"].removeprefix("s"))]: row for row in rows}


@pytest.mark.parametrize("name", ROWS)
def test_text_direction_ratings_and_prompt_come_back(selected: dict[str, dict[str, Any]], name: str) -> None:
    number = list(ROWS).index(name)
    _, _, prompt, _ = ROWS[name]
    row = selected[name]
    assert row["prompt"] == own(prompt, number)
    assert [one["content"].strip() for one in row["chosen"]] == [own(GOOD, number)]
    assert [one["content"].strip() for one in row["rejected"]] == [own(BAD, number)]
    assert row["logps_policy_chosen"] < 0
    for field in ("rank", "rating", "score"):
        found = (row[f"rm_{field}_chosen"], row[f"rm_{field}_rejected"])
        assert found == NUMBERS.get(name, {}).get(field, (None, None))
