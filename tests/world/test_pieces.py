from __future__ import annotations

from pathlib import Path

import pytest

from prefsel.world.pieces import Piece, known, make, make_side_by_side


def write_square(home: Path, parameters, report) -> dict:
    for step in range(250):
        report("square", step + 1, 250)
    (home / "square.txt").write_text(str(parameters["number"] ** 2))
    return {"root": parameters["number"]}


def write_double(home: Path, parameters, report) -> dict:
    (home / "double.txt").write_text(str(2 * parameters["number"]))
    return {}


def fail(home: Path, parameters, report) -> dict:
    raise ValueError("no such number")


SQUARE = Piece("square", "square.txt", write_square)
DOUBLE = Piece("double", "double.txt", write_double)
BROKEN = Piece("square", "square.txt", fail)


def silent(task: str, done: int, total: int) -> None:
    pass


def test_a_piece_is_known_for_its_parameters_while_its_output_is_there(tmp_path):
    assert known(tmp_path, SQUARE, {"number": 3}) is None
    make(tmp_path, SQUARE, {"number": 3}, silent)
    facts = known(tmp_path, SQUARE, {"number": 3})
    assert facts is not None
    assert facts["root"] == 3
    assert facts["seconds"] >= 0
    assert known(tmp_path, SQUARE, {"number": 4}) is None
    (tmp_path / "square.txt").unlink()
    assert known(tmp_path, SQUARE, {"number": 3}) is None


def test_an_interrupted_piece_is_not_known(tmp_path):
    make(tmp_path, SQUARE, {"number": 3}, silent)
    with pytest.raises(ValueError, match="no such number"):
        make(tmp_path, BROKEN, {"number": 3}, silent)
    assert known(tmp_path, SQUARE, {"number": 3}) is None


def test_pieces_side_by_side_report_to_their_parent(tmp_path):
    told = []
    make_side_by_side(tmp_path, [SQUARE, DOUBLE], {"number": 5}, lambda *record: told.append(record))
    assert (tmp_path / "square.txt").read_text() == "25"
    assert (tmp_path / "double.txt").read_text() == "10"
    # Every third of 250 steps, and the last.
    assert told == [("square", step, 250) for step in (*range(3, 250, 3), 250)]


def test_a_failure_in_another_process_is_raised_and_the_others_are_kept(tmp_path):
    with pytest.raises(ValueError, match="no such number"):
        make_side_by_side(tmp_path, [BROKEN, DOUBLE], {"number": 5}, silent)
    assert known(tmp_path, DOUBLE, {"number": 5}) is not None
    assert known(tmp_path, SQUARE, {"number": 5}) is None
