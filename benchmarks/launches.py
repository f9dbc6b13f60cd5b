"""The two launches that startup.py compares, and what they say of their steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "examples" / "digits" / "job.yaml"
BY_HAND = Path(__file__).resolve().parent / "by_hand" / "digits.py"
BIN = Path(sys.executable).parent

RANKS = 4
ENDLESS = 1_000_000
CHECKPOINT_EVERY = 20
KILL_AFTER_STEP = 30
"""Past the first checkpoint, so that the restart resumes."""
KILL_LOCAL_RANK = 2


@dataclass(frozen=True)
class Step:
    """One step that one rank has done."""

    rank: int
    step: int
    time: float
    pid: int


def parse_steps(text: str) -> list[Step]:
    """The lines of by_hand/digits.py; a last line cut short is passed over."""
    steps = []
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            rank, step, when, pid = line.split()
            steps.append(Step(int(rank), int(step), float(when), int(pid)))
    return steps


def first_on_all(steps: Iterable[Step], ranks: int, not_of: frozenset[int]) -> float | None:
    """When the last rank had done its first step, in a process not in `not_of`.

    None while some rank has done none.
    """
    firsts: dict[int, float] = {}
    for step in steps:
        if step.pid not in not_of:
            firsts.setdefault(step.rank, step.time)
    return max(firsts.values()) if len(firsts) == ranks else None


# -- dtrain ----------------------------------------------------------------------------------


class Dtrain:
    """`dtrain launch --procs 4 examples/digits/job.yaml`."""

    name = "dtrain"
    env: dict[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self._run = folder / "runs" / "bench"
        settings = {
            "train.epochs": ENDLESS,
            "log.every_steps": 1,
            "checkpoint.every_steps": CHECKPOINT_EVERY,
        }
        self.argv = [str(BIN / "dtrain"), "launch", "--procs", str(RANKS), "--max-restarts", "3"]
        self.argv += ["--run-id", "bench"]
        for name, value in settings.items():
            self.argv += ["--set", f"{name}={value}"]
        self.argv.append(str(JOB))

    def first_step(self) -> float | None:
        """When the first step was done; its loss is a sum over all ranks."""
        return next((line["time"] for line in self._trained()), None)

    def worker(self) -> int | None:
        """The pid of the worker to kill, once there is a step to kill after."""
        lines = self._trained()
        if not lines or lines[-1]["step"] < KILL_AFTER_STEP:
            return None
        return int(self._starts()[0]["pids"][KILL_LOCAL_RANK])

    def next_step(self) -> float | None:
        """When the first step of the restarted workers was done."""
        again = [start["time"] for start in self._starts() if start["restart"] > 0]
        if not again:
            return None
        return next((line["time"] for line in self._trained() if line["time"] > again[0]), None)

    def _trained(self) -> list[dict[str, Any]]:
        return [line for line in read_json(self._run / "metrics.jsonl") if line["split"] == "train"]

    def _starts(self) -> list[dict[str, Any]]:
        events = read_json(self._run / "events.jsonl")
        return [event for event in events if event["event"] == "workers_started"]


def read_json(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line cut short is passed over."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# -- torchrun --------------------------------------------------------------------------------


class Torchrun:
    """`torchrun --standalone --nproc-per-node 4 by_hand/digits.py`."""

    name = "torchrun"
    # without it restarts fail on gloo (pytorch#135712); OMP_NUM_THREADS is what it sets itself
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}

    def __init__(self, folder: Path) -> None:
        self._steps = folder / "steps.txt"
        self._first: frozenset[int] = frozenset()
        self.argv = [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={RANKS}"]
        self.argv += ["--max-restarts=3", str(BY_HAND), "--steps", str(ENDLESS)]
        self.argv += ["--snapshot", str(folder / "snapshot.pt"), "--steps-file", str(self._steps)]
        self.argv += ["--snapshot-every", str(CHECKPOINT_EVERY)]

    def first_step(self) -> float | None:
        """When the last rank had done its first step."""
        return first_on_all(self._done(), RANKS, frozenset())

    def worker(self) -> int | None:
        """The pid of the worker to kill, once there is a step to kill after."""
        steps = self._done()
        if not steps or steps[-1].step < KILL_AFTER_STEP:
            return None
        self._first = frozenset(step.pid for step in steps)
        return next(step.pid for step in steps if step.rank == KILL_LOCAL_RANK)

    def next_step(self) -> float | None:
        """When the last rank had done the first step of its restarted process."""
        return first_on_all(self._done(), RANKS, self._first)

    def _done(self) -> list[Step]:
        return parse_steps(self._steps.read_text()) if self._steps.exists() else []
