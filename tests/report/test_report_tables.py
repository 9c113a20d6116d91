from __future__ import annotations

from typing import Any

from prefsel.report import tables
from prefsel.report.tables import Table


def column(table: Table, title: str) -> list[Any]:
    place = list(table.columns).index(title)
    return [row[place] for row in table.rows]


def test_every_loss_stands_once(report: dict[str, Any]) -> None:
    found = tables.losses(report["stages"])
    # A metric reads all pairs, so it repeats what eligibility dropped; only the missing column is its own loss.
    assert [row[:3] for row in found.rows if row[0] == "Metric"] == [["Metric", "map", "missing_rm_rm"]]
    eligibility = {row[2]: (row[4], row[6]) for row in found.rows if row[0] == "Eligibility"}
    assert eligibility == {
        "holdout": ("348", "10.0 %"),
        "proxy": ("1,021", "29.2 %"),
        "duplicate": ("12", "0.3 %"),
        "contradiction": ("17", "0.5 %"),
    }
    assert "0" not in column(found, "Lost")


def test_a_rate_needs_a_whole_computation(report: dict[str, Any]) -> None:
    stages = report["stages"]
    stages[0] |= {"shards": 4, "computed_shards": 1}
    found = tables.timings(stages)
    rates = dict(zip(zip(column(found, "Step"), column(found, "Name")), column(found, "Rate")))
    assert rates["Ingest", "uf"] == "–"
    assert rates["Scoring", "rm-rm"] == "–"  # reused
    assert rates["Scoring", "causal_logps-policy"] == "393 completions/s"  # 5,512 / 14.02
    assert column(found, "Time")[5] == "reused"
    assert column(found, "Model tokens/s")[4] == "96,345"  # 1,204,311 / 12.5


def test_length_bias_shift(report: dict[str, Any]) -> None:
    found = tables.length_bias(report["selections"])
    assert column(found, "Shift") == ["+18.6", "−0.9"]  # 31.9 − 13.3, 12.4 − 13.3
    assert not tables.length_bias([{"name": "x", "length": {}}]).rows


def test_overlap_against_chance(report: dict[str, Any]) -> None:
    found = tables.overlap(report["overlap"])
    # 627 · 627 / 2,091 = 188.0; 200 / 188.0 = 1.06; 200 / (627 + 627 − 200) = 19.0 %
    assert found.rows[0][:8] == ["map30", "map30-random", "627", "627", "200", "188.0", "1.06 ×", "19.0 %"]


def test_strata_shares(report: dict[str, Any]) -> None:
    found = tables.strata(report["selections"][0])
    assert column(found, "Kept of it") == ["33.3 %", "25.5 %"]
    assert column(found, "Of the kept set") == ["63.8 %", "36.2 %"]


def test_thresholds_of_every_kind_of_rule() -> None:
    top = {"all": {"score": 0.1 + 0.2, "pair_id": "ab" * 16}}
    assert tables.thresholds({"thresholds": top}).rows == [["all", "0.30000000000000004", "ab" * 16]]
    quota = {"uf": {"score": 2.5, "pair_id": None}, "hh": None}
    assert tables.thresholds({"thresholds": quota}).rows == [
        ["uf", "2.5", "all ties kept"],
        ["hh", "–", "nothing kept"],
    ]
    band = {"low": 0.5, "high": 3.5, "reverse": False}
    assert [row[:2] for row in tables.thresholds({"thresholds": band}).rows] == [
        ["low edge", "0.5"],
        ["high edge", "3.5"],
    ]


def test_rules_in_words() -> None:
    assert (
        tables.rule_sentence({"kind": "top", "score": "score_pd", "ratio": 0.3}) == "the 30 % with the highest score_pd"
    )
    reverse = {"kind": "top", "score": "score_pd", "count": 1_000, "reverse": True}
    assert tables.rule_sentence(reverse) == "the 1,000 pairs with the lowest score_pd"
    band = {"kind": "band", "score": "score_irm", "low": 20, "high": 80}
    assert tables.rule_sentence(band) == "the pairs between percentiles 20 and 80 of score_irm"
    assert tables.rule_sentence({"kind": "of another time"}) == ""


def test_example_numbers_stand_side_by_side() -> None:
    numbers = {"rm_x_chosen": 2.5, "rm_x_rejected": -0.25, "score_random": 0.1234, "rm_y_chosen": None}
    found = tables.example_numbers(numbers)
    assert list(found.columns) == ["", "Chosen", "Rejected", "Difference", "Pair"]
    assert found.rows[0] == ["rm_x", "2.5000", "−0.2500", "2.7500", "–"]
    assert found.rows[1] == ["score_random", "–", "–", "–", "0.1234"]
    assert found.rows[2] == ["rm_y", "–", "–", "–", "–"]


def test_given_tables_align_numbers(report: dict[str, Any]) -> None:
    found = tables.given(report["evaluations"][0])
    assert found.kinds == ["text", "num", "num", "num", "num"]
    assert [row[2] for row in found.rows] == ["0.3123", "−0.2900", "–"]
    assert found.rows[1][4] == "–"


def test_given_tables_may_be_ragged() -> None:
    found = tables.given({"columns": ["a"], "rows": [["x", 1], []]})
    assert found.rows == [["x", "1"], ["–", "–"]]


def test_columns_without_any_value_are_left_out() -> None:
    found = tables.scores([{"metric": "m", "num_eligible": 3}])
    assert list(found.columns) == ["Metric", "Pairs"]


def test_nested_settings_become_dotted_keys() -> None:
    found = tables.flat({"lora": {"r": 16, "target": []}, "deepspeed": {}, "beta": 0.1})
    assert found == [("lora.r", "16"), ("lora.target", "none"), ("deepspeed", "none"), ("beta", "0.1")]
