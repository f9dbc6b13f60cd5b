"""The steps of every worker before and after training: rank, signals, failure record."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys
import traceback
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from dtrain import catalog, environ, procs
from dtrain.errors import DtrainError
from dtrain.integrations.script.accelerate import set_environment
from dtrain.integrations.script.command import run_command
from dtrain.integrations.script.run import GroupWatch
from dtrain.integrations.script.step_count import StepCount
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import LaunchPlan
from dtrain.node import early_exit, hints, stack_dump
from dtrain.ranks import RankInfo
from dtrain.run import events, failures, rundir
from dtrain.run.failures import Frame
from dtrain.run.flight_recorder import Ring
from dtrain.run.rundir import RunDir
from dtrain.train.checks import collective_trace
from dtrain.train.context import StopFlag, TrainContext
from dtrain.train.data.loader_process import end_with_rank
from dtrain.train.load import load_task
from dtrain.train.logs import setup_logging
from dtrain.train.tracing.tracer import Recorder


def run_worker(run: RunDir, ring: Ring | None = None) -> int:
    """Run one rank of a run, from its directory and the torchrun variables. Return the exit status.

    Args:
        run: its run directory.
        ring: the ring for the last collectives, shared with the process that started this one.

    Any early end of the training leaves a failure record in the run directory. The caller should
    end the process with `os._exit`. With a DDP module alive, a normal exit hangs in 6-8 % of gloo
    runs, and it is ten times slower (measured, 100 runs of 4 ranks).
    """
    worker = _Worker(run, ring)
    faulthandler.enable()
    if worker.has_agent:
        stack_dump.enable_to_memory()
    worker.log_event("worker_started", process=procs.this_process())
    worker.log_event("environment", versions=environ.versions(), node=socket.gethostname())
    status = 1
    try:
        status = worker.work()
    except BaseException as error:
        status = worker.record_failure(error)
    # os._exit skips these, and experiment trackers send their last data in them
    atexit._run_exitfuncs()
    worker.log_event("worker_ended", exit_code=status)
    return status


class _Worker:
    def __init__(self, run: RunDir, ring: Ring | None) -> None:
        self.run = run
        self.ring = ring
        self.ranks = RankInfo.from_env()
        self.attempt = int(os.environ.get(rundir.ATTEMPT_VARIABLE, 0))
        self.has_agent = "DTRAIN_NODE_NAME" in os.environ

    def log_event(self, event: str, **facts: Any) -> None:
        """Log an event from rank 0.

        A worker started by hand has no agent that logs start and end.
        """
        if self.ranks.is_rank_zero and not self.has_agent:
            events.note_event(self.run, event, restart=self.ranks.restart, **facts)

    def work(self) -> int:
        plan = LaunchPlan.read(self.run)
        spec = JobSpec.model_validate(yaml.safe_load(self.run.resolved.read_text(encoding="utf-8")))
        self.attempt = int(os.environ.get(rundir.ATTEMPT_VARIABLE, plan.attempt))
        torch.set_num_threads(plan.threads_per_proc)
        if spec.accelerate_config is not None:
            set_environment(Path(plan.code_dir or plan.job_dir) / spec.accelerate_config)
        if spec.command is not None:
            return self._run_command(plan, [*spec.command, *spec.script_args])
        if spec.program is not None:
            return self._run_script(plan, spec)
        try:
            with early_exit.watch_exit(self._exit_task):
                return self._train(plan, spec)
        except (Exception, SystemExit) as error:
            failures.set_step(error, 0)  # before the first
            raise

    def _train(self, plan: LaunchPlan, spec: JobSpec) -> int:
        assert spec.task is not None
        setup_logging(self.run, self.ranks, self.attempt, own_file=not self.has_agent)
        stop = _stop_on_signals()
        device = _device(plan, self.ranks)
        _join_process_group(plan, self.ranks, device)
        # before the task can import `from torch.distributed import all_reduce`
        collective_trace.install(self.ring)
        code_dir = Path(plan.code_dir or plan.job_dir)
        os.environ.setdefault("KERAS_BACKEND", "torch")  # read once, when a task imports keras
        task = load_task(spec.task, spec.args, code_dir, spec.trainer, spec.seed)
        context = TrainContext(
            spec=spec,
            run=self.run,
            ranks=self.ranks,
            attempt=self.attempt,
            task=task,
            device=device,
            local_devices=plan.replicas,
            stop=stop,
            recorder=Recorder.asked_for(self.run, self.ranks, task),
            code_dir=code_dir,
        )
        trainer: Any = catalog.load("trainer", spec.trainer)(context)
        trainer.run()
        del trainer
        gc.collect()  # DDP must go before its process group, or the teardown may hang
        if dist.is_initialized():
            dist.barrier()
        return 0

    def _run_script(self, plan: LaunchPlan, spec: JobSpec) -> int:
        end_with_rank()  # also if the script's loader processes ignore SIGTERM
        collective_trace.install(self.ring)
        group = GroupWatch(plan.run, plan.collective_timeout_s)
        run_script = catalog.load("trainer", spec.trainer)
        folder = Path(plan.code_dir or plan.job_dir)

        count = self._step_count(plan, spec)

        def on_exit(how: str, frames: list[Frame]) -> int:
            group.warn_if_none("to the end")
            if count is not None:
                count.close()
            early_exit.save_note(self.ring, how, frames, group.is_over())
            return 0

        with early_exit.watch_exit(partial(on_exit, "os._exit(0)")):
            run_script(spec, folder, plan.run, on_exit)
        return 0

    def _step_count(self, plan: LaunchPlan, spec: JobSpec) -> StepCount | None:
        """Return the count of a script's steps, if this rank is to profile some of them."""
        if spec.profile is None or not spec.profile.includes(self.ranks.rank):
            return None
        device = torch.device(plan.device, self.ranks.local_rank if plan.device == "cuda" else None)
        return StepCount(spec.profile, self.run, self.ranks, self.attempt, device)

    def _run_command(self, plan: LaunchPlan, command: list[str]) -> int:
        ended = run_command(command, Path(plan.code_dir or plan.job_dir), plan.run)
        if ended.status == 0:
            return 0
        record = failures.of_error_file(self._error_file, ended.status, **self._location())
        if record is None:
            kind, message = ended.describe()
            status = procs.shell_code(ended.status)
            record = failures.of_worker(kind, message, status, **self._location())
        record.write(self.run, self.attempt)
        return record.exit_code

    def record_failure(self, error: BaseException) -> int:
        """Print the error, and write the failure record. Return the exit status."""
        record = failures.of_exception(error, **self._location())
        if isinstance(error, SystemExit) and not error.code:  # only a task's: a script may exit so
            record = early_exit.of_task(record, "sys.exit(0)")
        record = replace(record, hint=hints.hint(error, record.frames, self.run))
        if record.exit_code != 0:
            record.write(self.run, self.attempt)
            if not self.has_agent:
                _report_to_torchrun(error)
        with contextlib.suppress(OSError):  # a full disk may be the cause
            if not isinstance(error, SystemExit):
                print(failures.FAILURE_OPEN, file=sys.stderr)
                traceback.print_exception(error)
                if record.hint:
                    print(f"dtrain: {record.hint}", file=sys.stderr)
                print(failures.FAILURE_CLOSE, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        return record.exit_code

    def _exit_task(self, frames: list[Frame]) -> int:
        """Record that a task ended the process by `os._exit(0)`. Return the exit status."""
        record = failures.of_worker("early_exit", "", 1, frames=frames, **self._location())
        record = early_exit.of_task(record, "os._exit(0)")
        record.write(self.run, self.attempt)
        return record.exit_code

    @property
    def _error_file(self) -> Path:
        return self.run.error_file(self.attempt, self.ranks.restart, self.ranks.rank)

    def _location(self) -> dict[str, Any]:
        ranks = self.ranks
        return {
            "rank": ranks.rank,
            "node_rank": ranks.node_rank,
            "restart": ranks.restart,
            "log": str(self.run.rank_log(self.attempt, ranks.node_rank, ranks.rank)),
        }


def _stop_on_signals() -> StopFlag:
    """Make signals set a flag. The trainer acts on it at a step boundary, on all ranks."""
    stop = StopFlag()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda number, _frame: stop.request(signal.Signals(number).name))
    return stop


def _device(plan: LaunchPlan, ranks: RankInfo) -> torch.device:
    if plan.device == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if ranks.local_rank >= found:
        raise DtrainError(
            f"{plan.gpus_per_node} GPUs per node were asked for, but this node shows {found}; "
            "check --gpus and CUDA_VISIBLE_DEVICES",
            code="gpu.too-few-on-node",
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def _join_process_group(plan: LaunchPlan, ranks: RankInfo, device: torch.device) -> None:
    if "RANK" not in os.environ:
        if plan.world_size > 1:
            raise DtrainError(
                f"this run has {plan.world_size} ranks, but no RANK is set: start the worker "
                "with torchrun, or the run with `dtrain launch`",
                code="node.no-rank",
            )
        return
    dist.init_process_group(
        backend="cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=plan.collective_timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def _report_to_torchrun(error: BaseException) -> None:
    """Fill the file from which torchrun takes the error that it prints."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
