"""How long one waits: for help, for the first step, for the next step after a kill.

dtrain beside torchrun, on the CPU of this machine, in turns (A B A B …), so that a busy moment
hits both. Prints a table of medians, extremes and ratios::

    python benchmarks/startup.py --rounds 5

Both train examples/digits on 4 ranks with a checkpoint every 20 steps: dtrain from its job file,
torchrun from by_hand/digits.py. Both run in a directory that is removed at the end, and only
processes started here are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from launches import BIN, KILL_AFTER_STEP, RANKS, Dtrain, Torchrun

PATIENCE_S = 180.0
TICK_S = 0.005


@dataclass
class Row:
    """One line of the table: seconds of each round, of dtrain and of torchrun."""

    what: str
    aim: float
    dtrain: list[float] = field(default_factory=list)
    torchrun: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times sooner dtrain is, by medians."""
        return statistics.median(self.torchrun) / statistics.median(self.dtrain)

    def cells(self) -> list[str]:
        return [
            self.what,
            spread(self.dtrain),
            spread(self.torchrun),
            f"{self.ratio:.1f} x",
            f"{self.aim:g} x",
        ]


def spread(seconds: list[float]) -> str:
    """`3.12 (2.98 - 3.40)`: median, least and most."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ["seconds: median (min - max)", "dtrain", "torchrun", "ratio", "aim"]
    return aligned([head, *(row.cells() for row in rows)])


def beside(what: str, found: dict[str, list[float]]) -> str:
    """A Markdown table of the seconds of several ways, with their ratio to the first by medians."""
    first = statistics.median(next(iter(found.values())))
    lines = [[what, "seconds: median (min - max)", "ratio"]]
    for name, seconds in found.items():
        lines.append([name, spread(seconds), f"{statistics.median(seconds) / first:.2f} ×"])
    return aligned(lines)


def aligned(cells: list[list[str]]) -> str:
    """A Markdown table; its first line is the head."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# -- processes -------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for one launch."""
    with tempfile.TemporaryDirectory(
        prefix="dtrain-benchmark-", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition is true; its value."""
    deadline = time.monotonic() + PATIENCE_S
    tick = threading.Event()
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not seen within {PATIENCE_S:.0f} s")
        tick.wait(TICK_S)
    return value


@contextlib.contextmanager
def running(argv: list[str], folder: Path, env: dict[str, str]) -> Iterator[float]:
    """A command while it runs, with the time at which it was started; all of it is killed."""
    with (folder / "output.txt").open("wb") as output:
        started = time.time()
        process = subprocess.Popen(
            argv, cwd=folder, env={**os.environ, **env}, stdout=output, stderr=output
        )
    try:
        yield started
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of ours and all below it; gone when this returns."""
    victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    psutil.wait_procs(victims, timeout=30)


# -- the measurements ------------------------------------------------------------------------


def help_seconds(program: str) -> float:
    """Of `PROGRAM --help`, from the command to its end."""
    started = time.perf_counter()
    subprocess.run([str(BIN / program), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def launch_seconds(kind: type[Dtrain] | type[Torchrun]) -> tuple[float, float]:
    """(command → first step, kill of a worker → next step on all ranks) of one launch."""
    with scratch() as folder:
        launch = kind(folder)
        with running(launch.argv, folder, launch.env) as started:
            first = wait_for(launch.first_step, f"{kind.name}: the first step")
            pid = wait_for(launch.worker, f"{kind.name}: step {KILL_AFTER_STEP}")
            killed = time.time()
            os.kill(pid, signal.SIGKILL)
            again = wait_for(launch.next_step, f"{kind.name}: a step after the kill")
        return first - started, again - killed


def wait_for_idle(percent: float) -> None:
    """Wait until the CPU has been idle for so much of two seconds; at most ten minutes."""
    deadline = time.monotonic() + 600
    while 100 - psutil.cpu_percent(interval=2.0) < percent and time.monotonic() < deadline:
        pass


def measure(rounds: int, idle: float, say: Callable[[str], None]) -> list[Row]:
    """All rows, each measurement begun on a CPU that is idle to `idle` percent."""
    shown = Row("--help", 5)
    first = Row(f"command → first step, {RANKS} ranks", 2)
    again = Row(f"kill -9 of a worker → next step, {RANKS} ranks", 8)
    help_seconds("dtrain"), help_seconds("torchrun")  # bring both into the page cache
    for number in range(1, rounds + 1):
        for kind, name in ((Dtrain, "dtrain"), (Torchrun, "torchrun")):
            wait_for_idle(idle)
            getattr(shown, name).append(help_seconds(name))
            start, restart = launch_seconds(kind)
            getattr(first, name).append(start)
            getattr(again, name).append(restart)
            load = os.getloadavg()[0]
            say(
                f"round {number}: {name:<8} first step {start:5.2f} s, "
                f"restart {restart:5.2f} s, load {load:.1f}"
            )
    return [shown, first, again]


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up of dtrain beside torchrun.")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turns")
    parser.add_argument(
        "--idle",
        type=float,
        default=0,
        metavar="PERCENT",
        help="begin each measurement only when the CPU is idle to so much, where others use it too",
    )
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, {arguments.rounds} rounds in turns", flush=True)
    rows = measure(arguments.rounds, arguments.idle, lambda text: print(text, flush=True))
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
