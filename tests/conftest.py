"""For all tests: none may leave anything behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dtrain.testing.leaks import watching

# A shell starts what it puts in the background with SIGINT ignored, and that is inherited by
# every process that a test starts and means to interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test is watched; daemons of a test cluster may start processes when they like."""
    with watching(processes="cluster" not in request.path.parts) as leaks:
        yield
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)
