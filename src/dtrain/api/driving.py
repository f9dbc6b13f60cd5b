"""The driver processes of this process's launches: started, told to stop, listened to."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain import errors, procs
from dtrain.errors import DtrainError, LaunchError
from dtrain.run import files

if TYPE_CHECKING:
    from dtrain.console.live import LiveConsole
    from dtrain.launch_plan import LaunchPlan
    from dtrain.launchers.driver import Order

_POLL_S = 0.01
_drivers: dict[Path, Driver] = {}
"""By run directory. They are kept here, so that a run does not end when nobody holds its `Run`."""


def of(run: Path) -> Driver | None:
    """The driver of a run that this process has launched; None of any other."""
    driver = _drivers.get(run)
    return driver if driver is not None and driver.owner == os.getpid() else None


class Driver:
    """A `python -m dtrain.launchers.driver` of ours.

    It has a session of its own: a Ctrl-C is for us to pass on. It ends its run when this process
    is gone; no signal of the kernel's tells it so, since that would come with the end of the
    thread that called `launch`.
    """

    def __init__(self) -> None:
        """Start it. It imports what it needs while the launch is planned here."""
        self.owner = os.getpid()
        self.console: LiveConsole | None = None
        self.plan: LaunchPlan | None = None
        self._error: DtrainError | None = None
        self._said: list[str] = []
        self._is_started = False
        self._has_concluded = False
        self._read = 0
        argv = [sys.executable, "-P", "-m", "dtrain.launchers.driver", "--parent", str(self.owner)]
        self._reports, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=self._reports,
                stderr=self._stderr,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"cannot start {argv[0]}: {error.strerror}", code="launch.command-not-started"
            ) from error

    def abandon(self) -> None:
        """End it where nothing came of its launch."""
        self.kill()
        self._forget()

    def launch(self, order: Order) -> None:
        """Have it start a plan; it goes on to drive that to its end.

        Raises:
            DtrainError: it is refused, or ended before nodes were started. Nothing runs then.
        """
        from dtrain.console.live import LiveConsole

        self.plan = order.plan
        self.console = LiveConsole(order.plan)
        try:
            self._hand_over(order)
            while not self._is_started and self._process.poll() is None:
                self._hear()
                time.sleep(_POLL_S)
            self._hear()
            if order.detach or not (self._is_started or self._has_concluded):
                self.close()
                if not self._has_concluded:
                    raise LaunchError(
                        "the driver process of the run was killed as it started",
                        code="launch.driver-ended",
                    )
            else:
                _drivers[order.plan.run.path] = self
        except KeyboardInterrupt:
            self.signal(signal.SIGINT)
            self.close()
            raise

    def _hand_over(self, order: Order) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(order.to_line())

    def close(self) -> int:
        """Wait for its end, and forget it; the exit code of its run.

        Raises:
            DtrainError: it was refused; of the kind that the launcher has raised.
            LaunchError: it broke down; with its traceback.
        """
        code = self._process.wait()
        self._hear()
        last_words = self._last_words()
        self._forget()
        if self._error is not None:
            raise self._error
        if code > 0 and not self._has_concluded:
            raise LaunchError(
                f"the driver process of the run broke down:\n{last_words}",
                code="launch.driver-ended",
            )
        return procs.shell_code(code)

    def poll(self) -> int | None:
        """The exit code of its run once it has ended, as a shell reports it; else None."""
        code = self._process.poll()
        if code is None:
            return None
        self._hear()
        return procs.shell_code(code)

    def said(self) -> list[str]:
        """What the launcher has said since the last call."""
        self._hear()
        said, self._said = self._said, []
        return said

    def signal(self, number: int) -> None:
        """Ask it to stop the run: the first time in order, the second by force."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, and with it all that it has started here."""
        if self._process.poll() is None:
            procs.kill_group(self._process.pid)
        self._process.wait()

    def _hear(self) -> None:
        """Take in what it has reported."""
        if self._reports.closed:
            return
        text = os.pread(self._reports.fileno(), 1 << 20, self._read)
        lines = text[: text.rfind(b"\n") + 1]
        self._read += len(lines)
        for line in lines.splitlines():
            message = files.parse_line(line) or {}
            self._is_started = self._is_started or "started" in message
            self._has_concluded = self._has_concluded or "concluded" in message
            if "said" in message:
                self._said.append(message["said"])
            elif "refused" in message:
                self._error = _error(message)

    def _last_words(self) -> str:
        """What it wrote to stderr as it broke down: to a file of ours, or to the run's."""
        assert self.plan is not None
        early = os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")
        log = self.plan.run.driver_log(self.plan.attempt, self.plan.node_ranks)
        late = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        return (early or late).strip()[-5000:]

    def _forget(self) -> None:
        self._process.wait()
        if self.plan is not None and _drivers.get(self.plan.run.path) is self:
            del _drivers[self.plan.run.path]
        for file in (self._reports, self._stderr, self._process.stdin):
            if file is not None:
                file.close()


def _error(said: dict[str, Any]) -> DtrainError:
    """An error as the driver has raised it; the base of those not made of a text alone."""
    simple = ("UsageError", "PlanError", "RunNotFound", "LaunchError", "CheckpointError")
    kind = said["kind"] if said["kind"] in simple else "DtrainError"
    made: DtrainError = getattr(errors, kind)(said["refused"], code=said["code"])
    made.exit_code = said["exit_code"]
    return made


@atexit.register
def _tell_of_runs_that_end() -> None:
    """Say which runs end because this process does; a script that forgets to wait is told so."""
    for driver in _drivers.values():
        if driver.owner == os.getpid() and driver.plan is not None and driver.poll() is None:
            run_id = driver.plan.run_id
            print(
                f"run {run_id} is stopped, since the program that launched it ends; "
                "call wait() of what launch() returns",
                file=sys.stderr,
            )
