"""The page on extending, applied to a copy of the package as a newcomer would, and used: so the page cannot rot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from jsonschema import Draft202012Validator

from prefsel.plan.config_schema import full_schema

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")

# Three answers given a thumb up, and the one beside each; the text that is counted is "Sorry".
ROWS = [
    ("plain against three", "Air scatters blue light.", "Sorry. Sorry. Sorry."),  # -0 - -3 = 3, which counts as 2
    ("one against two", "Sorry, it scatters.", "Sorry, sorry, Sorry."),  # 1: the small one does not count
    ("one against none", "Sorry, it scatters.", "It does."),  # -1
    ("none against none", "It scatters.", "It does."),  # 0
]
KEPT = {"plain against three": 2.0, "one against two": 1.0}


@dataclass(frozen=True)
class Block:
    """A fenced block of the page."""

    section: str
    language: str
    title: str
    """The file that it is, or that it changes; empty: an example."""
    text: str


def blocks() -> list[Block]:
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        fences = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', section, re.DOTALL | re.MULTILINE)
        found += [Block(section.splitlines()[0], language, title, text) for language, title, text in fences]
    return found


BLOCKS = blocks()
EXAMPLES = [(code, said) for code, said in pairwise(BLOCKS) if (code.language, code.title) == ("python", "") and said]


def changed(text: str, diff: str) -> str:
    """A file after a diff, whose lines begin with a blank, a minus or a plus."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    assert text.count(before) == 1, f"the page shows what stands once in the file, and this does not:\n{before}"
    return text.replace(before, after)


def apply(folder: Path) -> None:
    """Do what the page says: new files as they stand, changed lines, a record above the line that is changed next."""
    for block, following in zip(BLOCKS, [*BLOCKS[1:], None]):
        file = folder / block.title
        if block.language == "diff":
            file.write_text(changed(file.read_text(), block.text))
        elif block.title.startswith("prefsel/") and file.exists():
            assert following is not None
            assert following.title == block.title
            mark = next(line[1:] for line in following.text.splitlines() if line.startswith("-"))
            file.write_text(file.read_text().replace(mark, f"{block.text}\n\n{mark}"))
        elif block.title.startswith("prefsel/"):
            file.write_text(block.text)


def run_python(code: str, *folders: Path, cwd: Path) -> str:
    """What a script prints in a new process that finds packages in these folders first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    # DeepSpeed says on standard output, with the date, that there is no GPU.
    return "".join(line for line in done.stdout.splitlines(keepends=True) if not re.match(r"\[\d{4}-", line))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with all that the page adds."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "prefsel", folder / "prefsel", ignore=shutil.ignore_patterns("__pycache__"))
    apply(folder)
    return folder


@pytest.mark.parametrize(
    ("section", "files", "lines"),
    [("A metric", 1, 1), ("A score that rules can read", 0, 0), ("A loss", 1, 1), ("A format", 1, 1)],
)
def test_an_addition_is_as_small_as_promised(section: str, files: int, lines: int) -> None:
    mine = [block for block in BLOCKS if block.section == section and block.title]
    new = {block.title for block in mine if block.language == "python"}
    assert len(new) == files
    assert not any((ROOT / title).exists() for title in new)
    diffs = [line for block in mine if block.language == "diff" for line in block.text.splitlines()]
    assert [line[0] for line in diffs if line[0] != " "] == ["+"] * lines
    assert len(mine) == files + lines  # one diff a line, and nothing else


def test_a_scorer_kind_takes_three_files() -> None:
    titles = {
        block.title for block in BLOCKS if block.section == "A scorer kind" and block.title.startswith("prefsel/")
    }
    assert len(titles) == 3
    assert sum(not (ROOT / title).exists() for title in titles) == 1


def test_the_examples_print_what_the_page_says(copy: Path) -> None:
    assert len(EXAMPLES) == 4
    assert all(said.language == "text" for _, said in EXAMPLES)
    codes = json.dumps([code.text for code, _ in EXAMPLES])
    told = run_python(f"for code in {codes}:\n    exec(code, {{}})\n    print('-----')", copy, cwd=copy)
    assert told.split("-----\n")[:-1] == [said.text for _, said in EXAMPLES]


def test_the_imported_score_of_the_page_is_valid() -> None:
    (block,) = (
        block for block in BLOCKS if block.section == "A score that rules can read" and block.language == "yaml"
    )
    table = {"name": "x", "sources": [{"name": "a", "paths": ["a"]}], **yaml.safe_load(block.text)}
    assert [error.message for error in Draft202012Validator(full_schema()).iter_errors(table)] == []


@pytest.mark.slow
def test_the_additions_make_a_selection(copy: Path, tmp_path: Path) -> None:
    """A format that is found, a scorer of a new kind, a metric on its column and a rule on that score, in one run."""
    rows = [{"question": name, "up": up, "down": down} for name, up, down in ROWS]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = (block for block in BLOCKS if block.title == "run.yaml")
    small = {"ray": {"num_cpus": 2, "object_store_gib": 0.2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load(run.text) | small))
    code = "import sys; from prefsel.cli import main; sys.argv[0] = 'prefsel'; main()"
    run_python(f"import sys; sys.argv[1:] = ['run', 'run.yaml', '--workspace', 'W']\n{code}", copy, cwd=tmp_path)
    (catalog,) = json.loads((tmp_path / "W/catalog.json").read_text())["sources"]
    assert [file["format"] for file in catalog["files"]] == ["thumbs"]
    (columns,) = (tmp_path / "W/columns").glob("humble@*/mine/*.parquet")
    by_prompt = dict(zip(*(pq.read_table(columns)[name].to_pylist() for name in ("prompt_id", "rm_humble"))))
    assert sorted(map(sorted, by_prompt.values())) == [[-3.0, 0.0], [-2.0, -1.0], [-1.0, 0.0], [0.0, 0.0]]
    (kept,) = (tmp_path / "W/datasets").glob("best@*/data/*.parquet")
    table = pq.read_table(kept)
    questions = [prompt[0]["content"] for prompt in table["prompt"].to_pylist()]
    assert dict(zip(questions, table["score"].to_pylist())) == KEPT


# ----------------------------------------------------------------------------------------- from a package of one's own

CHECK = """
import json, sys
import pyarrow as pa
from types import SimpleNamespace
from prefsel.config.file import parse_config
from prefsel.ingest.formats import FORMATS, FormatOptions
from prefsel.plan.check import check_without_models
from prefsel.score.kinds import load_one
from prefsel.score.job import Job
from prefsel.workspace.storage import Storage

