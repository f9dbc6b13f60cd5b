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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain import errors, procs
from dtrain.errors import DtrainError, LaunchError
from dtrain.run import files

if TYPE_CHECKING:
    from dtrain.console.live import LiveConsole
    from dtrain.forking import Channel
    from dtrain.launch_plan import LaunchPlan
    from dtrain.launchers.driver import LaunchRequest

_POLL_S = 0.01
_drivers: dict[Path, Driver] = {}
"""The drivers by run directory. A run continues even if the program drops its `Run`."""


def driver_of(run: Path) -> Driver | None:
    """Return the driver of a run that this process has launched; None for any other run."""
    driver = _drivers.get(run)
    return driver if driver is not None and driver.owner == os.getpid() else None


class Driver:
    """A `python -m dtrain.launchers.driver` that this process has started.

    It has its own session, so this process must forward a Ctrl-C. It ends its run when this process
    has exited. The kernel's parent-death signal is not used for that: the kernel sends it when the
    thread that called `launch` ends.
    """

    def __init__(self, env: Mapping[str, str] | None = None, warm: Channel | None = None) -> None:
        """Start the driver. It imports what it needs while the launch is planned here.

        Args:
            env: its environment. None means that of this process.
            warm: a socket of the warm server that forks its nodes. None means that it starts them.
        """
        self.owner = os.getpid()
        self.console: LiveConsole | None = None
        self.plan: LaunchPlan | None = None
        self._error: DtrainError | None = None
        self._messages: list[str] = []
        self._is_started = False
        self._has_ended = False
        self._offset = 0
        argv = [sys.executable, "-P", "-m", "dtrain.launchers.driver", "--parent", str(self.owner)]
        keep = () if warm is None else (warm.fileno(),)
        argv += [part for fd in keep for part in ("--warm", str(fd))]
        self._reports, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=self._reports,
                stderr=self._stderr,
                env=env,
                pass_fds=keep,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"cannot start {argv[0]}: {error.strerror}", code="launch.command-not-started"
            ) from error

    def abandon(self) -> None:
        """End the driver after a launch that did not start."""
        self.kill()
        self._release()

    def launch(self, request: LaunchRequest) -> None:
        """Have the driver start a plan. It then follows the run to its end.

        Raises:
            DtrainError: the launch is refused, or ended before it started nodes. Nothing runs then.
        """
        from dtrain.console.live import LiveConsole

        self.console = LiveConsole(request.plan)
        try:
            self.send(request)
            while not self._is_started and self.is_running():
                self._read_reports()
                time.sleep(_POLL_S)
            self._read_reports()
            if request.detach or not (self._is_started or self._has_ended):
                self.close()
                if not self._has_ended:
                    raise LaunchError(
                        "the driver process of the run was killed while it started",
                        code="launch.driver-ended",
                    )
            else:
                _drivers[request.plan.run.path] = self
        except KeyboardInterrupt:
            self.signal(signal.SIGINT)
            self.close()
            raise

    def send(self, request: LaunchRequest) -> None:
        """Send the plan to start, and do not wait for the answer."""
        self.plan = request.plan
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(request.to_line())

    def close(self) -> None:
        """Wait until the driver ends, and release it.

        Raises:
            DtrainError: the launch was refused. The error has the class that the launcher raised.
            LaunchError: the driver failed. The message has its traceback.
        """
        code = self._process.wait()
        self._read_reports()
        output = self._error_output()
        self._release()
        if self._error is not None:
            raise self._error
        if code > 0 and not self._has_ended:
            raise LaunchError(
                f"the driver process of the run failed:\n{output}",
                code="launch.driver-ended",
            )

    def is_running(self) -> bool:
        """Return whether the driver, and so its run, has not ended yet."""
        return self._process.poll() is None

    def new_messages(self) -> list[str]:
        """Return the launcher's messages since the last call."""
        self._read_reports()
        messages, self._messages = self._messages, []
        return messages

    def signal(self, number: int) -> None:
        """Ask the driver to stop the run: cleanly at the first call, by force at the second."""
        if self.is_running():
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the driver at once, together with every process that it has started on this host."""
        if self.is_running():
            procs.kill_group(self._process.pid)
        self._process.wait()

    def _read_reports(self) -> None:
        """Read the driver's new reports."""
        if self._reports.closed:
            return
        text = os.pread(self._reports.fileno(), 1 << 20, self._offset)
        lines = text[: text.rfind(b"\n") + 1]
        self._offset += len(lines)
        for line in lines.splitlines():
            report = files.parse_line(line) or {}
            self._is_started = self._is_started or "started" in report
            self._has_ended = self._has_ended or "ended" in report
            if "message" in report:
                self._messages.append(report["message"])
            elif "error" in report:
                self._error = _error(report)

    def _error_output(self) -> str:
        """Return what the failed driver wrote to its temporary stderr file or to the run's log."""
        assert self.plan is not None
        early = os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")
        log = self.plan.run.driver_log(self.plan.attempt, self.plan.node_ranks)
        late = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        return (early or late).strip()[-5000:]

    def _release(self) -> None:
        self._process.wait()
        if self.plan is not None and _drivers.get(self.plan.run.path) is self:
            del _drivers[self.plan.run.path]
        for file in (self._reports, self._stderr, self._process.stdin):
            if file is not None:
                file.close()


def _error(report: dict[str, Any]) -> DtrainError:
    """Return an error as the driver has raised it.

    A class whose errors need more than a message becomes `DtrainError`.
    """
    simple = ("UsageError", "PlanError", "RunNotFound", "LaunchError", "CheckpointError")
    kind = report["kind"] if report["kind"] in simple else "DtrainError"
    error: DtrainError = getattr(errors, kind)(report["error"], code=report["code"])
    error.exit_code = report["exit_code"]
    return error


@atexit.register
def _print_stopped_runs() -> None:
    """Print which runs end because this process ends, for a script that does not call `wait`."""
    for driver in _drivers.values():
        if driver.owner == os.getpid() and driver.plan is not None and driver.is_running():
            run_id = driver.plan.run_id
            print(
                f"run {run_id} is stopped, because the program that launched it ends; "
                "call wait() on the result of launch()",
                file=sys.stderr,
            )
