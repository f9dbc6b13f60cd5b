"""`dtrain top`: a run while it runs."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from dtrain.cli import options as shared
from dtrain.console import out
from dtrain.run.lookup import find

if TYPE_CHECKING:
    from dtrain.top.view import Choice
    from dtrain.top.watch import Watch

_REFRESH_S = 0.5
_LINE_S = 10.0
"""The least time between two lines where the output is no terminal."""
_ENDED = ("succeeded", "failed", "cancelled", "lost")


@click.command(
    "top",
    cls=shared.Command,
    examples=(
        ("dtrain top", "The run that was started last, until q is pressed."),
        ("dtrain top digits-4f --json", "What is known of a run now, as JSON."),
    ),
)
@shared.run_argument
@shared.runs_option
@shared.json_option
def command(run: str, runs: str, as_json: bool) -> int:
    """Watch RUN (an id, a unique prefix, or `last`): progress, metrics, ranks, nodes, warnings.

    Where the output is no terminal, it prints a line every ten seconds until the run ends.
    """
    from dtrain.top.watch import Watch

    watch = Watch(find(run, runs))
    if as_json:
        watch.update()
        shared.print_json(watch.to_json())
    elif out.on_terminal() and sys.stdin.isatty():
        _watch_screen(watch)
    else:
        _print_lines(watch)
    return 0


def _print_lines(watch: Watch) -> None:
    from dtrain.top.view import plain_line

    printed, line = -_LINE_S, ""
    while True:
        watch.update()
        now = time.monotonic()
        ended = watch.state in _ENDED
        if ended or (now - printed >= _LINE_S and plain_line(watch) != line):
            line, printed = plain_line(watch), now
            click.echo(line)
        if ended:
            return
        time.sleep(_REFRESH_S)


def _watch_screen(watch: Watch) -> None:
    from rich.console import Console
    from rich.live import Live

    from dtrain.top.keys import pressed, single_keys
    from dtrain.top.view import Choice, screen

    console, choice = Console(highlight=False), Choice()
    with single_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        keys: list[str] = []
        while not any([_act_on(key, watch, choice) for key in keys]):
            watch.update()
            live.update(screen(watch, choice, *console.size), refresh=True)
            keys = pressed(_REFRESH_S)


def _act_on(key: str, watch: Watch, choice: Choice) -> bool:
    """Act on a key. Return whether to leave."""
    if choice.asks_to_stop:
        choice.asks_to_stop = False
        if key == "y":
            choice.stopping = True
            _stop(watch)
        return False
    if key == "l":
        choice.shows_log = not choice.shows_log
    elif key == "s":
        choice.asks_to_stop = watch.state == "running" and not choice.stopping
    elif key in ("up", "down"):
        step = 1 if key == "down" else -1
        choice.rank = min(watch.plan.world_size - 1, max(0, choice.rank + step))
    return key == "q"


def _stop(watch: Watch) -> None:
    """Stop the run, and watch it meanwhile. The command ends when the run has ended."""
    from dtrain.launchers.stopping import cancel

    threading.Thread(target=cancel, args=(watch.run,), name="stop").start()
