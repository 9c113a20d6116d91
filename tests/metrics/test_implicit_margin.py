"""Implicit margin against its definition, one pair at a time."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pytest

from prefsel.errors import UserError
from prefsel.metrics import score_table

# policy, reference: summed log-probs; tokens of chosen and rejected under each.
ROWS = [
    {"p": (-10.0, -12.0), "r": (-11.0, -11.5), "tokens": (5, 4), "ref_tokens": (6, 3)},
    {"p": (-30.0, -9.0), "r": (-20.0, -9.5), "tokens": (10, 3), "ref_tokens": (9, 2)},
    {"p": (-4.0, -4.0), "r": (-4.0, -4.0), "tokens": (2, 2), "ref_tokens": (2, 2)},
]


def table(own_reference_tokens: bool = True) -> pa.Table:
    columns = {}
    for place, side in enumerate(("chosen", "rejected")):
        columns[f"logps_p_{side}"] = [row["p"][place] for row in ROWS]
        columns[f"logps_r_{side}"] = [row["r"][place] for row in ROWS]
        columns[f"num_tokens_{side}"] = [row["tokens"][place] for row in ROWS]
        if own_reference_tokens:
            columns[f"num_tokens_r_{side}"] = [row["ref_tokens"][place] for row in ROWS]
    return pa.table(columns)


@pytest.mark.parametrize(
    ("reference", "reduction", "absolute", "order"),
    itertools.product([None, "r"], ["sum", "mean"], [False, True], ["largest", "smallest"]),
)
def test_every_switch(reference: str | None, reduction: str, absolute: bool, order: str) -> None:
    expected = []
    for row in ROWS:
        reward = []
        for side in (0, 1):
            policy, ref = row["p"][side], row["r"][side]
            if reduction == "mean":
                policy, ref = policy / row["tokens"][side], ref / row["ref_tokens"][side]
            reward.append(0.2 * (policy - (ref if reference else 0.0)))
        margin = reward[0] - reward[1]
        margin = abs(margin) if absolute else margin
        expected.append(-margin if order == "smallest" else margin)
    found = score_table(
        table(), "implicit_margin", policy="p", reference=reference, beta=0.2, reduction=reduction, absolute=absolute,
        order=order,
    )  # fmt: skip
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_defaults_are_signed_summed_beta_tenth_and_reference_free() -> None:
    assert score_table(table(), "implicit_margin", policy="p").tolist() == pytest.approx([0.2, -2.1, 0.0])


def test_token_counts_fall_back_to_those_of_no_model() -> None:
    found = score_table(table(False), "implicit_margin", policy="p", reference="r", reduction="mean", beta=1.0)
    assert found[0] == pytest.approx((-10 / 5 + 11 / 5) - (-12 / 4 + 11.5 / 4))


def test_minus_zero_is_stored_as_zero() -> None:
    found = score_table(table(), "implicit_margin", policy="p", order="smallest")
    assert str(found[2]) == "0.0"


def test_a_completion_without_tokens_is_refused() -> None:
    place = table().column_names.index("num_tokens_chosen")
    empty = table().set_column(place, "num_tokens_chosen", pa.array([5, 0, 2]))
    with pytest.raises(UserError, match="num_tokens_p_chosen: got 0; valid: at least 1 response token"):
        score_table(empty, "implicit_margin", policy="p", reduction="mean")
