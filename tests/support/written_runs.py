"""Run directories as a launch writes them, without a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, make_plan
from dtrain.launchers import base, prepare
from dtrain.run import files
from dtrain.run.attempts import Handle, Result, State
from dtrain.run.rundir import RunDir

TRAIN = {"steps": 12, "global_batch_size": 8}


def write_run(
    runs: Path,
    name: str,
    *,
    state: State | None = "succeeded",
    job: dict[str, Any] | None = None,
    metrics: dict[str, dict[str, float]] | None = None,
    started: float = 1.7e9,
) -> RunDir:
    """Write a run, started in this process.

    Args:
        runs: the directory of all runs.
        name: its id.
        state: the state in which it has ended. None means that it is running.
        job: fields of the job, beside those that every job needs.
        metrics: the metrics of step 12, by split.
        started: when it began.
    """
    fields = {"name": "digits", "task": "task.py:T", "train": TRAIN, **(job or {})}
    spec = JobSpec.model_validate(fields)
    facts = Facts(name, str(runs), "python3", "laptop", cores=8, free_port=16000)
    made = make_plan(
        spec, job_dir="/job", launcher="local", profile="local", options=AnyOptions(), facts=facts
    )
    plan = base.load("local").complete(made, facts)
    prepare.prepare(plan, spec, "name: digits\n", Handle.of_this_process("local", 0))
    for split, values in (metrics or {}).items():
        line = {"time": started + 1, "step": 12, "epoch": 0, "split": split, **values}
        files.append_line(plan.run.metrics, line)
    if state is not None:
        end(plan.run, state, started)
    return plan.run


def end(run: RunDir, state: State, started: float = 1.7e9, attempt: int = 0) -> None:
    """Record that an attempt has ended."""
    handle = Handle.read(run, attempt)
    assert handle is not None
    files.write_json(run.handle(attempt), {**vars(handle), "started": started})
    Result(state, 0 if state == "succeeded" else 1, started, started + 60).write(run, attempt)
