from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from prefsel.report import plots


def drawings(report: dict[str, Any]) -> list[str]:
    return [
        str(drawn)
        for drawn in (
            plots.score_histogram(report["scores"][0]),
            plots.selection_histogram(report["selections"][0]),
            plots.length_bias(report["selections"]),
            *plots.training_curves(report["training"][0]),
            plots.held_out_accuracy(report["training"]),
        )
    ]


def words(drawing: Any) -> set[str]:
    return {"".join(element.itertext()) for element in ElementTree.fromstring(str(drawing)).iter("text")}


def test_figures_are_well_formed_and_ask_for_nothing(report: dict[str, Any]) -> None:
    for drawing in drawings(report):
        root = ElementTree.fromstring(drawing)
        assert root.tag == "svg"
        assert root.get("aria-label")
        assert "http" not in drawing
        known = {element.get("id") for element in root.iter()} - {None}
        used = set(re.findall(r"url\(#([^)]+)\)", drawing)) | set(re.findall(r'href="#([^"]+)"', drawing))
        assert used == known


def test_ids_differ_between_figures(report: dict[str, Any]) -> None:
    ids = [found for drawing in drawings(report) for found in re.findall(r'id="([^"]+)"', drawing)]
    assert len(ids) == len(set(ids)) > 0


def test_colours_are_those_of_the_page(report: dict[str, Any]) -> None:
    for drawing in drawings(report):
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawing)) <= {"#ffffff"}
        assert "var(--series-0)" in drawing


def test_the_same_record_gives_the_same_bytes(report: dict[str, Any]) -> None:
    assert drawings(report) == drawings(report)


def test_names_are_not_formulas(report: dict[str, Any]) -> None:
    name = "a$b$<i>&_-->"
    assert f"score_{name}" in words(plots.score_histogram(dict(report["scores"][0], metric=name)))
    renamed = [dict(one, name=f"_{place}{name}") for place, one in enumerate(report["selections"])]
    assert {f"_0{name}", f"_1{name}"} <= words(plots.length_bias(renamed))
    trained = [dict(one, name=f"_{place}{name}") for place, one in enumerate(report["training"])]
    assert {f"\u200b_0{name}", f"\u200b_1{name}"} <= words(plots.held_out_accuracy(trained))


def test_a_bin_that_would_flatten_the_others_is_cut_off_and_named() -> None:
    counts = [30, 40, 50, 9_000, 50, 40, 30, 20]
    assert plots.readable_height(np.array(counts)) == (50.0, [3])
    assert plots.readable_height(np.array([30, 40, 50, 9_000, 8_000, 40, 30, 20])) == (50.0, [3, 4])
    # Not where few bins are filled, or where the next one is as high as a third.
    assert plots.readable_height(np.array([1, 5, 0, 0, 0, 0, 0, 0])) == (5.0, [])
    assert plots.readable_height(np.array([30, 40, 50, 150, 50, 40, 30, 20])) == (150.0, [])
    drawing = plots.score_histogram({"metric": "m", "histogram": {"edges": list(range(9)), "counts": counts}})
    shown = words(drawing)
    assert "↑ 9,000 pairs" in shown
    assert {"20", "40", "60"} <= shown  # the axis is that of the others
    assert not {"5,000", "9,000"} & shown


def test_cuts_are_drawn_and_named(report: dict[str, Any]) -> None:
    one = report["selections"][0]
    assert "cut 0.5731" in words(plots.selection_histogram(one))
    band = dict(one, marks=[-1.0, 1.0])
    assert {"cut −1.000", "cut 1.000", "kept", "could be kept", "pairs per bin"} <= words(
        plots.selection_histogram(band)
    )
    outside = dict(one, marks=[99.0])
    assert not any(word.startswith("cut") for word in words(plots.selection_histogram(outside)))


@pytest.mark.parametrize(
    "histogram",
    [
        None,
        {},
        {"edges": [], "counts": []},
        {"edges": [0, 1], "counts": [0]},
        {"edges": [0, math.nan], "counts": [3]},
        {"edges": [0, 1], "counts": [None]},
        {"edges": [0, 1], "counts": [1, 2]},
        {"edges": [1, 1], "counts": [2]},
        {"counts": [2]},
    ],
)
def test_nothing_to_draw(histogram: Any) -> None:
    assert plots.score_histogram({"metric": "m", "histogram": histogram}) is None
    assert plots.selection_histogram({"name": "s", "all_histogram": histogram}) is None


def test_only_the_histogram_is_needed() -> None:
    histogram = {"edges": [0, 1, 2], "counts": [3, 1]}
    for drawing in (
        plots.score_histogram({"histogram": histogram, "moments": {"mean": None}}),
        plots.selection_histogram({"all_histogram": histogram, "thresholds": None}),
    ):
        assert "pairs per bin" in words(drawing)


def test_training_without_numbers_has_no_curves() -> None:
    assert plots.training_curves({"name": "t", "history": [], "evaluations": None}) == []
    assert plots.training_curves({"name": "t", "history": [{"step": 1, "loss": math.nan}]}) == []
    assert plots.held_out_accuracy([{"name": "t", "evaluations": [{"step": 0, "accuracy": 0.5}]}] * 2) is None
    assert plots.length_bias([{"name": "s", "length": {"all": {"difference": 1.0}, "kept": None}}]) is None


def test_only_curves_with_numbers_are_drawn() -> None:
    history = [{"step": step, "loss": 0.7 - step / 100, "accuracy": None} for step in range(5)]
    (panel,) = plots.training_curves({"name": "t", "history": history})
    assert "loss, nats" in words(panel)
    assert "held out" not in words(panel)
    evaluations = [{"step": 4, "loss": 0.6}]
    (panel,) = plots.training_curves({"name": "t", "history": history, "evaluations": evaluations})
    assert {"training batch", "held out"} <= words(panel)


def test_cuts_that_are_drawn() -> None:
    assert plots.cuts({"thresholds": {"all": {"score": 2.5, "pair_id": None}}}) == [2.5]
    assert plots.cuts({"thresholds": {"low": 0.5, "high": 3.5, "reverse": False}}) == [0.5, 3.5]
    assert plots.cuts({"thresholds": {"a": {"score": 1.0}, "b": {"score": 2.0}}}) == []
    assert plots.cuts({}) == []


def test_global_settings_stay_as_they_were(report: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    drawings(report)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_touched() -> None:
    code = (
        "import sys; from prefsel.report import plots; "
        "plots.score_histogram({'metric': 'm', 'histogram': {'edges': [0, 1, 2], 'counts': [1, 2]}}); "
        "assert 'matplotlib.pyplot' not in sys.modules; assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
