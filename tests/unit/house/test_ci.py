"""What CI does with tests that fail: once more, alone; a few that pass then are told as flaky."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support import ROOT

AGAIN = ROOT / ".ci" / "again.py"

SUITE = """
import pathlib
import pytest

@pytest.mark.parametrize("number", range({flaky}))
def test_flaky(number):
    seen = pathlib.Path(f"seen-{{number}}")
    if not seen.exists():
        seen.touch()
        assert False

@pytest.mark.parametrize("number", range({wrong}))
def test_wrong(number):
    assert False

def test_right():
    assert True
"""


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins that are not used take most of the time that pytest takes to start."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.mark.parametrize(
    ("flaky", "wrong", "code", "said"),
    [
        (1, 0, 0, ["flaky: test_it.py::test_flaky[0]"]),
        (3, 0, 0, [f"flaky: test_it.py::test_flaky[{k}]" for k in range(3)]),
        (4, 0, 1, ["4 tests failed; up to 3 are tried again"]),
        (1, 1, 1, ["failed again: test_it.py::test_wrong[0]", "flaky: test_it.py::test_flaky[0]"]),
    ],
)
def test_failures_are_tried_again(
    pytester: pytest.Pytester, flaky: int, wrong: int, code: int, said: list[str]
) -> None:
    pytester.makepyfile(test_it=SUITE.format(flaky=flaky, wrong=wrong))
    assert subprocess.run([sys.executable, "-m", "pytest", "-q"], check=False).returncode == 1
    done = subprocess.run([sys.executable, AGAIN, "1"], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert set(said) <= set(done.stdout.splitlines())


@pytest.mark.parametrize("status", ["", "2", "3"])
def test_a_run_that_broke_off_is_not_tried_again(pytester: pytest.Pytester, status: str) -> None:
    """Though it had noted a failure that would pass now: of the other tests nothing is known."""
    pytester.makepyfile(test_it=SUITE.format(flaky=1, wrong=0))
    assert subprocess.run([sys.executable, "-m", "pytest", "-q"], check=False).returncode == 1
    assert subprocess.run([sys.executable, AGAIN, status], check=False).returncode == 1


def test_without_a_failure_noted_there_is_nothing_to_try(pytester: pytest.Pytester) -> None:
    assert subprocess.run([sys.executable, AGAIN, "1"], check=False).returncode == 1
