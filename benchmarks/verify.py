"""How long `dtrain verify` takes for the rows of one trainer on a small job.

Prints tables of medians, extremes and ratios, of seconds and of CPU seconds::

    python benchmarks/verify.py --rounds 3 --other ../dtrain-before/src

With `--other`, the same rows are run by the dtrain of another source directory as well, in turns
(A B A B …), so that a busy moment hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import time
from pathlib import Path

from launches import BIN, JOB
from startup import beside, scratch

ROWS = 11


def verify(source: Path | None) -> tuple[float, float]:
    """Seconds on the clock and CPU seconds of one `dtrain verify --trainer native`."""
    env = {**os.environ, **({} if source is None else {"PYTHONPATH": str(source)})}
    with scratch() as folder:
        argv = [str(BIN / "dtrain"), "verify", "--json", "--trainer", "native", str(JOB)]
        before, began = _cpu(), time.monotonic()
        done = subprocess.run(
            argv, cwd=folder, env={**env, "TMPDIR": str(folder)}, stdout=subprocess.PIPE, check=True
        )
        seconds = time.monotonic() - began
    report = json.loads(done.stdout)
    assert report["same"]
    assert len(report["layouts"]) == ROWS, "another number of rows cannot be compared"
    return seconds, _cpu() - before


def _cpu() -> float:
    """Of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path, help="src of another dtrain, run in turns with ours")
    arguments = parser.parse_args()
    sources = {"dtrain": None}
    if arguments.other is not None:
        sources[f"dtrain of {arguments.other}"] = arguments.other.resolve()
    clock: dict[str, list[float]] = {name: [] for name in sources}
    cpu: dict[str, list[float]] = {name: [] for name in sources}
    for round_ in range(arguments.rounds):
        for name, source in sources.items():
            seconds, used = verify(source)
            clock[name].append(seconds)
            cpu[name].append(used)
            print(f"round {round_ + 1}: {name} {seconds:.1f} s, {used:.1f} CPU s", flush=True)
    print()
    print(beside(f"{ROWS} rows of the digits", clock))
    print()
    print(beside("CPU", cpu))


if __name__ == "__main__":
    main()
