"""Preference divergence: a pair-by-pair re-implementation, shards, and what it refuses."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefsel.errors import UserError
from prefsel.metrics import METRICS, score_table
from prefsel.metrics.preference_divergence import PreferenceDivergence
from prefsel.metrics.statistics import fit, reply
from prefsel.metrics.table import complete, first_missing, read_columns, score_pairs

ASPECTS = ["helpfulness", "honesty", "truthfulness"]


def margins_table(margins, own, lengths, source: str = "rm", hide_own: bool = False) -> pa.Table:
    """Margins as chosen minus rejected with rejected = 1; the own aspect's reward can be left null."""
    columns: dict[str, object] = {
        "pair_id": list(range(len(margins))),
        "aspect": [None if k is None else ASPECTS[k] for k in own],
        "num_tokens_chosen": [100 + length for length in lengths],
        "num_tokens_rejected": [100] * len(margins),
    }
    for k, aspect in enumerate(ASPECTS):
        columns[f"{source}_{aspect}_chosen"] = [
            None if hide_own and own[row] == k else 1 + margin[k] for row, margin in enumerate(margins)
        ]
        columns[f"{source}_{aspect}_rejected"] = [1.0] * len(margins)
    return pa.table(columns)


def naive(margins, own, lengths, gamma: float, rho: float | str, weights=None) -> list[float]:
    """-PD of the paper, one pair at a time."""
    slope, scale = [], []
    for k in range(len(ASPECTS)):
        outside = [row for row in range(len(margins)) if own[row] is None or own[row] != k]
        y = np.array([margins[row][k] for row in outside])
        x = np.array([lengths[row] for row in outside], float)
        slope.append(np.cov(x, y, ddof=0)[0, 1] / x.var() if rho == "fit" else rho)
        scale.append(np.quantile(np.abs(y - slope[k] * x), gamma))
    scores = []
    for row, margin in enumerate(margins):
        total = 0.0
        for k in range(len(ASPECTS)):
            if own[row] != k:
                normalised = (margin[k] - slope[k] * lengths[row]) / scale[k]
                total += min(1.0, max(-1.0, normalised)) * (1 if weights is None else weights[k])
        scores.append(total / (1 if weights is None or own[row] is None else weights[own[row]]))
    return scores


def corpus(num_rows: int, with_own: bool = True) -> tuple[list[list[float]], list[int | None], list[int]]:
    rng = np.random.default_rng(num_rows)
    margins = np.round(rng.standard_normal((num_rows, 3)) * [1, 5, 0.2], 2).tolist()
    own = [*[0, 1, 2], *rng.integers(0, 3, num_rows - 3).tolist()] if with_own else [None] * num_rows
    return margins, own, [int(n) for n in rng.integers(-50, 50, num_rows)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(6, 60),
    st.sampled_from([0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.01, "fit"]),
    st.sampled_from([None, (0.4, 0.3, 0.3)]),
    st.booleans(),
    st.sampled_from([1, 4, 50]),
)
def test_equals_the_definition_for_any_sharding(
    num_rows: int, gamma: float, rho: float | str, weights: tuple | None, with_own: bool, num_shards: int
) -> None:
    margins, own, lengths = corpus(num_rows, with_own)
    table = margins_table(margins, own, lengths)
    params = PreferenceDivergence(
        aspects=tuple(ASPECTS), gamma=gamma, rho=rho, weights=weights, own_aspect="aspect" if with_own else None
    )
    metric = METRICS["preference_divergence"]
    place_N = np.random.default_rng(0).integers(0, num_shards, num_rows)
    rows_of = [np.flatnonzero(place_N == shard) for shard in range(num_shards)]
    shards = [read_columns(table.take(pa.array(rows, pa.int64())), metric, params) for rows in rows_of]
    fitted = fit(metric, params, lambda request: [reply(metric, params, s, request) for s in shards])
    found = np.empty(num_rows)
    for rows, shard in zip(rows_of, shards):
        found[rows] = score_pairs(metric, params, shard, fitted).score_N
    np.testing.assert_allclose(found, naive(margins, own, lengths, gamma, rho, weights), rtol=1e-12, atol=1e-12)


