"""`dtrain logs`: what the ranks of a run wrote."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from dtrain.cli import options as shared
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from pathlib import Path

    from dtrain.run.rundir import RunDir

_FOLD_WINDOW_S = 0.3
_POLL_S = 0.1


@click.command(
    "logs",
    cls=shared.Command,
    examples=(
        (
            "dtrain logs --follow --rank 0",
            "What rank 0 of the newest run writes, until the run ends.",
        ),
    ),
)
@shared.run_argument
@shared.runs_option
@shared.option(shared.WATCH, "-f", "--follow", is_flag=True, help="Follow the run until it ends.")
@shared.option(
    shared.WHAT, "--rank", type=int, multiple=True, help="Only this rank; may be repeated."
)
@shared.option(
    shared.WHAT, "--node", type=int, multiple=True, help="Only ranks of this node; may be repeated."
)
@shared.option(
    shared.WHAT, "--attempt", type=int, help="Number of the attempt.  [default: the newest]"
)
@shared.json_option
def command(
    run: str,
    runs: str,
    follow: bool,
    rank: tuple[int, ...],
    node: tuple[int, ...],
    attempt: int | None,
    as_json: bool,
) -> int:
    """Show what the ranks of RUN (an id, a unique prefix, or `last`) wrote.

    Identical lines of several ranks are folded into one. With --follow the exit code is the
    run's, and it never ends before the run has.
    """
    from dtrain.errors import RunNotFound

    found = find(run, runs)
    attempts = found.attempts()
    number = attempt if attempt is not None else (attempts[-1] if attempts else 0)
    newer = follow and attempt is None
    view = _View(found, number, rank, node, as_json)
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
    """Show what comes until the run has ended, of `newer` attempts too; the run's exit code."""
    from dtrain.launchers import status
    from dtrain.run.remote.runs import refresher

    refresh = refresher(run)
    while (stand := status.state_of(run))[0] in ("running", "prepared"):
        refresh()
        view.show_new()
        if newer:
            view.move_on()
        time.sleep(_POLL_S)
    view.close()
    result = stand[1]
    return 1 if result is None else result.exit_code


class _View:
    """The chosen logs of one attempt, their lines folded."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        ranks: tuple[int, ...],
        nodes: tuple[int, ...],
        as_json: bool,
    ) -> None:
        from dtrain.console.fold import LineFolder
        from dtrain.console.tail import Follower
        from dtrain.plan import LaunchPlan

        self._run, self._attempt = run, attempt
        self._ranks, self._nodes = ranks, nodes
        self._as_json = as_json
        self._logs: Follower[int] = Follower()
        self.seen: set[int] = set()
        self._folder = LineFolder(LaunchPlan.read(run).world_size, _FOLD_WINDOW_S, click.echo)

    def show_history(self) -> None:
        from dtrain.console.history import merged

        logs = self._new_logs()
        for now, rank, line in merged(logs):
            self._show(rank, line, now)
        self._folder.flush(float("inf"))

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
        """Go on with the attempt that a requeued job has come to."""
        newest = max([self._attempt, *self._run.attempts()])
        if newest != self._attempt:
            self.close()
            self._attempt, self.seen = newest, set()

    def _new_logs(self) -> dict[int, Path]:
        """The chosen logs that were not there before."""
        new = {
            rank: path
            for rank, (node, path) in self._run.rank_logs(self._attempt).items()
            if rank not in self.seen
            and (not self._ranks or rank in self._ranks)
            and (not self._nodes or node in self._nodes)
        }
        self.seen |= new.keys()
        return new

    def _show(self, rank: int, line: str, now: float) -> None:
        if self._as_json:
            import json

            click.echo(json.dumps({"rank": rank, "line": line}))
        else:
            self._folder.feed(rank, line, now)
