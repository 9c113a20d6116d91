"""The table of GPUs: names that Ray knows, numbers that can be, and what it answers."""

from __future__ import annotations

import pytest
from ray.util.accelerators import accelerators as ray_names

from prefsel.errors import UserError
from prefsel.plan.accelerators import ACCELERATORS, find_accelerator, smallest_for


def test_ray_knows_every_name() -> None:
    known = {value for name, value in vars(ray_names).items() if name.isupper() or name.startswith("AMD")}
    assert set(ACCELERATORS) <= known


@pytest.mark.parametrize("name", ACCELERATORS)
def test_numbers_can_be(name: str) -> None:
    one = ACCELERATORS[name]
    assert 0 < one.training.of_peak < one.scoring.of_peak < 1
    assert one.scoring.source
    assert one.training.source


@pytest.mark.parametrize(("needed", "name"), [(10, "T4"), (22, "A10G"), (40, "L40S"), (79, "A100-80G"), (140, "B200")])
def test_smallest_that_holds(needed: float, name: str) -> None:
    found = smallest_for(needed)
    assert found is not None
    assert found.name == name


def test_none_holds_more_than_the_largest() -> None:
    assert smallest_for(500) is None


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"--accelerator.*got 'A100'.*A100-40G"):
        find_accelerator("A100")
