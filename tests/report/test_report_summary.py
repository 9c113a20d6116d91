from __future__ import annotations

from typing import Any

from prefsel.report.summary import story


def test_the_story_in_plain_numbers(report: dict[str, Any]) -> None:
    assert story(report).striptags() == (
        "2,156 rows were read from 2 sources; 4 were quarantined and 7 were duplicates. "
        "They hold 1,942 prompts and 3,495 pairs. "
        "2,097 pairs (60.0 %) could be selected; of the others 1,021 train the models made here, 348 are held out, "
        "17 contradict another label, 12 are duplicates. "
        "The run took 3 min 12 s on 2 CPU cores."
    )


def test_the_story_escapes_names(report: dict[str, Any]) -> None:
    report["stages"][2]["dropped"] = {"<b>x</b>": 3}
    assert "3 &lt;b&gt;x&lt;/b&gt;" in story(report)
