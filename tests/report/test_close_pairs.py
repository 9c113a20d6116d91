"""Pairs beside a threshold, as the report's page tells them."""

from __future__ import annotations

from typing import Any

from prefsel.report import tables
from prefsel.report.page import render

CLOSE = {"tolerance": 1e-12, "count": 25, "pairs": [{"pair_id": "ab" * 16, "score": 1.5, "threshold": 1.5 + 2e-13}]}


def test_how_many_there_are_and_which(report: dict[str, Any]) -> None:
    report["selections"][0]["close"] = CLOSE
    page = render(report)
    assert "25 pairs lie closer to a threshold than the rounding of the corpus&#39;s moments" in page.replace(
        "’", "&#39;"
    )
    assert "the nearest 1 are shown" in page
    assert "ab" * 16 in page


def test_none_at_all_is_told_too_and_scores_without_moments_say_nothing() -> None:
    told = tables.close_note({"close": {"tolerance": 1e-12, "count": 0, "pairs": []}})
    assert told.startswith("0 pairs lie closer to a threshold")
    assert "shown" not in told
    assert tables.close_note({}) == tables.close_note({"close": None}) == tables.close_note({"close": {}}) == ""
