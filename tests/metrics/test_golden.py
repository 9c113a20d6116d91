"""Every golden example: run here, or claimed by the test file that runs it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pair_tables import score_shards, sided

from prefsel.metrics import METRICS, score_table
from prefsel.metrics.dual_margin import probability
from prefsel.metrics.implicit_margin import reward_margin
from prefsel.metrics.less import adam_feature
from prefsel.metrics.lossdiff import dpo_loss
from prefsel.metrics.preference_divergence import PreferenceDivergence, debiased_margin, divergence
from prefsel.metrics.table import read_columns
from prefsel.pairs.join import group_spread
from prefsel.select import select_table

ROOT = Path(__file__).resolve().parents[2]
ASPECTS = ["helpfulness", "honesty", "truthfulness"]


def kept(score_N: np.ndarray, **rule: object) -> list[int]:
    """Rows that a rule keeps of these scores; `top` unless it says otherwise."""
    table = pa.table({"pair_id": list(range(len(score_N))), "score": score_N})
    return select_table(table, {"kind": "top", "score": "score", **rule}).tolist()


def group_columns(rewards: list[float]) -> dict[str, list[float]]:
    """The flat columns `rm_a_max|min|mean|var` of a pair whose prompt has these rewards."""
    found = group_spread(np.array(rewards, float), np.array([len(rewards)]), with_moments=True)
    return {f"rm_a_{end}": value_G.tolist() for end, value_G in found.items()}


# ------------------------------------------------------------------------------------- preference divergence


def divergence_table(inputs: dict, source: str, hide_own: bool) -> pa.Table:
    """Margins as chosen minus rejected with rejected = 1; the own aspect's reward can be left null."""
    own = inputs["own_aspect"]
    table = sided(num_tokens=[(100 + length, 100) for length in inputs["length_difference"]])
    for k, aspect in enumerate(ASPECTS):
        rows = [(None if hide_own and own[n] == k else 1 + m[k], 1) for n, m in enumerate(inputs["reward_margin"])]
        for name, column in zip((f"{source}_{aspect}_chosen", f"{source}_{aspect}_rejected"), sided(x=rows).columns):
            table = table.append_column(name, column)
    return table.append_column("aspect", pa.array([ASPECTS[k] for k in own]))


@pytest.mark.parametrize("name", ["pd-plain", "pd-length-quantile"])
@pytest.mark.parametrize("source", ["rm", "ratings"])
@pytest.mark.parametrize("hide_own", [False, True])
def test_preference_divergence(golden: dict[str, dict], name: str, source: str, hide_own: bool) -> None:
    example = golden[name]
    expected, atol = example["expected"], example["atol"]
    table = divergence_table(example["inputs"], source, hide_own)
    params = {"aspects": ASPECTS, "source": source, **example["params"]}
    found, fitted = score_shards(table, "preference_divergence", 2, **params)
    np.testing.assert_allclose(-found, expected["pd"], atol=atol)
    assert np.argsort(-found, kind="stable").tolist() == expected["most_negative_first"]

    scales = [fitted[f"scale_{aspect}"]["quantile"] for aspect in ASPECTS]
    np.testing.assert_allclose(scales, expected["quantile"], atol=atol)
    parsed = PreferenceDivergence.model_validate(params)
    columns = read_columns(table, METRICS["preference_divergence"], parsed)
    normalised_KN = [
        np.clip(debiased_margin(columns, parsed, aspect, fitted) / q, -1, 1) for aspect, q in zip(ASPECTS, scales)
    ]
    # Where the own aspect is hidden there is no number to compare.
    is_there_KN = ~np.isnan(normalised_KN)
    np.testing.assert_allclose(
        np.array(normalised_KN)[is_there_KN], np.array(expected["normalised"]).T[is_there_KN], atol=atol
    )


def test_divergence_of_one_pair(golden: dict[str, dict]) -> None:
    example = golden["pd-single"]
    others = [np.array([value]) for value in example["inputs"]["normalised_margin_of_other_aspects"]]
    assert divergence(others, None).tolist() == pytest.approx([example["expected"]["pd"]], abs=example["atol"])


