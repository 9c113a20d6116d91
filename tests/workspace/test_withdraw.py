"""Rows that are taken back leave everything: no id and no text of them is left, and nothing else is computed again."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from showing import showing as find_showing
from typer.testing import CliRunner

from prefsel.cli import app
from prefsel.config.file import parse_config
from prefsel.errors import UserError
from prefsel.ingest.identity import completion_id, pair_id, prompt_id
from prefsel.mend import mend
from prefsel.pipeline import run
from prefsel.progress import Progress
from prefsel.withdraw.found import find
from prefsel.withdraw.keys import Asked, Given, parse, read_file
from prefsel.withdraw.removal import finish_withdrawals, withdraw
from prefsel.workspace.documents import write_document
from prefsel.workspace.folders import check_folder, seal_files
from prefsel.workspace.ledger import Artifact
from prefsel.workspace.storage import Storage, digest
from prefsel.workspace.verify import verify
from prefsel.workspace.withdrawals import Withdrawal, read_withdrawals, write_withdrawal

pytestmark = pytest.mark.usefixtures("local_ray")

QUIET = Progress(quiet=True)
NUM_PROMPTS = 30


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


class Row:
    """The ids and texts of a row of the corpus."""

    def __init__(self, prompt: str, chosen: str, rejected: str) -> None:
        self.texts = (prompt, chosen, rejected)
        self.prompt = prompt_id(user(prompt))
        self.chosen, self.rejected = (completion_id(self.prompt, said(text)) for text in (chosen, rejected))
        self.pair = pair_id(self.prompt, self.chosen, self.rejected, None)


def row(source: str, number: int) -> Row:
    return Row(f"{source} question {number}.", f"{source} good {number}.", f"{source} bad {number}.")


def write_corpus(folder: Path) -> dict[str, str]:
    """Two files; rows 3 and 30 of the first have one prompt, and the last row of each cannot be used."""
    rng, paths = np.random.default_rng(1), {}
    for source in ("first", "second"):
        rows = [row(source, number).texts for number in range(NUM_PROMPTS)]
        rows += [(f"{source} question 3.", f"{source} better 3.", f"{source} worse 3.")]
        lines = [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "author": f"author {number}"}
            | {f"r_{side}": float(rng.normal()) for side in ("chosen", "rejected")}
            for number, (prompt, chosen, rejected) in enumerate(rows)
        ]
        unusable = {"prompt": f"{source} question 5.", "chosen": None, "author": "nobody"}
        texts = [json.dumps(line) for line in (*lines, unusable)]
        (folder / f"{source}.jsonl").write_text("\n".join(texts) + "\n")
        paths[source] = str(folder / f"{source}.jsonl")
    return paths


def configuration(paths: dict[str, str]) -> Any:
    return parse_config(
        {
            "name": "withdraw",
            "sources": [{"name": name, "paths": [path], "carry": ["author"]} for name, path in paths.items()],
            "ingest": {"rows_per_shard": 16, "max_quarantine_fraction": 0.1},
            "split": {"holdout": 0.1},
            "scorers": [{"kind": "imported", "name": "r", "field": "r"}],
            "metrics": [{"name": "margin", "metric": "explicit_margin", "params": {"rm": "r"}}],
            "selections": [
                {"name": "half", "rule": {"kind": "top", "score": "score_margin", "ratio": 0.5}, "dataset": "always"}
            ],
        }
    )


class Whole:
    """A finished workspace."""

    def __init__(self, home: Path) -> None:
        self.config = configuration(write_corpus(home))
        self.folder = home / "w"
        run(self.config, str(self.folder), QUIET)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Whole:
    return Whole(tmp_path_factory.mktemp("withdraw"))


@pytest.fixture
def storage(whole: Whole, tmp_path: Path) -> Storage:
    shutil.copytree(whole.folder, tmp_path / "w")
    return Storage(str(tmp_path / "w"))


def showing(storage: Storage, *rows: Row, prompt: bool = True) -> set[str]:
    """Files that hold an id or a text of rows; with `prompt`, also those of their prompts."""
    ids = [one for row in rows for one in (row.pair, row.chosen, row.rejected, *([row.prompt] if prompt else []))]
    return find_showing(storage, ids, [text for row in rows for text in row.texts[0 if prompt else 1 :]])


def take_back(storage: Storage, asked: Asked) -> Withdrawal:
    record = find(storage, asked, "asked for by their author")
    assert record is not None
    return withdraw(storage, record)


def attempts(storage: Storage, kind: str) -> int:
    return sum(f"{kind}/" in name and "/attempts/" in name for name in storage.files("", recursive=True))


def numbers(storage: Storage) -> dict[tuple[bytes, ...], float]:
    """Every imported number by completion."""
    found = {}
    for path in {
        str(Path(name).parent) for name in storage.files("columns", recursive=True) if name.endswith(".parquet")
    }:
        artifact = Artifact(storage, path)
        for shard in artifact.entries():
            for one in artifact.read(shard).to_pylist():
                found |= dict(zip(((path.encode(), key) for key in one["completion_ids"]), one["rm_r"]))
    return found


def test_a_pair_leaves_everything_and_nothing_else_is_computed_again(whole: Whole, storage: Storage) -> None:
    taken = row("first", 7)
    before = numbers(storage)
    assert len(showing(storage, taken)) > 4  # groups, pairs, columns, eligible, scores, …
    record = take_back(storage, Asked(pairs=frozenset([taken.pair])))
    assert record.prompts == [taken.prompt.hex()]
    assert record.pairs == [taken.pair.hex()]
    assert showing(storage, taken) == set()
    assert verify(storage).findings == []
    begun = attempts(storage, "columns")
    outcome = run(whole.config, storage.uri, QUIET)
    scored = next(report for report in outcome.reports if report.stage == "score")
    assert scored.computed_shards == 0
    assert attempts(storage, "columns") == begun
    ingested = next(report for report in outcome.reports if report.name == "first")
    assert ingested.dropped["quarantined:withdrawn"] == 1
    assert ingested.computed_shards == 0
    assert ingested.rows_out == NUM_PROMPTS  # 31 usable rows, one of which was taken back
    assert showing(storage, taken) == set()
    assert verify(storage).findings == []
    gone = {taken.chosen, taken.rejected}
    assert numbers(storage) == {key: value for key, value in before.items() if key[1] not in gone}


def test_it_is_what_a_corpus_without_it_gives(whole: Whole, storage: Storage, tmp_path: Path) -> None:
    """Against a run over files that never had the row: the same pairs are kept, with the same scores."""
    taken = row("second", 11)
    take_back(storage, Asked(pairs=frozenset([taken.pair])))
    run(whole.config, storage.uri, QUIET)
    (tmp_path / "without").mkdir()
    paths = write_corpus(tmp_path / "without")
    lines = Path(paths["second"]).read_text().splitlines()
    Path(paths["second"]).write_text("\n".join(line for line in lines if taken.texts[0] not in line) + "\n")
    fresh = Storage(str(tmp_path / "fresh"))
    run(configuration(paths), fresh.uri, QUIET)

    def kept(storage: Storage) -> set[tuple[bytes, float]]:
        files = [name for name in storage.files("selections", recursive=True) if name.endswith(".parquet")]
        tables = [pq.read_table(storage.full(name)) for name in files]
        return {(one["pair_id"], one["score"]) for table in tables for one in table.to_pylist()}

    assert kept(storage) == kept(fresh)
    assert kept(fresh)


def test_a_prompt_stays_while_a_pair_of_it_does(storage: Storage) -> None:
    taken, other = row("first", 3), Row("first question 3.", "first better 3.", "first worse 3.")
    record = take_back(storage, Asked(pairs=frozenset([taken.pair])))
    assert record.prompts == []
    assert showing(storage, taken, prompt=False) == set()
    assert any(name.startswith("pairs/") for name in showing(storage, other))
    assert verify(storage).findings == []
    record = take_back(storage, Asked(pairs=frozenset([other.pair])))
    assert record.prompts == [taken.prompt.hex()]
    assert showing(storage, taken, other) == set()


def test_a_prompt_goes_with_all_of_it(storage: Storage) -> None:
    taken, other = row("first", 3), Row("first question 3.", "first better 3.", "first worse 3.")
    record = take_back(storage, Asked(prompts=frozenset([taken.prompt])))
    assert set(record.pairs) == {taken.pair.hex(), other.pair.hex()}
    assert showing(storage, taken, other) == set()
    assert verify(storage).findings == []


def test_quarantined_text_goes_too(storage: Storage) -> None:
    """Of a prompt that is taken back, and of a row that is named by its place."""
    taken = row("first", 5)
    take_back(storage, Asked(prompts=frozenset([taken.prompt])))
    assert showing(storage, taken) == set()
    take_back(storage, parse(Given(source_key=[f"second/second.jsonl#{NUM_PROMPTS + 1}"])))
    left = showing(storage, row("second", 5))
    assert left
    assert not any(name.startswith("quarantine") for name in left)


@pytest.mark.parametrize("key", ["first/first.jsonl#7", "first:author=author 7"])
def test_rows_are_known_by_their_place_and_by_what_they_carry(storage: Storage, key: str) -> None:
    record = take_back(storage, parse(Given(source_key=[key])))
    assert record.pairs == [row("first", 7).pair.hex()]


def test_a_row_never_comes_back(whole: Whole, storage: Storage, tmp_path: Path) -> None:
    """Not in the same file ingested anew, and not in another file."""
    taken = row("first", 9)
    take_back(storage, Asked(pairs=frozenset([taken.pair])))
    lines = Path(whole.config.sources[0].paths[0]).read_text().splitlines()
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(lines[5:12]) + "\n")
    table = whole.config.model_dump(mode="json", by_alias=True)
    table["sources"].append({"name": "more", "paths": [str(more)], "carry": ["author"]})
    outcome = run(parse_config(table), storage.uri, QUIET)
    added = next(report for report in outcome.reports if report.stage == "ingest" and report.name == "more")
    assert (added.rows_out, added.dropped["quarantined:withdrawn"]) == (6, 1)
    assert showing(storage, taken) == set()


@pytest.mark.parametrize("kind", ["groups", "pairs", "quarantine"])
def test_a_shard_made_again_is_what_the_removal_left(storage: Storage, kind: str) -> None:
    take_back(storage, Asked(pairs=frozenset([row("first", 3).pair]), prompts=frozenset([row("first", 5).prompt])))
    take_back(storage, Asked(pairs=frozenset([row("first", 17).pair])))
    files = [Path(storage.full(name)) for name in storage.files(f"{kind}/first") if name.endswith(".parquet")]
    before = {file: digest(file.read_bytes()) for file in files}
    for file in files:
        file.unlink()
    assert mend(storage, QUIET).is_clean
    assert {file: digest(file.read_bytes()) for file in files} == before


def killed_at(storage: Storage, monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], bool]:
    """Let so many changes of the workspace through, and none after them; returns whether there was one more."""
    left, was_killed = [number], [False]

    def guarded(change: Callable[..., None]) -> Callable[..., None]:
        def guard(self: Storage, *arguments: Any) -> None:
            if arguments[0].startswith("withdrawn/copy") or left[0] > 0:
                left[0] -= 1
                return change(self, *arguments)
            was_killed[0] = True
            raise KeyboardInterrupt

        return guard

    for name in ("write", "delete", "delete_tree"):
        monkeypatch.setattr(Storage, name, guarded(getattr(Storage, name)))
    return lambda: was_killed[0]


def content(storage: Storage) -> dict[str, str]:
    """Data files, and what the corpus is, by path."""
    names = [name for name in storage.files("", recursive=True) if name.endswith((".parquet", "catalog.json"))]
    return {name: digest(storage.read(name)) for name in names}


def test_killed_anywhere_and_run_again_it_ends_the_same(whole: Whole, tmp_path: Path) -> None:
    taken = row("first", 5)
    asked = Asked(pairs=frozenset([row("first", 3).pair]), prompts=frozenset([taken.prompt]))
    shutil.copytree(whole.folder, tmp_path / "through")
    through = Storage(str(tmp_path / "through"))
    take_back(through, asked)
    wanted, number = content(through), 2
    while True:
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(whole.folder, tmp_path / "killed")
        storage = Storage(str(tmp_path / "killed"))
        with pytest.MonkeyPatch.context() as patch:
            was_killed = killed_at(storage, patch, number)
            with contextlib.suppress(KeyboardInterrupt):
                take_back(storage, asked)
        assert len(finish_withdrawals(storage)) == was_killed()
        assert content(storage) == wanted, f"killed after {number} changes"
        assert showing(storage, taken) == set()
        assert verify(storage).findings == []
        if not was_killed():
            break
        number += 1
    assert number > 25


def test_a_killed_withdrawal_is_finished_by_the_next_run(whole: Whole, storage: Storage) -> None:
    taken = row("first", 7)
    record = find(storage, Asked(pairs=frozenset([taken.pair])), "")
    assert record is not None
    write_withdrawal(storage, record)
    run(whole.config, storage.uri, QUIET)
    assert showing(storage, taken) == set()
    assert [one.state for one in read_withdrawals(storage)] == ["done"]
    assert find(storage, Asked(pairs=frozenset([taken.pair])), "") is None


def test_a_record_is_never_lost_to_one_damage(storage: Storage) -> None:
    record = take_back(storage, Asked(pairs=frozenset([row("first", 7).pair])))
    Path(storage.full(f"withdrawn/{record.id}.json")).write_bytes(b"{")
    assert [one.id for one in read_withdrawals(storage)] == [record.id]
    assert not verify(storage).is_clean
    assert mend(storage, QUIET).is_clean


def test_exports_in_the_workspace_go(storage: Storage) -> None:
    taken = row("first", 7)
    storage.write("exports/all.jsonl", json.dumps({"pair_id": taken.pair.hex()}).encode())
    storage.write("exports/others.jsonl", json.dumps({"pair_id": row("first", 8).pair.hex()}).encode())
    record = take_back(storage, Asked(pairs=frozenset([taken.pair])))
    assert record.files == ["exports/all.jsonl"]
    assert storage.files("exports") == ["exports/others.jsonl"]


def test_what_was_never_committed_goes_too(storage: Storage) -> None:
    """As attempts leave it that were killed: it may hold any row."""
    taken = row("first", 7)
    for name in showing(storage, taken):
        kind, root = name.split("/")[0], name.split("/")[1]
        copy = f"published/half/v0001/{name}" if kind == "datasets" else f"{kind}/{root}/first/killed.parquet"
        storage.write(copy, storage.read(name))
    take_back(storage, Asked(pairs=frozenset([taken.pair])))
    assert showing(storage, taken) == set()
    assert verify(storage).findings == []


def test_an_id_that_a_card_or_a_summary_names_goes_too(storage: Storage) -> None:
    """A threshold among equal scores lies at a pair, and is told with the pair's id."""
    taken, other = row("first", 7), row("first", 8)
    card = f"between {taken.pair.hex()} and {other.pair.hex()}, é".encode()
    seal_files(storage, "published/half/v0001", {"README.md": card, "lineage.json": card}, {})
    write_document(storage, "diffs/half@1-2/summary.json", {"thresholds": {"pair_id": taken.pair.hex()}})
    take_back(storage, Asked(pairs=frozenset([taken.pair])))
    assert showing(storage, taken) == set()
    assert storage.read("published/half/v0001/README.md") == card.replace(taken.pair.hex().encode(), b"withdrawn")
    assert check_folder(storage, "published/half/v0001", quick=False) == {}


