"""Reliability against a naive fixed point: EM iterated until nothing moves, one group at a time."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyarrow as pa
import pytest
from pair_tables import score_shards, sided

from prefsel.errors import UserError
from prefsel.metrics import METRICS, score_table
from prefsel.metrics.reliability import Reliability

PARAMS = {"policy": "p", "reference": "r", "beta": 1.0}


def naive(margins: list[float], *, start: float = 0.9, passes: int = 100_000) -> tuple[float, list[float]]:
    """η and w of one group, as the paper writes them."""
    eta = start
    for _ in range(passes):
        right = [1 / (1 + math.exp(-m)) for m in margins]
        w = [p * eta / (p * eta + (1 - p) * (1 - eta)) for p in right]
        if abs((new := math.fsum(w) / len(w)) - eta) < 1e-16:
            break
        eta = new
    return eta, w


def table(margins: list[float | None], groups: list[str | None], by: str = "source") -> pa.Table:
    """Pairs with these implicit margins (β = 1)."""
    rows = [(None if m is None else m - 7.0, -7.0) for m in margins]
    return sided(logps_p=rows, logps_r=[(-2.0, -2.0)] * len(rows)).append_column(by, pa.array(groups, pa.string()))


def random_margins(num_rows: int) -> tuple[list[float], list[str]]:
    """Three labellers: a careful one, a careless one, and one who turns most labels around."""
    rng = np.random.default_rng(0)
    groups = rng.choice(["ann", "bob", "eve"], num_rows)
    wrong = {"ann": 0.05, "bob": 0.3, "eve": 0.8}
    signs = np.array([-1 if rng.random() < wrong[one] else 1 for one in groups])
    return (signs * np.abs(rng.normal(2.0, 1.0, num_rows))).tolist(), groups.tolist()


def test_two_margins_by_hand() -> None:
    """p = 3/4 and 1/4: with g = 1/(η + 1/2) − 1/(3/2 − η) = 0 the share is 1/2, and w is p itself."""
    margin = math.log(3)
    assert score_table(table([margin, -margin], ["a", "a"]), "reliability", **PARAMS) == pytest.approx([0.75, 0.25])
    # Three of the one and one of the other: 3/(η + 1/2) = 1/(3/2 − η), η = 1: all of them are right.
    assert score_table(table([margin] * 3 + [-margin], ["a"] * 4), "reliability", **PARAMS).tolist() == [1.0] * 4
    # 5 and 2: 5/(η + 1/2) = 2/(3/2 − η), η = 13/14; w = 39/40 and 13/16.
    found = score_table(table([margin] * 5 + [-margin] * 2, ["a"] * 7), "reliability", **PARAMS)
    assert found == pytest.approx([39 / 40] * 5 + [13 / 16] * 2, abs=1e-14)


def test_against_the_naive_fixed_point() -> None:
    margins, groups = random_margins(600)
    found, fitted = score_shards(table(margins, groups), "reliability", 1, **PARAMS)
    for group in ("ann", "bob", "eve"):
        row_M = [row for row, one in enumerate(groups) if one == group]
        eta, w = naive([margins[row] for row in row_M])
        assert fitted["eta"][group] == pytest.approx(eta, abs=1e-12)
        assert found[row_M] == pytest.approx(w, abs=1e-12)
        assert found[row_M].mean() == pytest.approx(fitted["eta"][group], abs=1e-13)  # the fixed point itself
        assert fitted["eta_pairs"][group] == len(row_M)
    assert fitted["eta"]["ann"] > 0.9 > fitted["eta"]["bob"] > 0.5 > fitted["eta"]["eve"]
    assert fitted["eta_search"]["passes"] <= 10


@pytest.mark.parametrize("num_shards", [2, 7, 64])
def test_equal_across_shardings(num_shards: int) -> None:
    """Also margins so small that the sums nearly cancel; 64 shards leave some without a group, or without a row."""
    margins, groups = random_margins(150)
    for scale in (1.0, 1e-3):
        pairs = table([scale * m for m in margins], groups)
        whole, one = score_shards(pairs, "reliability", 1, **PARAMS)
        parts, many = score_shards(pairs, "reliability", num_shards, **PARAMS)
        np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=0)
        for name in ("eta", "eta_wrong", "eta_pairs"):
            assert many[name] == pytest.approx(one[name], rel=1e-12, abs=1e-300)


def test_groups_say_nothing_of_each_other() -> None:
    margins, groups = random_margins(300)
    whole = score_table(table(margins, groups), "reliability", **PARAMS)
    row_M = [row for row, one in enumerate(groups) if one == "bob"]
    alone = score_table(table([margins[row] for row in row_M], ["bob"] * len(row_M)), "reliability", **PARAMS)
    assert whole[row_M].tolist() == alone.tolist()


def test_ends_and_what_nothing_is_known_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, fitted = score_shards(
            table(
                [0.0, 0.0, 1.0, 2.0, -1.0, -2.0, 800.0, -900.0], ["zero"] * 2 + ["up"] * 2 + ["down"] * 2 + ["far"] * 2
            ),
            "reliability",
            1,
            **PARAMS,
        )
    assert fitted["eta"] == pytest.approx({"zero": 0.9, "up": 1.0, "down": 0.0, "far": 0.5})
    assert found.tolist() == pytest.approx([0.9, 0.9, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])


def test_by_an_annotator_and_without_one() -> None:
    pairs = table([1.0, -1.0, 2.0, None], ["ann", "bob", None, "ann"], by="annotator")
    found = score_table(pairs, "reliability", **PARAMS, by="annotator")
    assert found[0] == 1.0
    assert np.isnan(found[2:]).all()
    numbered = pairs.set_column(4, "annotator", pa.array([1, 2, None, 1]))
    np.testing.assert_array_equal(score_table(numbered, "reliability", **PARAMS, by="annotator"), found)
    metric, params = METRICS["reliability"], Reliability(**PARAMS, by="annotator")
    assert metric.columns(params)[0] == "annotator"
    lists = pairs.set_column(4, "annotator", pa.array([["a"]] * 4))
    with pytest.raises(UserError, match=r"annotator: got a column of list<.*>; valid: text or numbers"):
        score_table(lists, "reliability", **PARAMS, by="annotator")
    with pytest.raises(UserError, match="missing columns annotator"):
        score_table(pairs.drop_columns("annotator"), "reliability", **PARAMS, by="annotator")


def test_a_labeller_whose_labels_count_as_wrong_is_named() -> None:
    margins, groups = random_margins(300)
    with pytest.warns(UserWarning, match=r"of 1 of 3 values of source more labels count as wrong .*: eve \(0\.184\)"):
        score_table(table(margins, groups), "reliability", **PARAMS)


def test_weights_that_weigh_nothing_are_told() -> None:
    """Margins of a hundredth, two thirds of them for the label: all labels right is what is likeliest."""
    pairs = table([0.01, 0.02, -0.01] * 20, ["a"] * 60)
    with pytest.warns(UserWarning, match="every label counts as right with certainty, as η is 1 for every source"):
        assert set(score_table(pairs, "reliability", **PARAMS).tolist()) == {1.0}


def test_a_policy_against_itself_is_refused() -> None:
    with pytest.raises(UserError, match="reference: got 'p', the policy itself"):
        score_table(table([], []), "reliability", policy="p", reference="p")


def test_no_pair_is_no_statistic() -> None:
    with pytest.raises(UserError, match="reliability: the margins by source: no pairs to compute it from"):
        score_table(table([None], ["a"]), "reliability", **PARAMS)