def test_weighted_divergence_of_one_pair(golden: dict[str, dict]) -> None:
    example = golden["pd-weighted"]
    inputs = example["inputs"]
    margins = [np.array([value]) for value in inputs["reward_margin"]]
    found = divergence(margins, np.array([float(inputs["own_aspect"])]), inputs["weights"])
    assert found.tolist() == pytest.approx([example["expected"]["pd"]], abs=example["atol"])


def test_rho_fit(golden: dict[str, dict]) -> None:
    example = golden["rho-fit"]
    inputs = example["inputs"]
    margins = [[margin, row % 3 + 0.5, 1.0 + row] for row, margin in enumerate(inputs["reward_margin"])]
    own = [1 if external else 0 for external in inputs["external"]]
    table = divergence_table({**inputs, "reward_margin": margins, "own_aspect": own}, "rm", False)
    _, fitted = score_shards(table, "preference_divergence", 3, aspects=ASPECTS, rho="fit")
    assert fitted[f"rho_{ASPECTS[0]}"]["slope"] == pytest.approx(example["expected"]["rho"], abs=example["atol"])
    assert fitted[f"rho_{ASPECTS[0]}"]["count"] == sum(inputs["external"])


# ----------------------------------------------------------------------------------- log-prob and influence


@pytest.mark.parametrize("name", ["lossdiff-agree", "lossdiff-conflict", "lossdiff-identical"])
def test_lossdiff(golden: dict[str, dict], name: str) -> None:
    example = golden[name]
    inputs, expected, beta = example["inputs"], example["expected"], example["params"]["beta"]
    models = ("theta", "theta_val", "reference")
    table = sided(**{f"logps_{model}": [inputs[f"logps_{model}"]] for model in models})
    columns = {column: table[column].to_numpy() for column in table.column_names}
    for model in ("theta", "theta_val"):
        irm_N, loss_N = (f(columns, model, "reference", beta) for f in (reward_margin, dpo_loss))
        assert irm_N == pytest.approx([expected[f"irm_{model}"]], abs=example["atol"])
        assert loss_N == pytest.approx([expected[f"loss_{model}"]], abs=example["atol"])
    found = score_table(
        table, "lossdiff", policy="theta", validation_policy="theta_val", reference="reference", beta=beta
    )
    assert found.tolist() == pytest.approx([expected["lossdiff"]], abs=example["atol"])


def test_influence(golden: dict[str, dict]) -> None:
    example = golden["influence-chain-rule"]
    inputs = example["inputs"]
    table = sided(logps_p=[inputs["logps_policy"]], logps_r=[inputs["logps_reference"]], dlogps_v=[inputs["dlogps"]])
    params = {"policy": "p", "reference": "r", **example["params"]}
    assert score_table(table, "implicit_margin", **params) == pytest.approx([example["expected"]["irm"]])
    found = score_table(table, "influence", tangent="v", **params)
    assert found.tolist() == pytest.approx([example["expected"]["influence"]], abs=example["atol"])


def test_truncated_influence(golden: dict[str, dict]) -> None:
    example = golden["tif"]
    inputs, expected = example["inputs"], example["expected"]
    v = np.mean(inputs["validation_gradients"], axis=0)
    # With policy = reference the loss gradient is −β/2 times the margin's, which lies in the chosen log-prob here.
    derivatives = [(np.dot(gradient, v) / -0.05, 0.0) for gradient in inputs["train_gradients"]]
    same = [(-3.0, -4.0)] * len(derivatives)
    table = sided(logps_p=same, logps_r=same, dlogps_v=derivatives)
    found = score_table(table, "influence", policy="p", reference="r", tangent="v")
    np.testing.assert_allclose(found, expected["influence"], atol=example["atol"])
    edges = [np.percentile(found, example["params"][edge]) for edge in ("low", "high")]
    np.testing.assert_allclose(edges, [expected["low"], expected["high"]], atol=example["atol"])
    assert kept(found, kind="band", **example["params"]) == np.flatnonzero(expected["keep"]).tolist()