@pytest.mark.parametrize("lost", ["data/a.parquet", "_ledger/files.json"])
def test_a_published_version_that_is_damaged_is_in_no_withdrawals_way(storage: Storage, lost: str) -> None:
    in_datasets = {
        number: [one for one in showing(storage, row("first", number)) if one.startswith("datasets/")]
        for number in range(4, 20)
    }
    number, (name, *_) = next((number, names) for number, names in in_datasets.items() if names)
    taken = row("first", number)
    files = {"data/a.parquet": storage.read(name), "data/b.parquet": storage.read(name)}
    seal_files(storage, "published/half/v0001", files, {})
    storage.write(f"published/half/v0001/{lost}", b"{")
    take_back(storage, Asked(pairs=frozenset([taken.pair])))
    assert showing(storage, taken) == set()
    assert [one.state for one in read_withdrawals(storage)] == ["done"]


@pytest.mark.parametrize("moment", ["at once", "killed", "later"])
def test_models_that_saw_a_row_are_removed_when_that_is_asked_for(storage: Storage, moment: str) -> None:
    pair = row("first", 7).pair
    seal_files(storage, "models/m@1", {"model.safetensors": b"1"}, {})
    found = find(storage, Asked(pairs=frozenset([pair])), "")
    assert found is not None
    record = replace(found, models=["models/m@1"], removes_models=moment != "later")
    if moment == "at once":
        withdraw(storage, record)
    elif moment == "killed":
        write_withdrawal(storage, record)
        finish_withdrawals(storage)
    else:
        withdraw(storage, record)
        assert storage.files("models", recursive=True)
        told = CliRunner().invoke(app, ["withdraw", "-w", storage.uri, "--pair-id", pair.hex(), "--remove-models"])
        assert told.exit_code == 0, told.output
    assert not storage.files("models", recursive=True)
    assert [(one.state, one.models) for one in read_withdrawals(storage)] == [("done", [])]


