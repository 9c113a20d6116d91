from __future__ import annotations

from typing import Any

from prefsel.report.summary import story


def test_the_story_in_plain_numbers(report: dict[str, Any]) -> None:
    assert story(report).striptags() == (
        "2,156 rows were read from 2 sources; 4 were quarantined and 7 were duplicates. "
        "They hold 1,942 prompts and 3,495 pairs. "
        "2,097 pairs (60.0 %) were eligible; of the others 1,021 train the models made here, 348 are held out, "
        "17 contradict another label, 12 are duplicates. "
        "map30 kept 627 pairs (30.0 % of 2,091); map30-random kept 627 pairs (30.0 % of 2,091). "
        "dpo-map30 trained on 625 pairs, held-out accuracy 64.5 ± 2.6 % after (348 pairs); "
        "dpo-random trained on 625 pairs, held-out accuracy 55.1 ± 2.7 % after (348 pairs). "
        "The run took 3 min 12 s on 2 CPU cores."
    )


def test_the_story_escapes_names(report: dict[str, Any]) -> None:
    report["training"][0]["name"] = "<b>x</b>"
    assert "<code>&lt;b&gt;x&lt;/b&gt;</code>" in story(report)


def test_the_story_names_only_the_first(report: dict[str, Any]) -> None:
    report["selections"] = [dict(report["selections"][0], name=f"s{place}") for place in range(7)]
    assert "s3 kept 627 pairs (30.0 % of 2,091); 3 more selections below." in story(report).striptags()
