"""`dtrain logs`: the output of the ranks of a run."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import TYPE_CHECKING

import click

from dtrain.cli import options as shared
from dtrain.errors import RunNotFound, quoted
from dtrain.run.lookup import attempt_of, find

if TYPE_CHECKING:
    from pathlib import Path

    from dtrain.run.rundir import RunDir

_FOLD_WINDOW_S = 0.3
_POLL_S = 0.1


def _numbers(
    _context: click.Context, option: click.Parameter, given: tuple[str, ...]
) -> list[range]:
    """Parse `0-3,7` as ranges.

    Raises:
        BadParameter: it has another form.
    """
    found: list[range] = []
    for text in (part.strip() for each in given for part in each.split(",")):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
        if match is None:
            what = f"{quoted(text)} is not a {option.name}; write for example 3, 0-3 or 0-3,7"
            raise click.BadParameter(what)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise click.BadParameter(f"{quoted(text)} has no {option.name} in it")
        found.append(range(first, last + 1))
    return found


@click.command(
    "logs",
    cls=shared.Command,
    examples=(
        (
            "dtrain logs --follow --rank 0",
            "What rank 0 of the newest run writes, until the run ends.",
        ),
        ("dtrain logs digits-4f -n 20", "The last 20 lines of all ranks of a run."),
    ),
)
@shared.run_argument
@shared.runs_option
@shared.option(shared.WATCH, "-f", "--follow", is_flag=True, help="Follow the run until it ends.")
@shared.option(
    shared.WATCH,
    "-n",
    "--tail",
    type=click.IntRange(min=0),
    metavar="N",
    help="Begin with the last N lines.  [default: all]",
)
@shared.option(
    shared.WHAT,
    "--rank",
    multiple=True,
    callback=_numbers,
    metavar="N,N-M",
    help="Only these ranks, for example 0-3,7; repeatable.",
)
@shared.option(
    shared.WHAT,
    "--node",
    multiple=True,
    callback=_numbers,
    metavar="N,N-M",
    help="Only ranks of these nodes; repeatable.",
)
@shared.option(
    shared.WHAT,
    "--attempt",
    type=int,
    metavar="N",
    help="Number of the attempt.  [default: the newest]",
)
@shared.json_option
def command(
    run: str,
    runs: str,
    follow: bool,
    tail: int | None,
    rank: list[range],
    node: list[range],
    attempt: int | None,
    as_json: bool,
) -> int:
    """Show what the ranks of RUN (an id, a unique prefix, or `last`) wrote.

    Identical lines of several ranks are folded into one. --follow waits for the end of the run, and
    its exit code is the run's.
    """
    found = find(run, runs)
    number = attempt_of(found, attempt) if found.attempts() or attempt else 0
    newer = follow and attempt is None
    view = _View(found, number, rank, node, tail, as_json)
    if follow:
        return _follow(found, view, newer)
    view.show_history()
    if not view.seen and (rank or node):
        logs = found.rank_logs(number)
        have = f"ranks: {sorted(logs)}"
        if node:
            have = f"nodes: {sorted({of_node for of_node, _ in logs.values()})}; {have}"
        raise RunNotFound(
            f"attempt {number} of {found.id} has no such log; {have}", code="run.no-such-log"
        )
    return 0


def _follow(run: RunDir, view: _View, newer: bool) -> int:
    """Show new lines until the run has ended, also of `newer` attempts. Return its exit code."""
    from dtrain.launchers import status
    from dtrain.run.remote.runs import refresher

    refresh = refresher(run)
    view.begin_to_follow()
    while (state := status.state_of(run))[0] in ("running", "prepared"):
        refresh()
        view.show_new()
        if newer:
            view.move_on()
        time.sleep(_POLL_S)
    view.close()
    result = state[1]
    return 1 if result is None else result.exit_code


class _View:
    """The chosen logs of one attempt, with folded lines."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        ranks: list[range],
        nodes: list[range],
        tail: int | None,
        as_json: bool,
    ) -> None:
        from dtrain.console.fold import LineFolder
        from dtrain.console.tail import Follower
        from dtrain.launch_plan import LaunchPlan

        self._run, self._attempt = run, attempt
        self._ranks, self._nodes = ranks, nodes
        self._as_json, self._tail = as_json, tail
        self._past: deque[str] | None = None
        """The last lines that were written earlier, while these are read."""
        self._logs: Follower[int] = Follower()
        self.seen: set[int] = set()
        self._folder = LineFolder(LaunchPlan.read(run).world_size, _FOLD_WINDOW_S, self._print)

    def show_history(self) -> None:
        """Show all lines sorted by time, or the last of them."""
        self._show_past(self._new_logs())

    def begin_to_follow(self) -> None:
        """Show the last of the lines written so far, if not all of them are wanted."""
        if self._tail is not None:
            logs, read = self._new_logs(), dict[int, int]()
            self._show_past(logs, read)
            for rank, path in logs.items():
                self._logs.add(rank, path, read[rank])

    def _show_past(self, logs: dict[int, Path], read: dict[int, int] | None = None) -> None:
        from dtrain.console.history import merged

        if self._tail is not None:
            self._past = deque(maxlen=self._tail)
        for now, rank, line in merged(logs, read):
            self._show(rank, line, now)
        self._folder.flush(float("inf"))
        past, self._past = self._past, None
        for text in past or ():
            click.echo(text)

    def show_new(self) -> None:
        for rank, path in self._new_logs().items():
            self._logs.add(rank, path)
        now = time.monotonic()
        for rank, line in self._logs.poll():
            self._show(rank, line, now)
        self._folder.flush(now)

    def close(self) -> None:
        self.show_new()
        for rank, line in self._logs.finish():
            self._show(rank, line, time.monotonic())
        self._folder.flush(float("inf"))

    def move_on(self) -> None:
        """Continue with the newest attempt of a requeued job."""
        newest = max([self._attempt, *self._run.attempts()])
        if newest != self._attempt:
            self.close()
            self._attempt, self.seen = newest, set()

    def _new_logs(self) -> dict[int, Path]:
        """Return the chosen logs that are new."""
        new = {
            rank: path
            for rank, (node, path) in self._run.rank_logs(self._attempt).items()
            if rank not in self.seen
            and (not self._ranks or any(rank in each for each in self._ranks))
            and (not self._nodes or any(node in each for each in self._nodes))
        }
        self.seen |= new.keys()
        return new

    def _print(self, text: str) -> None:
        if self._past is None:
            click.echo(text)
        else:
            self._past.append(text)

    def _show(self, rank: int, line: str, now: float) -> None:
        if self._as_json:
            import json

            self._print(json.dumps({"rank": rank, "line": line}))
        else:
            self._folder.feed(rank, line, now)
