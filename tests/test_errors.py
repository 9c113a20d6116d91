"""A known error keeps its message and its kind on the way from a worker to the terminal."""

from __future__ import annotations

import pickle

import pytest

from prefsel.errors import IntegrityError, NonFiniteError, PrefselError, TemplateError, UserError, invalid


@pytest.mark.parametrize("kind", [PrefselError, UserError, NonFiniteError, IntegrityError, TemplateError])
def test_what_is_added_to_the_arguments_on_the_way_is_no_part_of_the_message(kind: type[PrefselError]) -> None:
    """As `ray.data` does with what an actor raised: it appends a text about retries to the first argument."""
    error = kind("the sentence")
    error.args = (f"{error.args[0]}\nTo change retry attempts, configure DataContext",)
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), arrived.exit_code) == (kind, "the sentence", kind.exit_code)


def test_an_invalid_value_travels() -> None:
    error = invalid("dtype", "int3", ["fp32", "bf16"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "dtype: got 'int3'; valid: fp32, bf16"
