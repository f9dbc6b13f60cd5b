"""A thousand job files with a few mistakes each: every one is taken, or refused with its name."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.errors import JobError, PlanError
from dtrain.job.load import load_job
from dtrain.task import REQUIRED

SEED = 20_261_128
PARTS = (
    "&a", "*a", "<<: *a", "!!python/object/apply:os.system", "!!int", "- ", "? ", ": ", "|\n",
    "{", "}", "[", "]", "'", '"', "#", "\t", "\n", "\r\n", "---\n", "...\n", "%YAML 9.9\n", "~",
    "\x00", "\x1b", "\u2028", "\ufeff", "é", "日本", "٣", "²", ".nan", ".inf", "-.inf", "1e400",
    "0x" + "f" * 400, "0b" + "1" * 2000, "9" * 4400, "-1", "0", "yes", "null", "1:2:3", ">-\n",
    "launch: {nodes: 3:1}\n", "args: [1]\n", "train: 7\n", "env: {A: 1, A: 2}\n", "\\0",
    "task: ../x.py:T\n", "strategy: [ddp]\n", "seed: -1\n", "name: ''\n", "every_steps: 0\n",
    "{{ 1 + 1 }}", "${HOME}", "$(touch PWNED)", "; touch PWNED", "../../etc/passwd",
    "script: train.py\n",
)  # fmt: skip
"""What is put into a file somewhere."""

NEEDED = "name: tiny\ntask: task.py:T\ntrain: {steps: 3, global_batch_size: 16}\n"
FURTHER = (
    "args: {pause: 0.5}\n", "seed: 7\n", "trainer: native\n", "strategy: ddp\n",
    "data: {workers: 1, shuffle: true, paths: [task.py]}\n", "eval: {every_steps: 5}\n",
    "checkpoint: {every: 30m, keep: 2}\n", "checks: {every_steps: 5, on_nan: stop}\n",
    "log: {every_steps: 1}\n", "launch:\n  nodes: 1:2\n  join_timeout: 90s\n",
    "launch:\n  env: {OMP_NUM_THREADS: 1}\n",
)  # fmt: skip
TASK = "import dtrain\nclass T(dtrain.Task):\n    def __init__(self, pause=0): ...\n"
TASK += "".join(f"    def {name}(self): ...\n" for name in REQUIRED)


def mutated(rng: random.Random) -> bytes:
    """The text of a job after one to four changes."""
    data = bytearray((NEEDED + "".join(rng.sample(FURTHER, 3))).encode())
    for _ in range(rng.randint(1, 4)):
        change = rng.choice(CHANGES)
        change(rng, data)
    return bytes(data)


def _put_in(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(PARTS).encode()


def _put_over_a_value(rng: random.Random, data: bytearray) -> None:
    colons = [k for k in range(len(data) - 1) if data[k : k + 2] == b": "]
    if colons:
        at = rng.choice(colons) + 2
        data[at : at + rng.randint(1, 6)] = rng.choice(PARTS).encode()


def _cut(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.randint(1, 30)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[at : at + rng.randint(1, 60)]


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _put_in, _put_over_a_value, _cut, _repeat, _flip,
)  # fmt: skip


def test_each_is_taken_or_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    rng = random.Random(SEED)
    taken = 0
    for number in range(1000):
        data = mutated(rng)
        Path("job.yaml").write_bytes(data)
        try:
            load_job("job.yaml")
            taken += 1
        except (JobError, PlanError) as refused:
            text = str(refused)
            assert text.startswith("job.yaml"), (number, data, text)
            assert text.replace("\n", "").isprintable(), (number, data, text)
            assert len(text) < 10_000
        except BaseException as error:
            raise AssertionError(f"file {number}: {data!r}") from error
    assert 10 < taken < 900
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml", "task.py"]