def test_lossdiff_is_influence_to_first_order(golden: dict[str, dict]) -> None:
    """A quadratic loss, seen by both metrics through the log-probs that give a pair this loss."""
    example = golden["lossdiff-first-order"]
    inputs, expected = example["inputs"], example["expected"]
    theta, a, v = (np.array(inputs[name]) for name in ("theta", "a", "mean_validation_gradient"))

    def margin(at: np.ndarray) -> float:  # softplus(-margin) = loss
        return -math.log(math.expm1(0.5 * np.square(at - a).sum()))

    irm, irm_val = margin(theta), margin(theta - inputs["eta"] * v)
    # d loss / d margin = -σ(-margin), so the margin moves by this much along v.
    derivative = np.dot(theta - a, v) * -(1 + math.exp(irm))
    table = sided(logps_t=[(irm, 0)], logps_tv=[(irm_val, 0)], logps_r=[(0, 0)], dlogps_v=[(derivative, 0)])
    lossdiff = score_table(table, "lossdiff", policy="t", validation_policy="tv", reference="r", beta=1)[0]
    influence = score_table(table, "influence", policy="t", reference="r", tangent="v", beta=1)[0]
    assert influence == pytest.approx(expected["influence"], abs=example["atol"])
    assert lossdiff == pytest.approx(expected["lossdiff"], abs=1e-12)
    assert lossdiff / (inputs["eta"] * influence) == pytest.approx(expected["ratio"], abs=1e-9)


def test_difficulty_gap(golden: dict[str, dict]) -> None:
    example = golden["difficulty-gap"]
    irm = example["inputs"]["irm"]
    table = sided(logps_p=[(value, 0.0) for value in irm], logps_r=[(0.0, 0.0)] * len(irm))
    for name, absolute in (("signed_keep2", False), ("absolute_keep2", True)):
        found = score_table(table, "difficulty_gap", policy="p", reference="r", beta=1.0, absolute=absolute)
        assert kept(found, count=2) == example["expected"][name]


def test_selective_dpo(golden: dict[str, dict]) -> None:
    example = golden["selective-dpo"]
    losses = np.array(example["inputs"]["held_out_losses"])
    table = pa.table({"loss_0": losses[:, 0], "loss_1": losses[:, 1]})
    found = score_table(table, "selective_dpo", losses="loss", seeds=2)
    np.testing.assert_allclose(-found, example["expected"]["mean"], atol=example["atol"])
    assert kept(found, ratio=0.5) == example["expected"]["keep_half"]


def test_less(golden: dict[str, dict]) -> None:
    example = golden["less-feature"]
    inputs, expected = example["inputs"], example["expected"]
    m, v, gradient, validation = (
        np.array(inputs[name]) for name in ("adam_m", "adam_v", "gradient", "validation_gradient")
    )
    feature = adam_feature(m, v, gradient)
    np.testing.assert_allclose(feature, expected["feature"], atol=example["atol"])
    dot, norm = feature @ validation / np.linalg.norm(validation), np.linalg.norm(feature)
    found = score_table(pa.table({"gamma_dot_t": [dot], "gamma_norm_t": [norm]}), "less", tangent="t")
    assert found.tolist() == pytest.approx([expected["cosine"]], abs=example["atol"])


# ------------------------------------------------------------------------------------------ alignment potential


@pytest.mark.parametrize("name", ["map-zscore-w1", "map-zscore-w2.5", "map-signed-mixed", "map-abs-mixed"])
def test_alignment_potential(golden: dict[str, dict], name: str) -> None:
    example = golden[name]
    inputs = example["inputs"]
    means = list(zip(inputs["mean_logps_chosen"], inputs["mean_logps_rejected"]))
    table = sided(
        rm_a=[(margin, 0) for margin in inputs["reward_margin"]],
        logps_p=[(3 * chosen, 7 * rejected) for chosen, rejected in means],
        num_tokens_p=[(3, 7)] * len(means),
    )
    for num_shards in (1, 3):
        found, _ = score_shards(table, "alignment_potential", num_shards, rm="a", policy="p", **example["params"])
        np.testing.assert_allclose(found, example["expected"]["score"], atol=example["atol"])
        if "top2" in example["expected"]:
            assert kept(found, ratio="0.4") == example["expected"]["top2"]


