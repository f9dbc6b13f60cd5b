"""Commands as functions: `plan`, `launch`, `resume`, `sweep`, `verify`.

They import what they need after a driver has been started, which imports the same in parallel.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, cast

from dtrain.api.arguments import (
    LaunchArguments,
    ResumeArguments,
    request,
    sections,
    signature_from,
)
from dtrain.driving import Driver
from dtrain.errors import DtrainError, UsageError
from dtrain.run.rundir import ATTEMPT_VARIABLE

if TYPE_CHECKING:
    from dtrain import planning
    from dtrain.api.run import Run
    from dtrain.launch_plan import LaunchPlan
    from dtrain.planning import Prepared
    from dtrain.verification.report import Report

Job: TypeAlias = "str | os.PathLike[str] | Callable[..., Any] | Run"
"""A path, a class or function that makes a task, or a run whose job is used again."""


@signature_from(LaunchArguments)
def plan(job: Job, **arguments: Unpack[LaunchArguments]) -> LaunchPlan:
    """Plan a launch and start nothing, like `dtrain plan`.

    Args:
        job: as for `launch`; all other arguments are those of `launch` too.

    Raises:
        JobError: the job is wrong. The error lists every problem with its location.
        PlanError: job, launcher and sizes do not work together.
        UsageError: an argument is unknown or has an invalid value.

    Example:
        >>> dtrain.plan("job.yaml", nodes=2, procs=4).world_size
        8
    """
    return _planned("plan", job, arguments).plan


@signature_from(LaunchArguments)
def launch(job: Job, *, detach: bool = False, **arguments: Unpack[LaunchArguments]) -> Run:
    """Launch a job, as `dtrain launch` does, and return once its nodes are started.

    The run stops cleanly when this process exits. `Run.wait` waits for it.

    Args:
        job: path of a job.yaml or of a script, or the class of a task, a LightningModule, or a
            function that returns a compiled Keras model and its data. A class can be in a file or
            in a cell of a notebook. The sections below are its job, which needs at least `train`.
            Or a `Run`: its job and options are used again, with the code as it is now.
        detach: return as soon as the run is submitted. It then continues without this process.
            Launchers slurm and ray support this.
        nodes: number of nodes, or a range such as "2:4". `local` simulates them on this machine.
        gpus: GPUs per node; 0 trains on the CPU.
        procs: processes per node.
        strategy: how the processes share the work.
        max_restarts: restarts of failed workers.
        set: any fields of job.yaml, by dotted name: `{"args.lr": 0.1}`.
        env: variables for every worker. Values that look secret are never shown.
        options: options of the launcher's profile, by name.
        runs: directory or URL of all runs. None means DTRAIN_RUNS, or else `runs`.
        preflight: let the nodes check themselves and one another before the workers start.
        launcher: a profile: your own launchers/NAME.yaml, or the packaged one. None means
            `local`, or of a `Run` its own.
        trainer: the trainer whose training loop is used.
        seed: the seed of the whole training.
        name: the name of the run.
        script_args: the command line of a script.
        accelerate_config: the config file of Accelerate, for a script.
        run_id: the id of the run. None means the name and some letters.
        args: arguments of the task's class, which override those in job.yaml. `train`, `data`,
            `eval`, `checkpoint`, `checks`, `log`, `lightning`, `fsdp`, `profile` and `launch` are
            its other sections.

    Raises:
        JobError: the job is wrong. The error lists every problem with its location.
        PlanError: job, launcher and sizes do not work together.
        UsageError: an argument is unknown or invalid, or workers cannot import a class.
        LaunchError: the launcher cannot start it.

    Example:
        >>> run = dtrain.launch("job.yaml", nodes=2, procs=2, set={"args.lr": 0.1})
        >>> run.wait()
        0
    """
    with _driver() as driver:
        return _launch(driver, _planned("launch", job, arguments), detach)


@signature_from(ResumeArguments)
def resume(
    run: str | Run = "last", *, detach: bool = False, **arguments: Unpack[ResumeArguments]
) -> Run:
    """Continue a run from its newest intact checkpoint, as `dtrain resume` does.

    The run continues as it was launched. An argument, for example a size, changes what it names.

    Args:
        run: an id, a unique beginning of one, `last`, or a `Run`.
        detach: as for `launch`; all other arguments are those of `launch` too.

    Raises:
        RunNotFound: there is no such run.
        UsageError: the run is running or has finished, or an argument would have no effect.
        JobError, PlanError, LaunchError: as for `launch`.

    Example:
        >>> dtrain.resume("last", procs=4).wait()
        0
    """
    with _driver() as driver:
        from dtrain.api.run import Run
        from dtrain.resuming import plan_resume

        given = request("resume", arguments, ResumeArguments)
        found = run if isinstance(run, Run) else Run.find(run, runs=given.runs)
        return _launch(driver, plan_resume(found.directory, given), detach)


@signature_from(LaunchArguments)
def sweep(
    job: Job,
    fields: Mapping[str, Sequence[Any]],
    *,
    sample: int | None = None,
    at_once: int | None = None,
    progress: bool = True,
    **arguments: Unpack[LaunchArguments],
) -> list[Run]:
    """Launch a run for each combination of values, as `dtrain launch --sweep`, and wait for all.

    Args:
        job: as for `launch`; all other arguments are those of `launch` too. `run_id` is the id of
            the sweep.
        fields: the values of each field of job.yaml, by its dotted name.
        sample: take this many random combinations. None means all.
        at_once: how many runs may run at the same time. None means as many as find place.
        progress: whether to print how the runs start and end.

    Returns:
        The runs, the last field changing fastest. `Run.status` tells how each has ended.

    Raises:
        JobError, PlanError, LaunchError: as for `launch`.
        UsageError: the values make no sweep, or this is not the main thread.

    Example:
        >>> runs = dtrain.sweep("job.yaml", {"args.lr": [0.1, 0.01], "seed": range(3)})
        >>> best = min(runs, key=lambda run: run.metrics["loss"][-1])
    """
    _refuse_in_worker()
    _refuse_in_thread("sweep")
    from dtrain.api.run import Run
    from dtrain.sweeping import making
    from dtrain.sweeping.drive import Console, drive, of_launch
    from dtrain.sweeping.values import choices_of

    given = request("sweep", arguments, LaunchArguments)
    if twice := [name for name in fields if name in given.fields]:
        raise UsageError(f"{twice[0]} is given twice", code="usage.sweep-repeats")
    chosen = choices_of(fields, sample, "sweep(fields={…})")
    made = making.write(making.plan(_job_of("sweep", job, arguments), chosen, given), False)
    try:
        drive(made, of_launch(given), at_once, Console(print, quiet=not progress))
    except DtrainError:
        making.remove(made.runs)
        raise
    return [Run(run) for run in made.runs]


def verify(
    job: Job,
    *,
    steps: int = 5,
    strategies: Sequence[str] = (),
    trainers: Sequence[str] = (),
    launchers: Sequence[str] = (),
    nodes: Sequence[int] = (),
    procs: Sequence[int] = (),
    only: bool = False,
    gpus: bool = False,
    deep: bool = False,
    epoch_samples: int | str = "auto",
    set: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
    keep: str | Path | None = None,
    progress: bool = True,
    **fields: Any,
) -> Report:
    """Check that every way to run a job gives the same training, as `dtrain verify` does.

    Args:
        job: as for `launch`.
        steps: optimizer steps of each run.
        strategies: run only these. `trainers`, `launchers`, `nodes` and `procs` work the same way.
        only: run nothing except what these arguments name.
        gpus: give each process a GPU.
        deep: run everything in fp64.
        epoch_samples: samples of an epoch, `auto` or `all`.
        set: any fields of job.yaml, by dotted name.
        options: `NAME=VALUE` options of the named launchers.
        keep: directory in which the run directories are kept. None means that they are removed.
        progress: whether to print the report, row by row.
        fields: sections of job.yaml, as for `launch`.

    Returns:
        A report. `report.same` is true if every run was the same training.

    Raises:
        JobError, PlanError, UsageError: as for `launch`.
        RunFailed: the job fails even as one process.

    Example:
        >>> dtrain.verify("job.yaml", strategies=["ddp"], procs=[2], progress=False).same
        True
    """
    from dtrain.verification import text
    from dtrain.verification.runner import Stopped
    from dtrain.verification.session import Session

    _refuse_in_worker()
    _refuse_in_thread("verify")
    given = request("verify", cast("ResumeArguments", {"set": set, **fields}), ResumeArguments)
    with contextlib.ExitStack() as stack:
        session = Session(
            stack.enter_context(_job_file(job)),
            steps=steps,
            strategies=strategies,
            trainers=trainers,
            launchers=launchers,
            nodes=nodes,
            procs=procs,
            only=only,
            gpus=gpus,
            deep=deep,
            epoch_samples=epoch_samples,
            overrides=[f"{name}={json.dumps(each.plain())}" for name, each in given.fields.items()],
            options=options,
            keep=keep,
        )
        try:
            stack.enter_context(session)
            for part in text.run_and_report(session, shutil.get_terminal_size().columns):
                if progress:
                    print(part, flush=True)
        except Stopped:
            raise KeyboardInterrupt from None
        return session.report


def _planned(function: str, job: Job, arguments: LaunchArguments) -> Prepared:
    from dtrain.planning import plan_run

    given = request(function, arguments, LaunchArguments)
    return plan_run(_job_of(function, job, arguments), given)


def _job_of(function: str, job: Job, arguments: LaunchArguments) -> planning.Job:
    """Return the job that a caller has given as a run, a path or a class."""
    from dtrain.api.run import Run

    if isinstance(job, Run):
        return job.directory
    if isinstance(job, str | os.PathLike):
        return os.fspath(job)
    from dtrain.api.task_class import job_of_class

    return job_of_class(function, job, sections(arguments))


@contextlib.contextmanager
def _driver() -> Iterator[Driver]:
    """Yield a driver that imports while its launch is planned. It is ended if planning fails."""
    _refuse_in_worker()
    driver = Driver()
    try:
        yield driver
    except BaseException:
        driver.abandon()
        raise


def _launch(driver: Driver, prepared: Prepared, detach: bool) -> Run:
    from dtrain.api.run import Run
    from dtrain.launchers.driver import LaunchRequest

    prepared.refuse_unlaunchable(detach)
    plan, job = prepared.plan, prepared.job
    driver.launch(LaunchRequest(plan, job.spec.to_plain(), job.text, detach))
    return Run(plan.run)


def _refuse_in_thread(function: str) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            f"{function}() handles Ctrl-C, so it can only run in the main thread",
            code="api.main-thread-only",
        )


def _refuse_in_worker() -> None:
    """Refuse to launch from a worker, which imports the user's script for its class."""
    if ATTEMPT_VARIABLE in os.environ and "RANK" in os.environ:
        raise UsageError(
            "a worker of a run would launch another run: put the call, and everything else "
            'that only the script should run, under `if __name__ == "__main__":`',
            code="api.launch-at-import",
        )


@contextlib.contextmanager
def _job_file(job: Job) -> Iterator[str]:
    """Yield the path of a job file. For a class the file is written, and removed afterwards."""
    if isinstance(job, str | os.PathLike):
        yield os.fspath(job)
        return
    from dtrain.api.task_class import job_of_class
    from dtrain.job.yaml_reader import dump_yaml

    made = job_of_class("verify", job, {})
    with tempfile.NamedTemporaryFile("w", dir=made.folder, prefix=".job-", suffix=".yaml") as file:
        file.write(dump_yaml(dict(made.values)))
        file.flush()
        yield file.name
