from __future__ import annotations

import math

import numpy as np
import pytest

from prefsel.report import formatting as cells


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1_234_567, "1,234,567"),
        (-12, "−12"),
        (np.int64(1_000), "1,000"),
        (0.0, "0"),
        (0.5, "0.5000"),
        (12.34567, "12.35"),
        (-1234.5678, "−1,235"),
        (0.000012345, "1.234e−05"),
        (2e20, "2.000e+20"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "–"),
        (None, "–"),
        (True, "–"),
        ("12", "–"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert cells.number(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([627, 627, 2_091], ["627", "627", "2,091"]),
        ([118.0, 342.0, -224.0], ["118", "342", "−224"]),
        ([0.31234, -0.29, math.nan], ["0.3123", "−0.2900", "–"]),
        ([-412.3125, -1_388.875, 976.5625], ["−412", "−1,389", "977"]),
        ([None, None], ["–", "–"]),
        ([1e-9, 1.0], ["1.000e−09", "1.000"]),  # the same decimals would show the small one as nothing
        ([math.inf, 1.5], ["∞", "1.500"]),
    ],
)
def test_aligned(values: list[object], texts: list[str]) -> None:
    assert cells.aligned(values) == texts


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (948, 3_160, "30.0 %"),
        (0, 10, "0.0 %"),
        (1, 100_000, "<0.1 %"),
        (99_999, 100_000, ">99.9 %"),
        (7, 7, "100.0 %"),
        (0, 0, "–"),
        (None, 3, "–"),
        (math.nan, 3, "–"),
    ],
)
def test_percent(part: object, whole: object, text: str) -> None:
    assert cells.percent(part, whole) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.456, "0.46 s"),
        (41.73, "41.7 s"),
        (59.97, "1 min 00 s"),
        (192.4, "3 min 12 s"),
        (7_500, "2 h 05 min"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_duration(seconds: object, text: str) -> None:
    assert cells.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1_023, "1,023 B"), (1_536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (None, "–")]
)
def test_size(num_bytes: object, text: str) -> None:
    assert cells.size(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-4, "0.0003"),
        (True, "yes"),
        (None, "–"),
        (math.nan, "–"),
        ([0.9, 0.999], "0.9, 0.999"),
        ([], "none"),
        (list(range(320)), "320 values"),
        ("auto", "auto"),
    ],
)
def test_plain(value: object, text: str) -> None:
    assert cells.plain(value) == text


@pytest.mark.parametrize(("value", "text"), [(18.62, "+18.6"), (-0.9, "−0.9"), (0.0, "0.0"), (None, "–")])
def test_signed(value: object, text: str) -> None:
    assert cells.signed(value, 1) == text


def test_exact_keeps_every_digit() -> None:
    assert float(cells.exact(0.1 + 0.2)) == 0.1 + 0.2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234,567", 1_234_567.0),
        ("−0.5000", -0.5),
        ("1.234e−05", 1.234e-05),
        ("30.0 %", 30.0),
        ("<0.1 %", 0.1),
        ("+0.40 to +0.60", 0.4),
        ("−2.15 to +16.2", -2.15),
        ("1.06 ×", 1.06),
        ("41.7 s", 41.7),
        ("1 min 15 s", 75.0),
        ("2 h 05 min", 7_500.0),
        ("1.5 KiB", 1_536.0),
        ("4 of 5", 4.0),
        ("−∞", -math.inf),
    ],
)
def test_a_cell_sorts_by_the_number_it_shows(text: str, value: float) -> None:
    assert float(cells.sort_key(text)) == value


@pytest.mark.parametrize("text", ["–", "", "reused"])
def test_what_shows_no_number_sorts_as_absent(text: str) -> None:
    assert cells.sort_key(text) == ""


def test_every_number_we_write_sorts_as_itself() -> None:
    for value in (0, 7, -12, 1_234, 0.5, -1234.5678, 1.5e-7, 2e20):
        assert float(cells.sort_key(cells.number(value))) == pytest.approx(value, rel=1e-3)
