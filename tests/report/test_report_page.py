from __future__ import annotations

import base64
import copy
import hashlib
import math
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest

from prefsel.report import plots
from prefsel.report.page import render, sections

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
LOADS = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "formaction", "background", "ping", "cite"}
FIGURES = ("score_histogram", "selection_histogram", "length_bias", "training_curves", "held_out_accuracy")


class Page(HTMLParser):
    """A page as a strict reader sees it: every tag closed in order, its texts, its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    @property
    def ids(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures: they have tests of their own, and take most of the time."""
    for name in FIGURES:
        monkeypatch.setattr(plots, name, lambda *_: None)


def test_the_whole_page_is_well_formed_and_self_contained(report: dict[str, Any]) -> None:
    html = render(report)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    # One figure per metric and selection, one of lengths, five courses per training and one figure that compares them.
    assert page.tags["svg"] == 2 + 2 + 1 + 2 * 5 + 1
    assert len(page.ids) == len(set(page.ids))
    for tag, name, value in page.attributes:
        if name in LOADS:
            assert value.startswith("#") or value == "data:,", (tag, name, value)
            assert value == "data:," or value[1:] in page.ids
        if name == "style":
            assert not re.search(r"url\((?!#)", value)
        assert not name.startswith("on"), (tag, name)
    assert not {"iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


@pytest.mark.usefixtures("undrawn")
def test_the_only_script_is_ours_and_the_policy_names_its_hash(report: dict[str, Any]) -> None:
    page = Page(render(report))
    assert page.tags["script"] == len(page.scripts) == 1
    assert [name for tag, name, _ in page.attributes if tag == "script"] == []  # it is here, not elsewhere
    policies = [value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value]
    rules = dict(part.strip().split(" ", 1) for part in policies[0].split(";"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # What would end the element, or reach out of the page.
    assert not re.search(r"</|<!--|https?:|fetch|XMLHttp|import|eval|innerHTML", page.scripts[0])


@pytest.mark.usefixtures("undrawn")
def test_the_page_opens_with_the_verdict_and_the_evaluation(report: dict[str, Any]) -> None:
    assert list(sections(report))[:3] == ["verdict", "evaluation", "selections"]
    text = Page(render(report)).text
    told = text[text.index("map30 kept") :]
    assert told.startswith(
        "map30 kept 627 of 2,091 pairs (30.0 %): the 30 % with the highest score_map. "
        "dpo-map30 against random: better in gold reward (+0.63), "
        "no difference shown in held-out accuracy, points (+9.40)."
    )
    assert "map30-random drawn at random kept 627 of 2,091 pairs (30.0 %)." in told
    assert "metric map: warning: a lot of ties" in told
    assert "No model was trained on all eligible pairs" in told
    assert text.index("Gold reward of 512 held-out prompts") < text.index("Keeps the 30 %")
    assert text.index("What each selection cost") > text.index("Keeps the 30 %")


@pytest.mark.usefixtures("undrawn")
def test_numbers_carry_what_they_sort_by(report: dict[str, Any]) -> None:
    cells = [value for tag, name, value in Page(render(report)).attributes if tag == "td" and name == "data-v"]
    assert {"627.0", "0.63", "2091.0", "41.7", "192.4", ""} & set(cells) == {"627.0", "0.63", "2091.0", "41.7", ""}
    assert all(not value or math.isfinite(float(value)) for value in cells)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_text_can_be_read_on_its_paper() -> None:
    """WCAG AA: 4.5 for text, 3 for lines and marks that carry a meaning."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    html = render({"run": {"run": "r"}, "stages": []})
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", html))
    for text, papers in {
        "ink": ("paper", "panel", "warn-panel"),
        "muted": ("paper", "panel"),
        "bad": ("paper",),
        "good": ("paper",),
        "warn": ("paper", "warn-panel"),
        "series-0": ("paper", "panel"),  # links
    }.items():
        for paper in papers:
            assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
    for place in range(6):
        assert contrast(colours[f"series-{place}"], colours["paper"]) >= 3


def test_the_same_record_gives_the_same_bytes_and_stays_as_it_was(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    first = render(report)
    assert repr(report) == repr(before)  # == would tell NaN from itself
    assert render(before) == first


@pytest.mark.usefixtures("undrawn")
def test_text_of_the_corpus_is_only_text(report: dict[str, Any], texts: dict[str, str]) -> None:
    hostile = texts["hostile"]
    for key in ("name", "selection", "model"):
        report["training"][0][key] = hostile
    report["stages"][0] |= {"name": hostile, "dropped": {hostile: 11}, "details": {hostile: hostile}}
    for given in ("tables", "evaluations"):
        report[given][0] |= {"title": hostile, "columns": [hostile], "rows": [[hostile]]}
    report["warnings"] = [hostile]
    report["comparisons"][0] |= dict.fromkeys(("training", "against", "measure"), hostile) | {"unlike": [hostile]}
    report["overlap"][0] |= {"first": hostile}
    report["selections"][1] |= {"name": hostile, "rule": {"kind": "top", "score": hostile, "ratio": 0.3}}
    report["selections"][1]["strata"][0]["stratum"] = hostile
    report["run"] |= {"name": hostile, "config_yaml": hostile, "versions": {hostile: hostile}}
    html = render(report)
    page = Page(html)
    assert "img" not in page.tags
    assert page.tags["script"] == 1  # ours
    assert "alert" not in page.scripts[0]
    shown = hostile.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert page.text.count(shown) >= 20
    assert "{{ 7*7 }}" in page.text
    assert texts["address"] in page.text
    assert texts["long word"] in page.text
    html.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", html)


@pytest.mark.usefixtures("undrawn")
def test_long_texts_are_folded_and_kept_in_full(report: dict[str, Any]) -> None:
    example = report["selections"][0]["examples"][0]
    page = Page(render(report))
    assert " ".join(example["chosen"].split()) in page.text
    assert f"all {len(example['chosen']):,} characters" in page.text
    example["chosen"] = "x" * 50_000
    assert "(cut after 20,000 of 50,000 characters)" in Page(render(report)).text


@pytest.mark.usefixtures("undrawn")
def test_counts_reasons_and_hashes_are_shown(report: dict[str, Any]) -> None:
    text = Page(render(report)).text
    assert "3,495 → 2,097 pairs" in text
    assert "holds for 12 of 12 stages" in text
    assert "a completion, or a message of it, has no text" in text
    assert "627 of 2,091 eligible pairs (30.0 %)" in text
    assert "0.5731250000000001" in text
    assert "ln 2 = 0.693147" in text
    assert "torch 2.13.0+cpu" in text
    assert "rule: {kind: top, score: score_map, ratio: 0.3}" in text
    for artifact in report["artifacts"]:
        assert artifact["path"] in text
        assert (artifact["content"] or "") in text


ABSENCES = {
    "scores": "scores", "selections": "selections length examples", "training": "training", "tables": "costs",
    "artifacts": "artifacts", "overlap": "overlap", "evaluations": "",
}  # fmt: skip


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("value", [None, [], "absent"])
@pytest.mark.parametrize("key", ABSENCES)
def test_a_section_without_data_is_absent(report: dict[str, Any], key: str, value: Any) -> None:
    whole = list(sections(report))
    report.pop(key) if value == "absent" else report.update({key: value})
    page = Page(render(report))
    gone = set(ABSENCES[key].split())
    assert [anchor for anchor in page.ids if anchor in whole] == [anchor for anchor in whole if anchor not in gone]
    links = [value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert links == [anchor for anchor in whole if anchor not in gone]


def test_the_smallest_record_is_a_page() -> None:
    page = Page(render({"run": {"run": "r1"}, "stages": []}))
    assert page.tags["section"] == 0
    assert page.tags["h1"] == 1
    assert "r1" in page.text


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_stopped_says_where_and_why(report: dict[str, Any]) -> None:
    report["run"] |= {"status": "failed", "error": "train dpo-map30: loss is NaN"}
    report["stages"] = report["stages"][:10]
    report["stages"][8] |= {"error": "no space left", "status": "failed"}
    del report["training"]
    page = Page(render(report))
    assert "The run stopped: train dpo-map30: loss is NaN" in page.text
    assert "no space left" in page.text
    assert "Training not part of this run, or not reached" in page.text


def leaves(value: Any, change: Any) -> Any:
    """The record with `change` applied to every number in it, but for what is shown as JSON: rules and parameters."""
    if isinstance(value, dict):
        return {key: one if key in ("rule", "params") else leaves(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [leaves(one, change) for one in value]
    return change(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_unknown_numbers_are_dashes(report: dict[str, Any], unknown: Any) -> None:
    page = Page(render(leaves(report, lambda _: unknown)))
    assert not re.search(r"\b(nan|None|null)\b", page.text)
    assert set(re.findall(r"NaN.{12}", page.text)) <= {"NaN or infinity"}  # the meaning of a drop reason
    assert "– → – pairs" in page.text


@pytest.mark.usefixtures("undrawn")
def test_infinities_do_not_break_the_page(report: dict[str, Any]) -> None:
    assert "∞" in Page(render(leaves(report, lambda _: -math.inf))).text


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for one in value.values() for key in keys(one)}
    return {key for one in value for key in keys(one)} if isinstance(value, list) else set()


def without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: without(one, key) for name, one in value.items() if name != key}
    return [without(one, key) for one in value] if isinstance(value, list) else value


@pytest.mark.usefixtures("undrawn")
def test_every_key_may_be_missing(report: dict[str, Any]) -> None:
    for key in sorted(keys(report) - {"run", "stages"}):
        page = Page(render(without(report, key)))
        assert page.tags["section"] > 0, key
        assert not re.search(r"\bNone\b", page.text), key
