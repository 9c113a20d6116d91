"""Every artifact of every shipped configuration is called as it was: no refactor makes a user score a corpus again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import pytest
from adapters import artifact_names, ingested
from golden import Golden, digest

from prefsel.config.file import read_table
from prefsel.demo import demo_config
from prefsel.world.inputs import DemoInputs

CONFIGS = Path(__file__).parents[2] / "jobs/configs"
SHIPPED = {file.relative_to(CONFIGS).with_suffix("").as_posix(): file for file in sorted(CONFIGS.rglob("*.yaml"))}
EVERY_OPTION = Path(__file__).parent / "every_option.yaml"
DEMO_HEADS = ("overall", *corpora.DEMO_ASPECTS)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


class Ground:
    """Small inputs for any shipped configuration, and one ingested workspace for all that agree about them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.corpora = {
            "world": corpora.ultrafeedback(corpora.DEMO_ASPECTS),
            "ultrafeedback": corpora.ultrafeedback(corpora.ULTRAFEEDBACK_ASPECTS),
            "hh": corpora.transcripts("hh"),
            "hh-test": corpora.transcripts("hh-test", 8),
            "sample": corpora.binarized(),
            "excluded": [{"prompt": f"question {n}: {corpora.text('question', n)}?"} for n in range(5)],
        }
        self.files = {name: corpora.write_jsonl(home / f"{name}.jsonl", rows) for name, rows in self.corpora.items()}
        lengths = {"policy": 1024, "reward": 2048, "rm": 4096, "weak": 1024}
        heads = {
            "policy": ["LABEL_0", "LABEL_1"],
            "reward": DEMO_HEADS,
            "rm": ["LABEL_0"],
            "weak": ["LABEL_0", "LABEL_1"],
        }
        self.models = {
            name: corpora.pretrained(home / name, heads[name], max_length=length) for name, length in lengths.items()
        }

    def laid_under(self, table: dict[str, Any]) -> dict[str, Any]:
        """The configuration with the inputs of this folder: paths of its sources and of its pretrained models."""
        for source in table["sources"]:
            source["paths"] = [self.files[source["name"]]]
        for model in table.get("models", []):
            if model["kind"] == "pretrained":
                model["path"] = self.models[model["name"]]
        if "exclude_prompts" in table:
            table["exclude_prompts"] = [self.files["excluded"]]
        return table

    def names(self, table: dict[str, Any]) -> dict[str, str]:
        self.laid_under(table)
        workspace = self.home / digest([table["sources"], table.get("ingest"), table.get("exclude_prompts")])
        if not workspace.exists():
            ingested(table, workspace)
        return artifact_names(table, workspace)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_names_the_same_artifacts(
    name: str, ground: Ground, golden: Callable[[str], Golden]
) -> None:
    golden("fingerprints").check(name, ground.names(read_table(SHIPPED[name])))


def test_the_demo_names_the_same_artifacts(ground: Ground, golden: Callable[[str], Golden]) -> None:
    nowhere = Path("nowhere")
    inputs = DemoInputs(*[nowhere] * 5, num_proxy_labels=0, reward_accuracy={}, seconds={})
    golden("fingerprints").check("demo", ground.names(demo_config(inputs, 0)))


def test_every_option_names_the_same_artifacts(ground: Ground, golden: Callable[[str], Golden]) -> None:
    golden("fingerprints").check("every option", ground.names(read_table(EVERY_OPTION)))