def test_what_is_told_as_removed_was_there(storage: Storage) -> None:
    counts = take_back(storage, Asked(pairs=frozenset([row("first", 7).pair]))).counts
    assert min(counts.values()) > 0


def test_many_keys_are_looked_up_at_once() -> None:
    given = Given(source_key=[f"first/a.jsonl#{n}" for n in range(50_000)] + ["first/b.jsonl#3", "other/a.jsonl#7"])
    asked = parse(given)  # one after the other takes a minute
    (rows,) = asked.in_files("first", ["/data/a.jsonl"])
    assert (len(rows), str(rows[7])) == (50_000, "first/a.jsonl#7")
    assert asked.in_files("first", ["/data/aa.jsonl"]) == []


def test_keys_of_a_file(tmp_path: Path) -> None:
    pair = row("first", 7).pair
    (tmp_path / "keys.txt").write_text(f"{pair.hex()}\n\nfirst/a b.jsonl#3\nfirst:author=me\n")
    asked = read_file(str(tmp_path / "keys.txt"))
    assert asked.either == {pair}
    assert {str(one) for one in asked.rows} == {"first/a b.jsonl#3"}
    assert {str(one) for one in asked.fields} == {"first:author=me"}
    pq.write_table(pa.table({"pair_id": pa.array([pair], pa.binary(16))}), tmp_path / "keys.parquet")
    (tmp_path / "keys.csv").write_text(f"pair_id,note\n{pair.hex()},x\n")
    for name in ("keys.parquet", "keys.csv"):
        assert read_file(str(tmp_path / name)).pairs == {pair}
    (tmp_path / "other.csv").write_text("name\nx\n")
    for name in ("other.csv", "none.txt"):
        with pytest.raises(UserError, match="--file"):
            read_file(str(tmp_path / name))


@pytest.mark.parametrize("given", [{"pair_id": ["12"]}, {"source_key": ["first"]}, {"prompt_id": ["x" * 32]}])
def test_what_is_no_key_is_refused(given: dict[str, list[str]]) -> None:
    with pytest.raises(UserError, match="valid"):
        parse(Given(**given))


def test_what_is_not_there_is_refused(storage: Storage) -> None:
    before = content(storage)
    for asked in (Asked(pairs=frozenset([b"0" * 16])), parse(Given(source_key=["first/first.jsonl#99"]))):
        with pytest.raises(UserError, match="not in this workspace"):
            find(storage, asked, "")
    assert content(storage) == before
    assert not storage.files("withdrawn")