config = parse_config(json.loads(sys.argv[1]))
check_without_models(config, Storage("W"))
for code in json.loads(sys.argv[2]):
    exec(code, {})
print(FORMATS["thumbs"]({"question": "q", "up": "a", "down": "b"}, FormatOptions()).preferences)
ready = load_one(Job(config.scorers[0], (), label="humble"), Storage("W"))
groups = pa.table({"completions": [[{"messages": [{"content": text}]} for text in ("Sorry", "Sorry Sorry", "-")]]})
print(ready.begin(None, groups)()[0].columns)
"""


@pytest.mark.parametrize("way", [pytest.param("plugins", marks=pytest.mark.slow), "entry points"])
def test_the_same_from_a_package_of_ones_own(tmp_path: Path, way: str) -> None:
    acme = tmp_path / "acme"
    acme.mkdir()
    by_title = {block.title: block.text for block in BLOCKS if block.language != "diff"}
    for title, text in by_title.items():
        if title.startswith("prefsel/") and not (ROOT / title).exists():
            (acme / Path(title).name).write_text(text)
    (acme / "__init__.py").write_text("")
    (acme / "records.py").write_text(f"{by_title['acme/records.py']}\n\n{by_title['prefsel/config/scorers.py']}")
    plugin = by_title["acme/prefsel_plugin.py"]
    config = yaml.safe_load(by_title["run.yaml"])
    config["sources"][0]["format"] = "thumbs"
    (tmp_path / "thumbs.jsonl").write_text("{}\n")
    if way == "plugins":
        (listed,) = (b for b in BLOCKS if b.section == "From a package of your own" and b.language == "yaml")
        config |= yaml.safe_load(listed.text)
    else:
        plugin = re.sub(r"^register_.*\n", "", plugin, flags=re.MULTILINE)
        (toml,) = (block.text for block in BLOCKS if block.language == "toml")
        metadata = tmp_path / "acme-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(toml.replace('[project.entry-points."', "[").replace('"', ""))
    (acme / "prefsel_plugin.py").write_text(plugin)
    tried = [(code.text, said.text) for code, said in EXAMPLES if code.section in ("A metric", "A loss")]
    arguments = [json.dumps(config), json.dumps([code for code, _ in tried])]
    told = run_python(f"import sys\nsys.argv[1:] = {arguments!r}\n{CHECK}", tmp_path, ROOT, cwd=tmp_path)
    preference = "[Preference(chosen=0, rejected=1, aspect=None, margin=None)]\n"
    assert told == "".join(said for _, said in tried) + preference + "{'rm_humble': [[-1.0, -2.0, -0.0]]}\n"
