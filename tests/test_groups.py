"""The tests themselves: those that share a Ray, or train, run in one process of `make test`."""

import pytest


def test_a_group_stays_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist keeps tests together whose names end in `@group`; it cannot name them with every pytest."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("the tests run in one process")
    assert all("@" in item.nodeid.rsplit("]")[-1] for item in request.session.items)
