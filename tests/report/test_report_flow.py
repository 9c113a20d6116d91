from __future__ import annotations

from typing import Any

from prefsel.report.flow import accounting, flow


def test_steps_in_order_with_their_boxes(report: dict[str, Any]) -> None:
    steps = flow(report)
    assert [(step.title, [box.name for box in step.boxes]) for step in steps] == [
        ("Ingest", ["uf", "hh"]),
        ("Eligibility", ["all"]),
        ("Models made here", ["policy"]),
        ("Scoring", ["causal_logps-policy", "rm-rm"]),
        ("Metric", ["map", "random"]),
        ("Selection", ["map30", "map30-random"]),
        ("Training", ["dpo-map30", "dpo-random"]),
    ]


def test_a_box_counts_what_went_on_and_what_left(report: dict[str, Any]) -> None:
    box = flow(report)[1].boxes[0]
    assert (box.rows_in, box.rows_out, box.unit) == ("3,495", "2,097", "pairs")
    assert [(loss.count, loss.reason, loss.share, loss.kind) for loss in box.losses] == [
        ("348", "holdout", "10.0 %", "rest"),
        ("1,021", "proxy", "29.2 %", "rest"),
        ("12", "duplicate", "0.3 %", "loss"),
        ("17", "contradiction", "0.5 %", "loss"),
    ]
    assert box.kept_width is not None
    assert abs(box.kept_width + sum(loss.width for loss in box.losses) - 100) < 0.01


def test_what_left_at_eligibility_is_one_line_of_a_metric(report: dict[str, Any]) -> None:
    metric = flow(report)[4].boxes[0]
    assert [(loss.count, loss.reason, loss.kind) for loss in metric.losses] == [
        ("6", "missing rm_rm", "loss"),
        ("1,398", "not eligible", "carried"),
    ]


def test_reused_and_failed_boxes(report: dict[str, Any]) -> None:
    report["stages"][4] |= {"status": "failed", "error": "out of memory"}
    scoring = flow(report)[3].boxes
    assert [(box.badge, box.problem) for box in scoring] == [("failed", "out of memory"), ("reused", "")]


def test_a_row_that_vanished_is_found(report: dict[str, Any]) -> None:
    assert accounting(report) == (12, 12)
    report["stages"][2]["rows_out"] -= 3
    assert flow(report)[1].boxes[0].problem == "3 pairs unaccounted for"
    assert accounting(report) == (11, 12)
    report["stages"][3]["rows_out"] = None
    assert flow(report)[2].boxes[0].problem == "its rows were not counted"


def test_steps_that_did_not_run_have_no_boxes(report: dict[str, Any]) -> None:
    report["stages"] = [*report["stages"][:3], {"stage": "invent", "name": "new", "rows_in": 1, "rows_out": 1}]
    steps = {step.title: len(step.boxes) for step in flow(report)}
    # "Models made here" is optional, so its absence says nothing; an unknown step is shown last under its own name.
    assert steps == {
        "Ingest": 2, "Eligibility": 1, "Scoring": 0, "Metric": 0, "Selection": 0, "Training": 0, "invent": 1
    }  # fmt: skip


def test_what_a_template_did_stands_with_its_scorer(report: dict[str, Any]) -> None:
    notes = {"thinking_dropped": [1200, "prompt 00ff: 'a cat?'"], "template_error": [3, "prompt 00aa: no system role"]}
    use = {"name": "'auto'", "ending": "<|im_end|>\n", "notes": notes}
    stage = next(one for one in report["stages"] if one["stage"] == "score")
    stage["details"] = (stage.get("details") or {}) | {"template": use}
    assert flow(report)[3].boxes[0].notes == [
        "template 'auto' ends an answer with '<|im_end|>\\n'",
        "template 'auto': 3 completions: refused, and without a number; first: prompt 00aa: no system role",
        "template 'auto': 1,200 completions: the template leaves the reasoning out: what is scored is not all that was "
        "answered; first: prompt 00ff: 'a cat?'",
    ]
