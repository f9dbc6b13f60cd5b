"""For all tests: none may leave anything behind, and each worker takes whole groups of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from dtrain.testing import plugin, run_ranks
from dtrain.testing.leaks import watching

pytest.register_assert_rewrite("support")  # before anything of it is imported

from support import summary, warm  # noqa: E402
from support.groups import Groups  # noqa: E402

# A shell starts what it puts in the background with SIGINT ignored, and that is inherited by
# every process that a test starts and means to interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# It would hide that dtrain's own processes hold back what they print.
os.environ.pop("PYTHONUNBUFFERED", None)

# One thread for the torch of each pytest process, which reads this when a test module imports it.
# With more workers than cores, threads of a parallel region wait for one another: an export that
# takes 3 s took 250. Commands are given what was set before.
_THREADS = os.environ.get("OMP_NUM_THREADS")
os.environ["OMP_NUM_THREADS"] = "1"

# Threads that wait for others of a parallel region sleep. With more processes than cores, those
# that turn in a loop instead take the cores from whom they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# At times a machine of CI is four times slower than one on which ranks need up to 30 s.
for called in (run_ranks, plugin._bind_marker):
    assert called.__kwdefaults__["timeout"] == 60.0
    called.__kwdefaults__["timeout"] = 240.0

pytest_plugins = ["pytester"]

# The same examples in every run; `make fuzz` looks for others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=2000)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(summary.Summary())


def pytest_collection_finish() -> None:
    if _THREADS is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = _THREADS


def pytest_unconfigure() -> None:
    warm.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures, which may start commands too."""
    if "unit" not in item.path.parts:
        warm.start()
    warm.is_cold = item.get_closest_marker("cold") is not None


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test is watched; daemons of a test cluster may start processes when they like."""
    with watching(processes="cluster" not in request.path.parts) as leaks:
        yield
    leaks += warm.leftovers()
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)
