"""A Ray that does not start is a known error, and another fault stays what it is."""

from __future__ import annotations

import pytest

from prefsel.errors import PrefselError, UserError
from prefsel.stages.session import _started


def test_a_ray_that_does_not_start_is_told_in_one_sentence() -> None:
    words = "The current node timed out during startup. This could happen because some of the raylet failed to startup"
    with (
        pytest.raises(
            PrefselError, match=r"^Ray did not start: The current node timed out during startup; is"
        ) as caught,
        _started(),
    ):
        raise Exception(words)
    assert not isinstance(caught.value, UserError)


def test_other_faults_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="ours"), _started():
        raise ValueError("ours")
