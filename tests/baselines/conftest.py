"""The net under a refactor: fingerprints, kept ids, dataset bytes, scores and trajectories as they were recorded.

Nothing here says what is right, only that nothing moved; the oracles stand with what they test. What touches the
package lies in `adapters.py`, so that code can move without the tests moving.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from golden import Golden


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-baselines",
        action="store_true",
        help="write what is found into tests/baselines/golden, compare nothing",
    )


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Callable[[str], Golden]:
    """A file of recorded numbers by name."""
    is_recording = bool(pytestconfig.getoption("--record-baselines", default=False))
    return lambda name: Golden(name, is_recording=is_recording)
