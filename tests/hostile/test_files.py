"""Whatever a file holds, every row of it is accounted for once, or one message says what is wrong with the file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile_files import LIMIT, all_files

from prefsel import display
from prefsel.config import FormatOptions
from prefsel.errors import PrefselError
from prefsel.ingest.locations import list_files
from prefsel.ingest.readers import read_rows
from prefsel.ingest.windows import ingest_windows

FILES = all_files()
PARTS = 12
ROWS_PER_SHARD = 4
"""So that files of a few rows are several windows."""


def accounted(file: Path, expected: int | None) -> str:
    """Ingest a file and check what holds for every one; "" or the message that it ended with."""
    try:
        (uri,) = list_files(str(file))
        rows = list(read_rows(uri, max_row_bytes=LIMIT))
        places = [one.row for one in rows]
        assert places == list(range(len(rows)))
        assert expected is None or len(rows) == expected
        windows = list(
            ingest_windows(iter(rows), file=uri, format=None, options=FormatOptions(), rows_per_shard=ROWS_PER_SHARD)
        )
    except PrefselError as refused:
        told = display.message(str(refused))
    else:
        told = ""
    if told:
        assert len(told) <= display.MAX_MESSAGE
        assert all(c.isprintable() or c in "\n\t" for c in told)
        return told
    assert sum(window.num_rows for window in windows) == len(rows)
    for window in windows:
        assert window.num_rows == window.num_accepted + window.num_quarantined + window.num_duplicate
        assert window.num_quarantined == window.quarantine.num_rows == sum(window.reasons.values())
        for table in (window.groups, window.pairs, window.quarantine):
            table.validate(full=True)
    quarantined = [one["row"] for window in windows for one in window.quarantine.to_pylist()]
    assert len(set(quarantined)) == len(quarantined)
    assert set(quarantined) <= set(places)
    return ""


def test_there_are_many_files() -> None:
    assert len(FILES) >= 450
    assert len({name for name, _, _ in FILES}) == len(FILES)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_row_is_accounted_for(tmp_path: Path, part: int) -> None:
    ended = []
    for number, (name, data, expected) in enumerate(FILES[part::PARTS]):
        file = tmp_path / str(number) / "".join(c if c.isalnum() or c in "-." else "_" for c in name)
        file.parent.mkdir()
        file.write_bytes(data)
        began = time.monotonic()
        try:
            ended.append(accounted(file, expected))
        except Exception as error:
            error.add_note(f"file: {name}")
            raise
        assert time.monotonic() - began < 60, name
    assert "" in ended  # most files are read


MEASURED = """
import resource, sys
from prefsel.ingest.readers import read_rows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, limit, files = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for _ in read_rows(small, max_row_bytes=limit): pass
before = peak()
for file in files:
    reasons = {getattr(one, "reason", "read") for one in read_rows(file, max_row_bytes=limit)}
    print(file, reasons, (peak() - before) / limit)
assert peak() - before <= 4 * limit, (peak() - before) / limit
"""


def test_a_bomb_takes_no_more_memory_than_four_of_the_largest_rows(tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing else raised; rows may be of 16 MiB, as by default."""
    limit = 16 << 20
    files = {name: data for name, data, _ in FILES}
    made = {name.replace("'", ""): data for name, data in files.items() if name.startswith("bomb")}
    made["long.jsonl"] = b'{"prompt": "' + b"x" * (20 * limit) + b'"}'
    made["values.jsonl"] = b'{"prompt": [' + b"[]," * (limit // 3 - 99) + b"[]]}"
    made["array.json"] = b"[" + b'{"a": "' + b"x" * (20 * limit) + b'"}, {"a": 1}]'
    for name, data in [("small.jsonl.gz", files["whole.jsonl.gz"]), *made.items()]:
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "small.jsonl.gz"), str(limit)]
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in made)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
