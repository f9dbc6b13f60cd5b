"""A run in a program's hands."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dtrain.api import driving
from dtrain.api.driving import Driver
from dtrain.api.metrics import Metrics
from dtrain.console.fold import LineFolder
from dtrain.console.history import merged
from dtrain.console.live import LiveConsole
from dtrain.errors import DtrainError, RunNotFound
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import status, stopping, summary
from dtrain.run import lookup, verdict
from dtrain.run.remote.runs import refresher
from dtrain.run.rundir import RunDir, list_runs
from dtrain.run.verdict import Verdict

_TICK_S = 0.05
_OTHERS_TICK_S = 0.2
"""Of a run that another process drives: to look how it stands may ask a cluster."""
_KILLED_S = 10.0
"""How long what was killed may take to be gone."""


@dataclass(frozen=True, repr=False)
class RunVerdict(Verdict):
    """Why a run failed. As text it is what `dtrain why` prints."""

    text: str = ""

    def __repr__(self) -> str:
        return self.text


class Run(AbstractContextManager["Run"]):
    """A run: one that `launch` has started, or one found with `Run.find`.

    As a context manager it waits for the end of the run; when the block is left by an exception,
    Ctrl-C among them, it stops the run in order instead:

        with dtrain.launch("job.yaml", procs=2) as run:
            ...

    A run that this process has launched ends with this process, but for a detached one.
    """

    def __init__(self, directory: RunDir) -> None:
        self.directory = directory
        """Its paths, see `dtrain.run.rundir.RunDir`."""
        self._refresh = refresher(directory)
        self._console: LiveConsole | None = None

    @classmethod
    def find(cls, name: str = "last", *, runs: str | os.PathLike[str] | None = None) -> Run:
        """The run of that id, path or unique beginning of an id, or the one started `last`.

        Args:
            name: of the run.
            runs: folder or URL of all runs; None: DTRAIN_RUNS, or else `runs`.

        Raises:
            RunNotFound: none, or more than one, answers to the name.
        """
        return cls(lookup.find(name, lookup.place_of_runs(runs)))

    @property
    def id(self) -> str:
        """The run's id, as `digits-k3v9ab`."""
        return self.directory.id

    @property
    def path(self) -> Path:
        """The run's directory on this host."""
        return self.directory.path

    @property
    def url(self) -> str | None:
        """Where the run is kept, when that is a URL."""
        return self.directory.url

    def __repr__(self) -> str:
        try:
            state: str = status.state_of(self.directory)[0]
        except (DtrainError, OSError):
            state = summary.DAMAGED
        return f"<dtrain.Run {self.id}: {state}>"

    # -- what it does ----------------------------------------------------------------------

    def wait(self, timeout: float | None = None, *, progress: bool = True) -> int:
        """Wait for the end of the run, and show what `dtrain launch` shows meanwhile.

        Ctrl-C, or the interrupt of a notebook's kernel, stops a run that this process has launched
        in order: its workers save a checkpoint and leave. Then `KeyboardInterrupt` is raised. A
        second one kills them. A run that another process drives goes on.

        Args:
            timeout: seconds; None: as long as it takes.
            progress: whether to show anything.

        Returns:
            The exit code of `dtrain launch`: 0 when every rank ended 0, the culprit's when one
            failed, 128 + N when the run was stopped by signal N, 1 when it was lost.

        Raises:
            TimeoutError: it has not ended by then; it goes on.
            LaunchError: the launcher found out only now that it cannot be started.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        driver = driving.of(self.path)
        interrupts = 0
        while True:
            try:
                code = self._follow(driver, deadline, progress)
                break
            except KeyboardInterrupt:
                interrupts += 1
                if driver is None:
                    raise
                deadline = float("inf")
                _interrupt(driver, interrupts)
        if interrupts:
            raise KeyboardInterrupt
        return code

    def stop(self, timeout: float | None = None) -> int:
        """Stop the run in order: its workers save a checkpoint and leave at the next step.

        Does nothing to a run that has ended. A run that another process drives is stopped too, as
        by `dtrain cancel`.

        Args:
            timeout: seconds after which it is ended by force; None: a little more than the job's
                `launch.stop_timeout`.

        Returns:
            The run's exit code, see `wait`.

        Raises:
            UsageError: it was started by hand, or is driven from another host.
        """
        driver = driving.of(self.path)
        if driver is None:
            if status.state_of(self.directory)[0] == "running":
                stopping.cancel(self.directory, timeout)
            return self._exit_code()
        driver.signal(signal.SIGTERM)
        try:
            return self.wait(timeout, progress=False)
        except TimeoutError:
            driver.signal(signal.SIGTERM)
        try:
            return self.wait(_KILLED_S, progress=False)
        except TimeoutError:
            driver.kill()
            return self.wait(progress=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        else:
            self.stop()

    # -- what is known of it ---------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How the run stands: what `dtrain status --json` prints."""
        self._refresh()
        return summary.summary(self.directory)

    def metrics(self, split: str | None = None) -> Metrics:
        """What was measured so far, one dict a line.

        Args:
            split: `train` or `eval`; None: both.
        """
        self._refresh()
        return Metrics.read(self.directory, split)

    def logs(self, rank: int | None = None, *, attempt: int | None = None) -> str:
        """What the ranks wrote so far, as `dtrain logs` prints it.

        Args:
            rank: only this one; None: all, the same lines of several folded into one.
            attempt: its number; None: the newest.

        Raises:
            RunNotFound: there is no such rank or attempt.
        """
        self._refresh()
        started = attempt is not None or self.directory.attempts()
        number = lookup.attempt_of(self.directory, attempt) if started else 0
        logs = {each: path for each, (_, path) in self.directory.rank_logs(number).items()}
        if rank is not None and rank not in logs:
            raise RunNotFound(
                f"attempt {number} of {self.id} has no such log; ranks: {sorted(logs)}",
                code="run.no-such-log",
            )
        lines: list[str] = []
        folder = LineFolder(LaunchPlan.read(self.directory).world_size, 0.3, lines.append)
        chosen = logs if rank is None else {rank: logs[rank]}
        for now, of_rank, line in merged(chosen):
            folder.feed(of_rank, line, now)
        folder.flush(float("inf"))
        return "\n".join(lines)

    def why(self, attempt: int | None = None) -> RunVerdict | None:
        """Why the run failed; None when it has not.

        `print` shows the culprit, its error and what to try, as `dtrain why` does. The parts are
        `culprit`, `alike` and `collateral`, see `dtrain.run.verdict.Verdict`.

        Args:
            attempt: its number; None: the newest.

        Raises:
            RunNotFound: there is no such attempt.
        """
        self._refresh()
        _, _, found = summary.judged(self.directory, attempt)
        if found is None:
            return None
        return RunVerdict(**vars(found), text=verdict.render(found, self.directory))

    # -- within ----------------------------------------------------------------------------

    def _follow(self, driver: Driver | None, deadline: float, progress: bool) -> int:
        """Show the run until it has ended, or until the deadline; its exit code."""
        console = driver.console if driver is not None else self._console
        if console is None:
            console = self._console = LiveConsole(LaunchPlan.read(self.directory))
        try:
            while not self._has_ended(driver):
                if progress:
                    console.tick()
                    _pass_on(driver, console)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"run {self.id} has not ended yet")
                time.sleep(_OTHERS_TICK_S if driver is None else _TICK_S)
        finally:
            if progress:
                console.close()
        if driver is None:
            return self._exit_code()
        if progress:
            _pass_on(driver, console)
        return driver.close()

    def _has_ended(self, driver: Driver | None) -> bool:
        if driver is not None:
            return driver.poll() is not None
        self._refresh()
        return status.state_of(self.directory)[0] not in ("running", "prepared")

    def _exit_code(self) -> int:
        result = status.state_of(self.directory)[1]
        return 1 if result is None else result.exit_code


def _pass_on(driver: Driver | None, console: LiveConsole) -> None:
    """Show what the launcher itself has said."""
    for line in driver.said() if driver is not None else ():
        console.say(line)


def _interrupt(driver: Driver, times: int) -> None:
    if times <= 2:
        driver.signal(signal.SIGINT)
    else:
        driver.kill()


def runs(runs: str | os.PathLike[str] | None = None) -> list[Run]:
    """All runs, the oldest first, the damaged ones too.

    Args:
        runs: folder or URL of all runs; None: DTRAIN_RUNS, or else `runs`.

    Example:
        >>> [run.id for run in dtrain.runs() if run.status()["state"] == "failed"]
    """
    return [Run(each) for each in list_runs(lookup.here(lookup.place_of_runs(runs)))]
