"""`score_table`: names, nulls and numbers that are not finite."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from prefsel.errors import NonFiniteError, UserError
from prefsel.metrics import METRICS, score_table
from prefsel.metrics.explicit_margin import ExplicitMargin
from prefsel.metrics.implicit_margin import ImplicitMargin
from prefsel.metrics.table import column_sources, find_metric, read_columns, score_pairs


def rewards(chosen: list, rejected: list) -> pa.Table:
    ids = pa.array([bytes(15) + bytes([n]) for n in range(len(chosen))], pa.binary(16))
    return pa.table(
        {
            "pair_id": ids,
            "rm_a_chosen": pa.array(chosen, pa.float64()),
            "rm_a_rejected": pa.array(rejected, pa.float64()),
        }
    )


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("implict_margin", {}, "metric: got 'implict_margin'; did you mean 'implicit_margin'? valid: explicit_margin"),
        ("zzz", {}, "metric: got 'zzz'; valid: explicit_margin, implicit_margin, alignment_potential"),
        (
            "implicit_margin",
            {"policy": "p", "betta": 1},
            "betta: unknown key; did you mean 'beta'? valid: absolute, beta",
        ),
        ("implicit_margin", {}, "policy: required, but missing"),
        (
            "implicit_margin",
            {"policy": "p", "reduction": "avg"},
            "reduction: got 'avg'; input should be 'sum' or 'mean'",
        ),
    ],
)
def test_unknown_names_show_the_nearest(name: str, params: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        score_table(rewards([1.0], [0.0]), name, **params)
    assert message in str(error.value)


def test_missing_columns_name_what_makes_them() -> None:
    params = {"policy": "p", "reduction": "mean"}
    with pytest.raises(UserError) as error:
        score_table(rewards([1.0], [0.0]), "implicit_margin", **params)
    message = str(error.value)
    assert "logps_p_chosen (made by a scorer of kind causal_logps)" in message
    assert "num_tokens_p_rejected (made by a scorer of kind causal_logps)" in message
    with pytest.raises(
        UserError, match=r"rm_b_chosen \(made by a scorer of kind reward_model, or function, or imported\)"
    ):
        score_table(rewards([1.0], [0.0]), "explicit_margin", rm="b")


@pytest.mark.parametrize(
    ("metric", "params", "messages"),
    [
        (
            "influence",
            {"policy": "p", "reference": "r", "tangent": "v"},
            ["dlogps_v_chosen (made by a scorer of kind directional_logps)"],
        ),
        ("less", {"tangent": "v"}, ["gamma_dot_v (made by a scorer of kind pair_gradients)", "gamma_norm_v (made by"]),
        (
            "ifd_margin",
            {"policy": "p"},
            [
                "logps_p_chosen (made by a scorer of kind causal_logps)",
                "logps_p_uncond_chosen (made by a scorer of kind causal_logps with unconditional: true)",
                "num_tokens_p_uncond_rejected (made by a scorer of kind causal_logps with unconditional: true)",
            ],
        ),
        ("filtered_dpo", {"rm": "b"}, ["rm_b_generated (made by a scorer of kind generated_reward)"]),
        ("data_map", {"rm": "b"}, ["rm_b_mean (made by a scorer of kind reward_model, or function, or imported)"]),
        ("selective_dpo", {"losses": "l", "seeds": 2}, ["missing columns l_0, l_1"]),
        ("lossdiff", {"policy": "p", "validation_policy": "v", "reference": "r"}, ["logps_v_rejected (made by"]),
        ("dual_margin", {"explicit": ["b"]}, ["rm_b_chosen (made by"]),
        ("preference_divergence", {"aspects": ["x", "y"], "source": "ratings"}, ["imported, as: ratings"]),
    ],
)
def test_every_column_names_its_scorer(metric: str, params: dict, messages: list[str]) -> None:
    with pytest.raises(UserError) as error:
        score_table(rewards([1.0], [0.0]), metric, **params)
    for message in messages:
        assert message in str(error.value)


def test_stand_ins_of_the_newer_columns() -> None:
    metric, params = find_metric("ifd_margin", {"policy": "p"})
    there = ["logps_p_chosen", "logps_p_rejected", "logps_p_uncond_chosen", "logps_p_uncond_rejected"]
    there += ["num_tokens_p_chosen", "num_tokens_p_rejected", "num_tokens_p_uncond_rejected", "num_tokens_rejected"]
    sources = column_sources(metric, params, there)
    assert sources["num_tokens_p_uncond_chosen"] == "num_tokens_p_chosen"
    assert sources["num_tokens_p_uncond_rejected"] == "num_tokens_p_uncond_rejected"
    assert sources["num_tokens_p_rejected"] == "num_tokens_p_rejected"
    metric, params = find_metric("filtered_dpo", {"rm": "a"})
    both = ["rm_a_chosen", "rm_a_generated_chosen"]
    assert column_sources(metric, params, both)["rm_a_generated"] == "rm_a_generated_chosen"
    assert column_sources(metric, params, [*both, "rm_a_generated"])["rm_a_generated"] == "rm_a_generated"


def test_fallback_columns_are_named_for_a_stage() -> None:
    metric, params = METRICS["implicit_margin"], ImplicitMargin(policy="p", reduction="mean")
    there = ["logps_p_chosen", "logps_p_rejected", "num_tokens_p_chosen", "num_tokens_chosen", "num_tokens_rejected"]
    assert column_sources(metric, params, there) == {
        "logps_p_chosen": "logps_p_chosen",
        "logps_p_rejected": "logps_p_rejected",
        "num_tokens_p_chosen": "num_tokens_chosen",  # as the other side: lengths of two tokenizers are no lengths
        "num_tokens_p_rejected": "num_tokens_rejected",
    }
    with pytest.raises(UserError, match=r"missing columns num_tokens_p_chosen .*, num_tokens_p_rejected"):
        column_sources(metric, params, [one for one in there if one != "num_tokens_chosen"])


def test_null_gives_no_score_and_says_which_column() -> None:
    table = rewards([1.0, None, 3.0, None], [0.5, 1.0, None, None])
    np.testing.assert_array_equal(score_table(table, "explicit_margin", rm="a"), [0.5, np.nan, np.nan, np.nan])
    metric, params = METRICS["explicit_margin"], ExplicitMargin(rm="a")
    found = score_pairs(metric, params, read_columns(table, metric, params), {})
    assert [found.names[place] if place >= 0 else None for place in found.missing_N] == [
        None, "rm_a_chosen", "rm_a_rejected", "rm_a_chosen",
    ]  # fmt: skip


@pytest.mark.parametrize(("large", "told"), [(1e200, "overflow"), (1e155, "overflow"), (1e-200, "underflow")])
def test_moments_that_overflow_name_metric_columns_and_values(large: float, told: str) -> None:
    """Every z-score was 0: a score that looked like one."""
    columns = {name: [1.0, 2.0, 4.0] for name in ("num_tokens_p_chosen", "num_tokens_p_rejected")}
    columns |= {"logps_p_chosen": [-1.0, -2.0, -4.0], "logps_p_rejected": [-2.0, -4.0, -16.0]}
    table = pa.table({"rm_a_chosen": [large, 2 * large, -large], "rm_a_rejected": [0.0] * 3, **columns})
    match = rf"alignment_potential: the explicit margin: 3 values from -{large:g} to {2 * large:g}: .* {told} float64"
    with pytest.raises(UserError, match=match.replace("+", r"\+")) as error:
        score_table(table, "alignment_potential", rm="a", policy="p")
    assert "made from rm_a_chosen, rm_a_rejected, logps_p_chosen" in str(error.value)
    # What is largest and still has moments has the z-scores of the same numbers, scaled.
    scaled = [
        score_table(table.set_column(0, "rm_a_chosen", pa.array([n * x for n in (1.0, 2.0, -1.0)])), *AP[0], **AP[1])
        for x in (1.0, 2.0**500, 2.0**-500)
    ]
    assert scaled[0].tolist() == scaled[1].tolist() == scaled[2].tolist()


AP = (("alignment_potential",), {"rm": "a", "policy": "p"})


@pytest.mark.parametrize("params", [{}, {"rho": "fit"}])
def test_scales_and_slopes_that_overflow_are_named(params: dict) -> None:
    table = pa.table(
        {
            **{f"rm_{aspect}_{side}": [1.0, 2.0, 4.0] for aspect in "ab" for side in ("chosen", "rejected")},
            "num_tokens_chosen": [1, 2, 4],
            "num_tokens_rejected": [2, 1, 2],
        }
    )
    table = table.set_column(0, "rm_a_chosen", pa.array([1e308, 1.0, 2.0]))
    table = table.set_column(1, "rm_a_rejected", pa.array([-1e308, 1.0, 1.0]))
    match = {"": "the absolute margin of 'a' .*: 1 values overflow, first at rows .0.", "fit": "rho of 'a' .* overflow"}
    with pytest.raises((NonFiniteError, UserError), match=f"preference_divergence: {match[params.get('rho', '')]}"):
        score_table(table, "preference_divergence", aspects=["a", "b"], own_aspect=None, **params)


def test_nan_is_a_fault_and_null_is_not() -> None:
    table = rewards([1.0, float("nan"), None, float("-inf")], [0.0] * 4)
    with pytest.raises(NonFiniteError, match=f"rm_a_chosen: 2 values .*, first pair_ids {1:032x}, {3:032x}"):
        score_table(table, "explicit_margin", rm="a")
    with pytest.raises(NonFiniteError, match=r"rm_a_chosen: 1 values are NaN or infinite, first at rows \[1\]"):
        score_table(table.drop_columns(["pair_id"])[:2], "explicit_margin", rm="a")


def test_a_score_that_overflows_is_a_fault() -> None:
    with pytest.raises(NonFiniteError, match=r"score_explicit_margin: 1 scores overflow, first at rows \[2\]"):
        score_table(rewards([None, 1.0, 1.7e308], [0.0, 0.0, -1.7e308]), "explicit_margin", rm="a")


def test_an_empty_table_has_no_scores() -> None:
    assert score_table(rewards([], []), "explicit_margin", rm="a").tolist() == []


def test_a_column_of_nothing_but_nulls_has_no_scores() -> None:
    table = pa.table({"rm_a_chosen": pa.nulls(2), "rm_a_rejected": [1.0, 2.0]})
    assert np.isnan(score_table(table, "explicit_margin", rm="a")).all()


def test_integer_and_chunked_columns_are_numbers() -> None:
    table = pa.table({"rm_a_chosen": [3, 5], "rm_a_rejected": pa.chunked_array([[1.5], [2.5]])})
    assert score_table(table, "explicit_margin", rm="a").tolist() == [1.5, 2.5]


def test_every_metric_is_listed_under_its_name_with_documented_parameters() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.paper
        assert metric.params.model_config["frozen"]
        assert metric.params.model_config["extra"] == "forbid"
    assert find_metric("explicit_margin", {"rm": "a"})[1] == ExplicitMargin(rm="a")
