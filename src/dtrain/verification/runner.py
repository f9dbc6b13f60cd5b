"""Runs a job with recording in different layouts, and returns the recordings."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

from dtrain import catalog, trace
from dtrain.console.silent import Silent
from dtrain.environ import hash_seed
from dtrain.errors import DtrainError, UsageError
from dtrain.job.imports import installed_imports
from dtrain.job.load import LoadedJob, load_job
from dtrain.job.profile import LoadedProfile, checked_options, load_profile, parse_options
from dtrain.job.spec import ChecksSpec, JobSpec
from dtrain.job.static_check import task_derives
from dtrain.launch_plan import Facts, LaunchPlan
from dtrain.launchers import base
from dtrain.launchers.supervise import drive
from dtrain.planning import complete_plan
from dtrain.run import ids, verdict
from dtrain.run.attempts import Result
from dtrain.run.rundir import RunDir
from dtrain.trace import Recording, TraceOptions
from dtrain.verification.layouts import REFERENCE, Layout
from dtrain.verification.warm_servers import WarmServers

_COLLECTIVE_TIMEOUT_S = 300.0
"""In a run of a few steps, a rank that waits this long for others would wait for ever."""


class RunFailed(DtrainError):
    """A run of the job failed; the message is its verdict."""

    code = "verify.run-failed"

    def __init__(
        self,
        message: str,
        trace: Recording | None = None,
        reason: str = "",
        *,
        code: str = "",
    ) -> None:
        super().__init__(message, code=code)
        self.recording = trace
        """The recording up to the failure; None if nothing was recorded."""
        self.reason = reason
        """The error of the rank that caused the failure, in one line."""


class Stopped(DtrainError):
    exit_code = 130
    code = "verify.stopped"


class Runner:
    """One job, and its recordings so far. As a context manager it removes its runs at the end.

    Args:
        job: path of job.yaml.
        overrides: settings for all runs, as `--set` takes them.
        options: launcher → `NAME=VALUE` options of it.
        steps: optimizer steps of each run.
        max_train_samples: a limit on the training data, so that an epoch ends within the run. None
            means all.
        max_eval_samples: a limit on the evaluation data. None means all.
        keep: where the run directories are kept. None means a temporary directory that is removed
            at the end.
    """

    def __init__(
        self,
        job: str | Path,
        *,
        overrides: Sequence[str] = (),
        options: Mapping[str, Sequence[str]] | None = None,
        steps: int = 5,
        max_train_samples: int | None = None,
        max_eval_samples: int | None = None,
        keep: str | Path | None = None,
    ) -> None:
        self._path = Path(job).absolute()
        self._overrides = tuple(overrides)
        self._options = options or {}
        self._keep = None if keep is None else Path(keep).absolute()
        self._made: dict[str | None, Path] = {}
        self._recordings: dict[tuple[Layout, TraceOptions], Recording | RunFailed] = {}
        self.watch: Callable[[Layout, TraceOptions], None] = lambda _layout, _options: None
        """A function that is called at intervals with the running layout and its options."""
        self._tick: Callable[[], None] = lambda: None
        self._warm_servers: WarmServers | None = None
        self._loaded: dict[tuple[str, tuple[str, ...]], tuple[LoadedJob, LoadedProfile]] = {}
        self.steps = steps
        self.trace_options = TraceOptions(
            max_train_samples=max_train_samples, max_eval_samples=max_eval_samples
        )
        """The options of all runs; a run may have more."""
        self.spec: JobSpec = self._load(REFERENCE)[0].spec
        """The job as its reference runs it."""
        if self.spec.program is not None:
            raise UsageError(
                "dtrain verify compares tasks; it cannot record the steps of a program's own loop",
                code="verify.script",
            )
        self.reference = REFERENCE if self._is_task() else replace(REFERENCE, trainer="lightning")
        """The layout with which the others are compared."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._warm_servers is not None:
            self._warm_servers.close()
        for folder in self._made.values():
            shutil.rmtree(folder, ignore_errors=True)

    def warm_up(self, layouts: Sequence[Layout]) -> None:
        """Import what the processes of these layouts will need, while the reference runs."""
        own = [layout for layout in layouts if not layout.overrides]  # those may import others
        self._warm_servers = WarmServers(self._planned(self.reference), map(self._planned, own))

    def check(self, layout: Layout) -> None:
        """Check that a layout can be planned. Nothing is started or written.

        Raises:
            JobError, PlanError: it cannot be planned. The message gives the reason.
        """
        self._planned(layout)

    def record(self, layout: Layout, trace_options: TraceOptions | None = None) -> Recording:
        """Return the recording of a layout, from an earlier run or a new one.

        Raises:
            RunFailed: the run failed. The message is its verdict.
            Stopped: the run was asked to stop.
            JobError, PlanError: the job cannot be run in this way.
        """
        key = (layout, trace_options or self.trace_options)
        if key not in self._recordings:
            self._recordings[key] = self._run(*key)
        known = self._recordings[key]
        if isinstance(known, RunFailed):
            raise known
        return known

    def _is_task(self) -> bool:
        """Return whether every trainer can train it. A LightningModule has only its own trainer."""
        spec, folder = self.spec, self._path.parent
        return spec.trainer != "lightning" or task_derives(str(spec.task), "Task", folder)

    def _planned(self, layout: Layout) -> LaunchPlan:
        job, profile = self._load(layout)
        spec = recorded(job.spec, layout, self.trace_options, self.steps)
        return self._plan(layout, spec, profile, "check", "runs", 0)

    def _load(self, layout: Layout) -> tuple[LoadedJob, LoadedProfile]:
        key = (layout.launcher, layout.overrides)
        if key not in self._loaded:
            profile = load_profile(layout.launcher, self._path.parent)
            overrides = [*self._overrides, *layout.overrides]
            self._loaded[key] = load_job(self._path, overrides, profile.launch), profile
        return self._loaded[key]

    def _run(self, layout: Layout, trace_options: TraceOptions) -> Recording | RunFailed:
        self._tick = partial(self.watch, layout, trace_options)
        self._tick()
        job, profile = self._load(layout)
        run = RunDir(self._folder(layout) / ids.new(job.spec.name))
        ends = [self.steps] if layout.resume_after is None else [layout.resume_after, self.steps]
        try:
            for attempt, end in enumerate(ends):
                spec = recorded(job.spec, layout, trace_options, end)
                failure = self._attempt(run, attempt, layout, spec, job.text, profile)
                if failure is not None:
                    partly = trace.read(run).complete(layout.world_size)
                    why = _reason(run, attempt) or failure.splitlines()[0]
                    return RunFailed(failure, partly if 0 in partly.steps else None, why)
            return trace.read(run)
        finally:
            if self._keep is None:
                shutil.rmtree(run.path, ignore_errors=True)

    def _attempt(
        self,
        run: RunDir,
        attempt: int,
        layout: Layout,
        spec: JobSpec,
        text: str,
        profile: LoadedProfile,
    ) -> str | None:
        """Run to the end. Return None, or the launcher's messages if the run failed."""
        plan = self._plan(layout, spec, profile, run.id, run.path.parent, attempt)
        with contextlib.suppress(OSError):  # each run would take its own snapshot of the code
            run.code.mkdir(parents=True, exist_ok=True)
        console = Silent(self._tick)
        warm = None if self._warm_servers is None else self._warm_servers.launcher(plan)
        if drive(warm or base.load(plan.launcher), plan, spec, text, console) == 0:
            return None
        result = Result.read(run, attempt)
        if result is not None and result.state == "cancelled":
            raise Stopped("the comparison was stopped")
        return _verdict("\n".join(console.messages), kept=self._keep is not None)

    def _plan(
        self,
        layout: Layout,
        spec: JobSpec,
        profile: LoadedProfile,
        run_id: str,
        runs: str | Path,
        attempt: int,
    ) -> LaunchPlan:
        imports = installed_imports(spec, self._path.parent)
        facts = Facts.gather(run_id, runs, attempt, imports)
        if replace(layout, gpus=False) == self.reference:
            # code that depends on the order of a set must differ here, not in another program
            facts = replace(facts, hash_seed=hash_seed(os.environ, default="1"))
        launcher = base.load(profile.spec.launcher)
        given = parse_options(self._options.get(layout.launcher, ()), launcher.options_model)
        options, _ = checked_options(profile, given, launcher.options_model)
        return complete_plan(spec, profile, launcher, self._path.parent, options, facts)

    def _folder(self, layout: Layout) -> Path:
        """Return the directory for the runs of a launcher, which is made at the first call.

        A temporary directory exists on this host only. A cluster's nodes see the current one, as
        they see `runs`.
        """
        if self._keep is not None:
            return self._keep
        fact = catalog.LAUNCHERS.get(layout.launcher)
        where = os.getcwd() if fact is None or fact.allocates else None
        if where not in self._made:
            try:
                self._made[where] = Path(tempfile.mkdtemp(prefix="dtrain-verify-", dir=where))
            except OSError as error:
                why = f"{error.strerror}: {error.filename}"
                raise UsageError(
                    f"cannot make a directory for the runs ({why}); choose one with --keep DIR",
                    code="verify.no-directory",
                ) from None
        return self._made[where]


