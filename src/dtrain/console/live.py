"""The output of a running launch: rank 0's lines, the others' warnings, progress."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dtrain.console import notebook, out
from dtrain.console.fold import LineFolder
from dtrain.console.notebook import NotebookBar
from dtrain.console.tail import Follower
from dtrain.doctor import diagnosis
from dtrain.doctor.diagnosis import Diagnosis
from dtrain.launch_plan import LaunchPlan
from dtrain.plainjson import numbers
from dtrain.run import files, progress_bars
from dtrain.run.failures import FAILURE_CLOSE, FAILURE_OPEN, first_cause

if TYPE_CHECKING:
    from pathlib import Path

    from rich.live import Live
    from rich.progress import Progress, TaskID

_FOLD_WINDOW_S = 0.3
_STEP_LINES_EVERY_S = 10.0
_SAID = r"^\d{4}-\d\d-\d\d \S+ \w+ dtrain\.train\.loop\.reporting: "
_STEP_LINE = re.compile(_SAID + r"step (\d+)/(\d+|\?) ")
_END_LINE = re.compile(_SAID + r"(finished: |stopping after )")
_WIDEST_BAR = 100
_BESIDE_TEXT = 40
"""The columns that a bar needs in addition to its text: step, bar, time left."""
_SERIOUS = re.compile(r"^\d{4}-\d\d-\d\d \S+ (WARNING|ERROR|CRITICAL) ")
_OF_PROFILER = "USDT:"
"""The beginning of lines that torch.profiler prints, without a way to prevent it."""
# On a console the time is now, and an INFO message needs no level and no module.
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \S+ (INFO \S+: )?")


class LiveConsole:
    """Follows the run directory. It does not depend on where the processes run."""

    def __init__(self, plan: LaunchPlan, *, quiet: bool = False) -> None:
        """Begin to follow.

        Args:
            plan: the launch.
            quiet: whether to show only the launcher's own messages.
        """
        self._plan = plan
        self._quiet = quiet
        self._logs: Follower[tuple[int, int]] = Follower()
        self._records: Follower[str] = Follower()
        self._records.add("events", plan.run.events)
        self._records.add("metrics", plan.run.metrics)
        self._known: set[tuple[int, int]] = set()
        self._rank0_log: Path | None = None
        self._failing: set[int] = set()
        self._failures: list[dict[str, Any]] = []
        self._restart = 0
        self._folder = LineFolder(plan.world_size, _FOLD_WINDOW_S, self._print)
        self._bar: _Bar | NotebookBar | None = None
        self._pace: StepLines | None = None
        """The selection of lines on a terminal, whose bar shows the steps between them."""
        if not quiet and notebook.is_here():
            self._bar = NotebookBar()
        elif not quiet and out.on_terminal():
            self._bar, self._pace = _Bar(), StepLines()
        self._records.skip_to_end()  # a resumed run has already shown its past

    def begin(self, text: str) -> None:
        """Announce the next action, unless only the end is wanted."""
        if not self._quiet:
            self.say(text)

    def tick(self) -> None:
        if self._quiet:
            return
        for source, line in self._records.poll():
            record = files.parse_line(line)
            if record is not None and source == "events":
                self._event(record)
            elif record is not None and self._bar is not None:
                self._bar.metrics(record)
        self._find_logs()
        now = time.monotonic()
        self._feed(self._logs.poll(), now)
        self._folder.flush(now)
        if self._bar is not None and self._rank0_log is not None:
            self._bar.show(progress_bars.live(self._rank0_log))

    def _feed(self, logged: Iterable[tuple[tuple[int, int], str]], now: float) -> None:
        for (_, rank), line in logged:
            if not self._is_shown(rank, line):
                continue
            paced = rank == 0 and self._pace is not None
            for each in self._pace.pick(line, now) if paced and self._pace else [line]:
                self._folder.feed(rank, _STAMP.sub("", each), now)

    def width(self) -> int | None:
        """Return the columns that a line may have. None means any number."""
        return out.width()

    def paint(self, text: str, colour: str | None) -> str:
        """Return a text in a colour, where colours are shown."""
        return out.paint(text, colour)

    def _find_logs(self) -> None:
        """Follow logs that are new, in further attempts too: batch jobs are requeued."""
        run, first = self._plan.run, self._plan.attempt
        for attempt in range(first, max([first, *run.attempts()]) + 1):
            logs = run.rank_logs(attempt)
            for rank in sorted(logs):
                if (attempt, rank) not in self._known:
                    self._known.add((attempt, rank))
                    self._rank0_log = logs[0][1] if 0 in logs else self._rank0_log
                    self._logs.add((attempt, rank), logs[rank][1])

    def say(self, text: str) -> None:
        """Show a line of the launcher itself, after all that came before it."""
        self._folder.flush(float("inf"))
        self._print(text)

    def close(self) -> None:
        """Show the rest, and remove the progress bar."""
        self.tick()
        if not self._quiet:
            self._feed(self._logs.finish(), time.monotonic())
        self._folder.flush(float("inf"))
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_shown(self, rank: int, line: str) -> bool:
        """Return whether to show a line of a rank.

        Rank 0 speaks for all. Only warnings of the others are shown. Tracebacks belong to the
        verdict.
        """
        if line == FAILURE_OPEN:
            self._failing.add(rank)
        if rank in self._failing:
            if line == FAILURE_CLOSE:
                self._failing.discard(rank)
            return False
        if line.startswith(_OF_PROFILER):
            return False
        return rank == 0 or _SERIOUS.match(line) is not None

    def _event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "training_started" and self._bar is not None:
            self._bar.start(event.get("total_steps"))
        elif kind in ("waiting", "notice", "silent"):
            self.say(f"{event['what']}")
        elif kind == "preflight":
            self._preflight(event)
        elif kind == "profiled":
            path = self._plan.run.path / event["trace"]
            steps = f"steps {event['first']}-{event['last']} of rank {event['rank']}"
            self.say(f"profile of {steps}, for https://ui.perfetto.dev: {path}")
        elif kind == "secrets_left_out":
            self.say(f"not copied, may hold secrets: {', '.join(event['files'])}")
        elif kind == "worker_failed":
            self._failures.append(event)
        elif kind == "workers_started" and event["restart"] > self._restart:
            self._restart = event["restart"]
            self._announce_restart()

    def _preflight(self, event: dict[str, Any]) -> None:
        names = ("check", "status", "fact", "remedy", "code")
        found = Diagnosis(*(str(event.get(name, "")) for name in names))  # type: ignore[arg-type]
        for line in diagnosis.lines(found, self.width(), self.paint):
            self.say(line)

    def _announce_restart(self) -> None:
        """Announce a restart.

        Every node has reported the first failure that it saw: one is the cause.
        """
        failures = [each for each in self._failures if each["restart"] == self._restart - 1]
        if not failures:
            return
        cause = first_cause(failures)
        self.say(
            f"rank {cause['rank']} on {cause['node']} failed: {cause['what'].splitlines()[0]}; "
            f"restart {self._restart} of {cause['max_restarts']}"
        )

    def _print(self, text: str) -> None:
        text = text.removeprefix("[rank 0] ")  # it speaks for all
        if self._bar is None:
            out.say(text)
            return
        with out.unless_gone():
            self._bar.print(text)


class StepLines:
    """Selects the lines of steps to show: the first, one every ten seconds, and the last."""

    def __init__(self) -> None:
        self._shown_at = -math.inf
        self._held: str | None = None
        """The newest line of a step that was not shown."""

    def pick(self, line: str, now: float) -> list[str]:
        """Return the lines to show when rank 0 logs a step.

        Args:
            line: a line of its log.
            now: the seconds of a monotonic clock.
        """
        step = _STEP_LINE.match(line)
        if step is None:
            is_end, held = _END_LINE.match(line) is not None, self._held
            if not is_end or held is None:
                return [line]
            self._held = None
            return [held, line]
        if step[1] != step[2] and now - self._shown_at < _STEP_LINES_EVERY_S:
            self._held = line
            return []
        self._held, self._shown_at = None, now
        return [line]


class _Bar:
    """The progress bar of a terminal, which stays below the lines."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._text = ""
        if self._console.width > _WIDEST_BAR:
            self._console.width = _WIDEST_BAR  # lines above it are not wrapped, see `print`
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._live: Live | None = None
        self._shown = ""

    def start(self, total_steps: int | None) -> None:
        """Begin, or begin again after a restart."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        if self._progress is None:
            self.show("")
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
                Remaining(),
                console=self._console,
                transient=True,
                expand=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total_steps, text="")

    def metrics(self, line: dict[str, Any]) -> None:
        """Move to the step of a line of metrics.jsonl."""
        if self._progress is None or self._task is None or line["split"] != "train":
            return
        values = numbers(line)
        if "loss" in values:
            text = f"epoch {line['epoch']}  loss {values['loss']:.4f}"
            speed = ""
            if "samples_per_second" in values:  # not after a step that only compiled
                speed = f"  {values['samples_per_second']:,.0f} samples/s"
            room = self._console.width - len(text) - len(speed) - _BESIDE_TEXT
            self._text = text + speed if room >= 0 else text
        self._progress.update(self._task, completed=line["step"], text=self._text)

    def show(self, bars: str) -> None:
        """Show the bars that rank 0 draws itself, unless there is that of the training."""
        if self._live is not None and not bars:
            self._live.stop()
            self._live = None
        elif bars != self._shown and bars and self._progress is None:
            from rich.live import Live
            from rich.text import Text

            if self._live is None:
                self._live = Live(console=self._console, transient=True, auto_refresh=False)
                self._live.start()
            self._shown = bars
            self._live.update(Text(bars, no_wrap=True, overflow="ellipsis"), refresh=True)

    def print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.show("")
        if self._progress is not None:
            self._progress.stop()