def test_raw_alignment_potential(golden: dict[str, dict]) -> None:
    example = golden["map-raw"]
    inputs = example["inputs"]
    table = sided(rm_a=[inputs["reward"]], logps_p=[inputs["logps_policy"]], logps_r=[inputs["logps_reference"]])
    found = score_table(table, "alignment_potential", rm="a", policy="p", reference="r", **example["params"])
    assert found.tolist() == pytest.approx([example["expected"]["score"]], abs=example["atol"])


def test_group_spread(golden: dict[str, dict]) -> None:
    example = golden["map-group-spread"]
    table = pa.table(group_columns(example["inputs"]["rewards"])).append_column("logps_p_chosen", pa.array([-1.0]))
    for name in ("logps_p_rejected", "logps_r_chosen", "logps_r_rejected"):
        table = table.append_column(name, pa.array([-1.0]))
    # Without an implicit margin the raw form is the spread alone.
    params = {"form": "raw", "spread": "group", "reference": "r"}
    found = score_table(table, "alignment_potential", rm="a", policy="p", **params)
    assert found.tolist() == pytest.approx([example["expected"]["spread"]], abs=example["atol"])


# ------------------------------------------------------------------------------------------------- dual margin

DUAL_MARGIN = [f"dual-margin-{name}" for name in ("beta", "saturated", "zero", "conflict", "two-bounds", "three")]