def _reason(run: RunDir, attempt: int) -> str:
    """Return the error of the rank that caused the failure, in one line; empty if unknown."""
    found = verdict.read(run, attempt)
    return "" if found is None else found.culprit.message.strip().partition("\n")[0]


def _verdict(text: str, *, kept: bool) -> str:
    """Return a verdict, without paths to a run directory that will not be kept."""
    if kept:
        return text
    lines = [line for line in text.splitlines() if not line.startswith(("  log: ", "  more: "))]
    return "\n".join([*lines, "  more: `--keep DIR` keeps the run and its logs"])


# `dtrain verify` records and names the differences at which the checks would stop.
_QUIET = ChecksSpec(every_steps=0, on_mismatch="warn", init="broadcast", on_nan="warn")


def recorded(spec: JobSpec, layout: Layout, trace_options: TraceOptions, steps: int) -> JobSpec:
    """Return the job as a layout runs it: only settings around the training are changed."""
    train: dict[str, object] = {
        "epochs": None, "steps": steps, "early_stopping": None, "compile": layout.compiled,
    }  # fmt: skip
    if layout.micro_batch_size is not None or trace_options.by_sample:
        train["micro_batch_size"] = 1 if trace_options.by_sample else layout.micro_batch_size
    launch = spec.launch
    return spec.model_copy(
        update={
            "trainer": layout.trainer,
            "strategy": layout.strategy,
            "train": spec.train.model_copy(update=train),
            "fsdp": spec.fsdp.model_copy(
                update={"param_dtype": None, "reduce_dtype": None} if trace_options.fp64 else {}
            ),
            "data": spec.data.model_copy(
                update={} if layout.workers is None else {"workers": layout.workers}
            ),
            "eval": spec.eval.model_copy(update={"every_steps": None, "every_epochs": None}),
            "checkpoint": spec.checkpoint.model_copy(
                update={"every_steps": None, "every_epochs": None, "every": None, "keep": 1}
            ),
            "checks": _QUIET,
            "lightning": spec.lightning.model_copy(
                update={"step": "lightning"} if layout.own_loops else {}
            ),
            "log": spec.log.model_copy(update={"every_steps": 1, "loggers": []}),
            "profile": None,
            "launch": launch.model_copy(
                update={
                    "nodes": (layout.nodes, layout.nodes),
                    "procs_per_node": layout.procs,
                    "gpus_per_node": layout.procs if layout.gpus else 0,
                    "max_restarts": 0,
                    "collective_timeout": min(launch.collective_timeout, _COLLECTIVE_TIMEOUT_S),
                    "env": {**launch.env, **trace_options.to_env()},
                }
            ),
        }
    )
