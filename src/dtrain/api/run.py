"""A run as a Python object."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dtrain import driving
from dtrain.api.metrics import Metrics
from dtrain.comparing.compare import Comparison, compare
from dtrain.console.fold import LineFolder
from dtrain.console.history import merged
from dtrain.console.live import LiveConsole
from dtrain.driving import Driver
from dtrain.errors import DtrainError, RunNotFound
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import status, stopping, summary
from dtrain.page import document
from dtrain.report.page import page_of
from dtrain.run import lookup, verdict
from dtrain.run.attempts import DAMAGED
from dtrain.run.remote.runs import refresher
from dtrain.run.rundir import RunDir, list_runs
from dtrain.run.step_profile import StepProfile, read_step_profiles
from dtrain.run.verdict import Verdict
from dtrain.searching import index, query

_TICK_S = 0.05
_FOREIGN_TICK_S = 0.2
"""The interval for a run that another process drives. Reading its status may query a cluster."""
_KILL_TIMEOUT_S = 10.0
"""The time that a killed process may take to end."""


@dataclass(frozen=True, repr=False)
class RunVerdict(Verdict):
    """The reason why a run failed. Its text is the output of `dtrain why`."""

    text: str = ""

    def __repr__(self) -> str:
        return self.text


class Run(AbstractContextManager["Run"]):
    """A run that `launch` has started, or that `Run.find` has found.

    As a context manager it waits for the end of the run. If the block raises an exception, such as
    the one of Ctrl-C, it stops the run cleanly instead:

        with dtrain.launch("job.yaml", procs=2) as run:
            ...

    A run that this process has launched ends with this process, unless it is detached.
    """

    def __init__(self, directory: RunDir) -> None:
        self.directory = directory
        """The run's paths, see `dtrain.run.rundir.RunDir`."""
        self._refresh = refresher(directory)
        self._console: LiveConsole | None = None

    @classmethod
    def find(cls, name: str = "last", *, runs: str | os.PathLike[str] | None = None) -> Run:
        """Find a run by its id, path or unique beginning of its id, or the `last` one started.

        Args:
            name: the id, path or beginning, or `last`.
            runs: directory or URL of all runs. None means DTRAIN_RUNS, or else `runs`.

        Raises:
            RunNotFound: no run, or more than one, has this name.
        """
        return cls(lookup.find(name, lookup.runs_location(runs)))

    @property
    def id(self) -> str:
        """The run's id, for example `digits-k3v9ab`."""
        return self.directory.id

    @property
    def path(self) -> Path:
        """The run's directory on this host."""
        return self.directory.path

    @property
    def url(self) -> str | None:
        """The URL of the run; None if it is not kept at a URL."""
        return self.directory.url

    def __repr__(self) -> str:
        try:
            state: str = status.state_of(self.directory)[0]
        except (DtrainError, OSError):
            state = DAMAGED
        return f"<dtrain.Run {self.id}: {state}>"

    # -- control -------------------------------------------------------------------------

    def wait(self, timeout: float | None = None, *, progress: bool = True) -> int:
        """Wait for the end of the run, and show the output of `dtrain launch` until then.

        Ctrl-C, or the interrupt of a notebook's kernel, cleanly stops a run that this process has
        launched: its workers save a checkpoint and exit. Then `KeyboardInterrupt` is raised. A
        second one kills them. A run that another process drives continues.

        Args:
            timeout: seconds to wait. None means no limit.
            progress: whether to show anything.

        Returns:
            The exit code of `dtrain launch`. It is 0 if every rank exited with 0. If a rank
            failed, it is the code of the rank that caused the failure. It is 128 + N if signal N
            stopped the run, and 1 if the run was lost.

        Raises:
            TimeoutError: the run has not ended by then. It continues.
            LaunchError: the launcher found only now that the run cannot be started.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        driver = driving.driver_of(self.path)
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
        """Stop the run cleanly: its workers save a checkpoint and exit at the next step.

        A run that has ended is not changed. A run that another process drives is stopped too, as by
        `dtrain cancel`.

        Args:
            timeout: seconds after which the run is ended by force. None means a little more than
                the job's `launch.stop_timeout`.

        Returns:
            The run's exit code, see `wait`.

        Raises:
            UsageError: the run was started by hand, or is driven from another host.
        """
        driver = driving.driver_of(self.path)
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
            return self.wait(_KILL_TIMEOUT_S, progress=False)
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

    # -- results and status --------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the state of the run, as `dtrain status --json` prints it."""
        self._refresh()
        return summary.summary(self.directory)

    def metrics(self, split: str | None = None) -> Metrics:
        """Return the metrics so far, one dict per line.

        Args:
            split: for example `train` or `eval`. None means all.
        """
        self._refresh()
        return Metrics.read(self.directory, split)

    def logs(self, rank: int | None = None, *, attempt: int | None = None) -> str:
        """Return what the ranks have written so far, as `dtrain logs` prints it.

        Args:
            rank: only this rank. None means all, with the same lines of several ranks merged.
            attempt: the number of the attempt. None means the newest.

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
        """Return why the run failed; None if it has not.

        `print` shows the rank that caused the failure, its error and what to try, as `dtrain why`
        does. Its parts `culprit`, `same_failure` and `collateral` are explained in
        `dtrain.run.verdict.Verdict`.

        Args:
            attempt: the number of the attempt. None means the newest.

        Raises:
            RunNotFound: there is no such attempt.
        """
        self._refresh()
        _, _, found = summary.judged(self.directory, attempt)
        if found is None:
            return None
        return RunVerdict(**vars(found), text=verdict.render(found, self.directory))

    def report(self, output: str | os.PathLike[str], *others: Run) -> Path:
        """Write one HTML page about the course of the run, as `dtrain report` does.

        Args:
            output: the page to write.
            others: further runs, which are laid over this one.

        Returns:
            The path of the page.

        Raises:
            UsageError: the page cannot be written to this path.
        """
        for run in (self, *others):
            run._refresh()
        document.write(page_of([run.directory for run in (self, *others)]), Path(output))
        return Path(output)

    def profiles(self) -> list[StepProfile]:
        """Return what `--profile` has recorded: the slowest operators, the communication, the
        trace.

        Returns:
            One for each rank that recorded, of the newest attempt first.
        """
        self._refresh()
        return list(read_step_profiles(self.directory))

    def compare(self, *others: Run) -> Comparison:
        """Return what differs between this run and others, as `dtrain compare --json` prints it.

        Args:
            others: the runs that are compared with this one.

        Raises:
            DamagedError: a file of a run is damaged.
        """
        for run in (self, *others):
            run._refresh()
        return compare([self.directory, *(run.directory for run in others)])

    # -- internal ------------------------------------------------------------------------

    def _follow(self, driver: Driver | None, deadline: float, progress: bool) -> int:
        """Show the run until it ends or the deadline passes, and return its exit code."""
        console = driver.console if driver is not None else self._console
        if console is None:
            console = self._console = LiveConsole(LaunchPlan.read(self.directory))
        try:
            while not self._has_ended(driver):
                if progress:
                    console.tick()
                    _show_messages(driver, console)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"run {self.id} has not ended yet")
                time.sleep(_FOREIGN_TICK_S if driver is None else _TICK_S)
        finally:
            if progress:
                console.close()
        if driver is not None:
            if progress:
                _show_messages(driver, console)
            driver.close()
        return self._exit_code()

    def _has_ended(self, driver: Driver | None) -> bool:
        if driver is not None:
            return not driver.is_running()
        self._refresh()
        return status.state_of(self.directory)[0] not in ("running", "prepared")

    def _exit_code(self) -> int:
        self._refresh()
        result = status.state_of(self.directory)[1]
        return 1 if result is None else result.exit_code


def _show_messages(driver: Driver | None, console: LiveConsole) -> None:
    """Show the messages of the launcher itself."""
    for line in driver.new_messages() if driver is not None else ():
        console.say(line)


def _interrupt(driver: Driver, times: int) -> None:
    if times <= 2:
        driver.signal(signal.SIGINT)
    else:
        driver.kill()


def runs(
    runs: str | os.PathLike[str] | None = None,
    *,
    state: str | Sequence[str] = (),
    since: str | None = None,
    where: str | Sequence[str] = (),
    sort: str | None = None,
    reverse: bool = False,
    last: int | None = None,
) -> list[Run]:
    """Return the runs, the oldest first, including damaged ones; or only those that match.

    The arguments mean what the options of `dtrain runs` mean.

    Args:
        runs: directory or URL of all runs. None means DTRAIN_RUNS, or else `runs`.
        state: states of wanted runs, for example `failed`.
        since: a date, or a duration such as `2d`: only runs that were started since then.
        where: conditions on fields of the job and metrics, for example `args.lr<0.01`.
        sort: a field, a metric or a column to sort by; with a `-` before it, the largest first.
        reverse: whether to reverse the order.
        last: how many at most, the newest ones.

    Raises:
        UsageError: a name is unknown, or an argument has no meaning.

    Example:
        >>> best = dtrain.runs(state="succeeded", sort="-eval.accuracy")[0]
    """
    root = lookup.local_directory(lookup.runs_location(runs))
    if not (state or since or where or sort or reverse or last is not None):
        return [Run(each) for each in list_runs(root)]
    found = query.select(
        index.entries(root),
        states=[state] if isinstance(state, str) else state,
        since=since,
        where=[where] if isinstance(where, str) else where,
        sort=sort,
        reverse=reverse,
        last=last,
    )
    return [Run(each.run) for each in found]
