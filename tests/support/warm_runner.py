"""`verify`'s runner without the launcher, which brings a run from four seconds to under one.

The trainings are real: gloo processes, dtrain's trainer, its recordings.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

import torch

from dtrain.job.profile import LoadedProfile
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.context import TrainContext
from dtrain.train.load import load_task
from dtrain.train.loop.native import NativeTrainer
from dtrain.train.strategies import ddp, dp, fsdp
from dtrain.train.strategies.exact import strategy
from dtrain.train.tracing.tracer import Recorder
from dtrain.verification.judge import Judge, Result
from dtrain.verification.layouts import Layout
from dtrain.verification.runner import Runner

IMPORTED_ONCE = (ddp, dp, strategy, fsdp)  # not in every rank


def train(spec: JobSpec, folder: Path, run: Path, attempt: int, replicas: int) -> str | None:
    """What a worker does; the traceback when it fails."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    os.environ.update(spec.launch.env)
    for module in spec.launch.preload or ():
        importlib.import_module(module)
    try:
        place, ranks = RunDir(run), RankInfo.from_env()
        task = load_task(str(spec.task), spec.args, folder)
        recorder = Recorder.asked_for(place, ranks, task)
        cpu = torch.device("cpu")
        context = TrainContext(
            spec, place, ranks, attempt, task, cpu, replicas, recorder=recorder
        )  # fmt: skip
        NativeTrainer(context).run()
    except Exception:
        return traceback.format_exc()
    return None


def of_one(judge: Judge, layout: Layout) -> Result:
    """The result of one layout."""
    (result,) = judge.judge([layout])
    return result


class WarmRunner(Runner):
    """Runs in processes forked from the test's own server instead of being launched."""

    def _attempt(
        self,
        run: RunDir,
        attempt: int,
        _pair: Layout,
        spec: JobSpec,
        _text: str,
        _profile: LoadedProfile,
    ) -> str | None:
        run.create()
        procs = spec.launch.procs_per_node or 1
        ranks = 1 if spec.strategy == "dp" else procs
        tracebacks = run_ranks(train, ranks, spec, self._path.parent, run.path, attempt, procs)
        return next((each for each in tracebacks if each is not None), None)