@pytest.mark.parametrize("name", DUAL_MARGIN)
@pytest.mark.parametrize("num_explicit", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:dual_margin")
def test_dual_margin(golden: dict[str, dict], name: str, num_explicit: int) -> None:
    example = golden[name]
    expected, atol, margins = example["expected"], example["atol"], example["inputs"]["margins"]
    lower, upper, epsilon = example["inputs"]["lower"], example["inputs"]["upper"], example["params"]["epsilon"]
    found_p = [probability(np.array([m]), lower, u, epsilon)[0] for m, u in zip(margins, upper)]
    np.testing.assert_allclose(found_p, expected["p"], atol=atol)

    names = [f"s{place}" for place in range(len(margins))]
    columns = {f"rm_{name}": [(1 + margin, 1)] for name, margin in zip(names, margins[:num_explicit])}
    columns |= {f"logps_{n}": [(margin - 2, -7)] for n, margin in zip(names[num_explicit:], margins[num_explicit:])}
    table = sided(logps_r=[(-2, -7)], **columns)
    sources = {
        "explicit": names[:num_explicit],
        "implicit": [{"policy": policy, "reference": "r"} for policy in names[num_explicit:]],
    }
    mul = score_table(table, "dual_margin", **sources, lower=lower, upper=upper, epsilon=epsilon)
    add = score_table(table, "dual_margin", **sources, mode="add")
    assert [mul[0], add[0]] == pytest.approx([expected["mul"], expected["add"]], abs=atol)


@pytest.mark.parametrize("kind", ["implicit", "explicit"])
@pytest.mark.parametrize("num_shards", [1, 7, 200])
@pytest.mark.filterwarnings("ignore:dual_margin")
def test_upper_search(golden: dict[str, dict], kind: str, num_shards: int) -> None:
    example = golden["dual-margin-upper-search"]
    margins = [float(value) for value, count in example["inputs"]["value_counts"].items() for _ in range(count)]
    rows = [(margin, 0.0) for margin in margins]
    if kind == "explicit":
        table, sources, name = sided(rm_a=rows), {"explicit": ["a"]}, "rm_a"
    else:
        table = sided(logps_p=rows, logps_r=[(0.0, 0.0)] * len(rows))
        sources, name = {"implicit": [{"policy": "p", "reference": "r"}]}, "p/r"
    _, fitted = score_shards(table, "dual_margin", num_shards, **sources)
    assert fitted[f"upper {name}"] == {
        "count": len(margins),
        "maximum": max(margins),
        "upper": example["expected"][f"{kind}_start"],
        "above": example["expected"]["count_above"],
    }


# ------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("name", ["data-map-four", "data-map-two"])
def test_data_map(golden: dict[str, dict], name: str) -> None:
    example = golden[name]
    expected, scores = example["expected"], example["inputs"]["scores"]
    table = pa.table(group_columns(scores))
    assert score_table(table, "data_map", rm="a", axis="mean").tolist() == [expected["mean"]]
    assert score_table(table, "data_map", rm="a", axis="variance").tolist() == [-expected["variance"]]
    if len(scores) == 2:
        table = sided(rm_a=[scores])
        assert score_table(table, "data_map", rm="a", candidates="pair").tolist() == [expected["mean"]]
        found = score_table(table, "data_map", rm="a", axis="variance", candidates="pair")
        assert found.tolist() == [-expected["variance"]]


def test_filtered_dpo(golden: dict[str, dict]) -> None:
    example = golden["filtered-dpo"]
    inputs = example["inputs"]
    table = pa.table({"rm_a_chosen": inputs["reward_chosen"], "rm_a_generated": inputs["reward_generated"]})
    assert (score_table(table, "filtered_dpo", rm="a") > 0).tolist() == [bool(k) for k in example["expected"]["keep"]]


# -------------------------------------------------------------------------------------------------- the claims

CLAIMS: dict[str, Callable | str] = {
    "pd-plain": test_preference_divergence,
    "pd-length-quantile": test_preference_divergence,
    "pd-single": test_divergence_of_one_pair,
    "pd-weighted": test_weighted_divergence_of_one_pair,
    "rho-fit": test_rho_fit,
    "dfpo-loss-pd-0.6": "tests/train/test_losses.py",
    "dfpo-loss-pd+0": "tests/train/test_losses.py",
    "dfpo-loss-pd+0.6": "tests/train/test_losses.py",
    "length-balance-tau0.1": "tests/train/test_reward_losses.py",
    "length-balance-tau0.5": "tests/train/test_reward_losses.py",
    "length-balance-tau1": "tests/train/test_reward_losses.py",
    "length-balance-tau10": "tests/train/test_reward_losses.py",
    "rm-length-penalty": "tests/train/test_reward_losses.py",
    "lossdiff-agree": test_lossdiff,
    "lossdiff-conflict": test_lossdiff,
    "lossdiff-identical": test_lossdiff,
    "lossdiff-first-order": test_lossdiff_is_influence_to_first_order,
    "influence-chain-rule": test_influence,
    "tif": test_truncated_influence,
    "lossdiff-irm-bands": "tests/select/test_select_table.py",
    "map-zscore-w1": test_alignment_potential,
    "map-zscore-w2.5": test_alignment_potential,
    "map-signed-mixed": test_alignment_potential,
    "map-abs-mixed": test_alignment_potential,
    "map-raw": test_raw_alignment_potential,
    "map-group-spread": test_group_spread,
    **dict.fromkeys(DUAL_MARGIN, test_dual_margin),
    "dual-margin-upper-search": test_upper_search,
    "selective-dpo": test_selective_dpo,
    "difficulty-gap": test_difficulty_gap,
    "data-map-four": test_data_map,
    "data-map-two": test_data_map,
    "filtered-dpo": test_filtered_dpo,
    "less-feature": test_less,
    "top-ties-k2": "tests/select/test_select_table.py",
    "top-ties-k3": "tests/select/test_select_table.py",
    "ratio-floor": "tests/test_rules.py",
    "quota-largest-remainder": "tests/test_rules.py",
}


def test_every_example_is_claimed_by_a_test_that_names_it(golden: dict[str, dict]) -> None:
    assert sorted(golden) == sorted(CLAIMS)
    for name, claim in CLAIMS.items():
        if callable(claim):  # in its body, or among its parameters
            text = inspect.getsource(claim) + repr(getattr(claim, "pytestmark", ""))
            assert repr(name) in text or json.dumps(name) in text
        else:
            text = (ROOT / claim).read_text()
            assert json.dumps(name) in text, f"{claim} does not mention {name}"
