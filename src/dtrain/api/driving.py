"""The driver processes of this process's launches: they are started, asked to stop, and read."""

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
"""The drivers by run directory. A run continues even if the program drops its `Run`."""


def of(run: Path) -> Driver | None:
    """Return the driver of a run that this process has launched; None for any other run."""
    driver = _drivers.get(run)
    return driver if driver is not None and driver.owner == os.getpid() else None


class Driver:
    """A `python -m dtrain.launchers.driver` that this process has started.

    It has its own session, so this process must forward a Ctrl-C. It ends its run when this process
    has exited. The kernel's parent-death signal is not used for that: the kernel sends it when the
    thread that called `launch` ends.
    """

    def __init__(self) -> None:
        """Start the driver. It imports what it needs while the launch is planned here."""
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
        """End the driver after a launch that did not start."""
        self.kill()
        self._forget()

    def launch(self, order: Order) -> None:
        """Have the driver start a plan. It then follows the run to its end.

        Raises:
            DtrainError: the launch is refused, or ended before it started nodes. Nothing runs then.
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
        """Wait until the driver ends, forget it, and return the exit code of its run.

        Raises:
            DtrainError: the launch was refused. The error has the class that the launcher raised.
            LaunchError: the driver failed. The message has its traceback.
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
        """Return the exit code of the run, as a shell reports it; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._hear()
        return procs.shell_code(code)

    def said(self) -> list[str]:
        """Return what the launcher has reported since the last call."""
        self._hear()
        said, self._said = self._said, []
        return said

    def signal(self, number: int) -> None:
        """Ask the driver to stop the run: cleanly at the first call, by force at the second."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the driver at once, together with every process that it has started on this host."""
        if self._process.poll() is None:
            procs.kill_group(self._process.pid)
        self._process.wait()

    def _hear(self) -> None:
        """Read the driver's new reports."""
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
        """Return what the failed driver wrote to its temporary stderr file or to the run's log."""
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
    """Return an error as the driver has raised it.

    A class whose errors need more than a message becomes `DtrainError`.
    """
    simple = ("UsageError", "PlanError", "RunNotFound", "LaunchError", "CheckpointError")
    kind = said["kind"] if said["kind"] in simple else "DtrainError"
    made: DtrainError = getattr(errors, kind)(said["refused"], code=said["code"])
    made.exit_code = said["exit_code"]
    return made


@atexit.register
def _tell_of_runs_that_end() -> None:
    """Print which runs end because this process ends, for a script that does not call `wait`."""
    for driver in _drivers.values():
        if driver.owner == os.getpid() and driver.plan is not None and driver.poll() is None:
            run_id = driver.plan.run_id
            print(
                f"run {run_id} is stopped, since the program that launched it ends; "
                "call wait() of what launch() returns",
                file=sys.stderr,
            )