def test_missing_values_are_reported_once_and_only_where_needed() -> None:
    margins, own, lengths = corpus(6)
    own = [0, 1, 2, None, 0, 0]
    table = margins_table(margins, own, lengths, hide_own=True)
    honesty = table["rm_honesty_chosen"].to_pylist()
    honesty[4], honesty[1] = None, None  # row 1 is labelled for honesty: it is not needed there
    table = table.set_column(table.column_names.index("rm_honesty_chosen"), "rm_honesty_chosen", pa.array(honesty))
    metric, params = METRICS["preference_divergence"], PreferenceDivergence(aspects=tuple(ASPECTS))
    columns = read_columns(table, metric, params)
    missing_N, names = first_missing(metric, params, columns)
    assert [None if place < 0 else names[place] for place in missing_N] == [
        None, None, None, "aspect", "rm_honesty_chosen", None,
    ]  # fmt: skip
    assert len(complete(metric, params, columns)["aspect"]) == 4
    found = score_table(table, "preference_divergence", aspects=ASPECTS)
    assert np.isnan(found).tolist() == [False, False, False, True, True, False]
    rows = [0, 1, 2, 5]
    expected = naive([margins[r] for r in rows], [own[r] for r in rows], [lengths[r] for r in rows], 0.9, 0.0)
    np.testing.assert_allclose(found[rows], expected, atol=1e-12)


def test_a_length_column_can_be_named() -> None:
    margins, own, lengths = corpus(8)
    table = margins_table(margins, own, [0] * 8)
    table = table.append_column("num_chars_chosen", pa.array(lengths))
    table = table.append_column("num_chars_rejected", pa.array([0] * 8))
    found = score_table(table, "preference_divergence", aspects=ASPECTS, rho=0.01, length="num_chars")
    np.testing.assert_allclose(found, naive(margins, own, lengths, 0.9, 0.01), atol=1e-12)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"aspects": ["honesty"]}, "needs at least two different ones"),
        ({"aspects": ["honesty", "honesty"]}, "needs at least two different ones"),
        ({"aspects": ASPECTS, "weights": [0.5, 0.5]}, "weights: got 2 for 3 aspects"),
        ({"aspects": ASPECTS, "weights": [1, 1, 0]}, "weights.2: got 0"),
        ({"aspects": ASPECTS, "gamma": 0}, "gamma: got 0"),
        ({"aspects": ASPECTS, "rho": "fitt"}, "rho"),
        ({"aspects": ["honesty", "truthfulness"]}, "aspect: got 'helpfulness'; valid: honesty, truthfulness"),
        ({"aspects": [*ASPECTS, "style"]}, "missing columns rm_style_chosen (made by a scorer of kind reward_model"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(margins_table(*corpus(6)), "preference_divergence", **params)
    assert message in str(error.value)


def test_an_aspect_without_other_pairs_and_a_scale_of_zero_are_refused() -> None:
    margins, _, lengths = corpus(6)
    with pytest.raises(UserError, match="'honesty' over the pairs of other aspects: no pairs"):
        score_table(margins_table(margins, [1] * 6, lengths), "preference_divergence", aspects=ASPECTS)
    flat = [[0.0, b, c] for _, b, c in margins]
    with pytest.raises(UserError, match=r"'helpfulness' over .* has quantile 0 at 0\.9"):
        score_table(margins_table(flat, [0, 1, 2] * 2, lengths), "preference_divergence", aspects=ASPECTS)
    with pytest.raises(UserError, match=r"rho of 'helpfulness' .* zero variance"):
        score_table(margins_table(margins, [0, 1, 2] * 2, [5] * 6), "preference_divergence", aspects=ASPECTS, rho="fit")
