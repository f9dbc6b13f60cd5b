"""The request to stop, for the processes of a script."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist

from dtrain.errors import UsageError
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RUN_VARIABLE, RunDir
from dtrain.train import collectives
from dtrain.train.context import StopFlag

_STOP = StopFlag()
_listening = False


def prepare(run: RunDir) -> None:
    """Prepare this process for a script, or for a program that it starts.

    `dtrain.checkpoint` finds the run, and the warning before a time limit ends only those that
    listen to it.
    """
    os.environ[RUN_VARIABLE] = str(run.path)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def require_group(what: str) -> RankInfo:
    """Return this process's ranks, and require a process group if there are several processes.

    Raises:
        UsageError: there is no process group yet.
    """
    ranks = RankInfo.from_env()
    if ranks.world_size > 1 and not collectives.in_group():
        raise UsageError(
            f"{what} communicates with the other {ranks.world_size - 1} processes: call it after "
            "torch.distributed.init_process_group()",
            code="script.no-process-group",
        )
    return ranks


def stopping() -> bool:
    """Return whether any process was asked to stop.

    All processes must call this at the same moment, and all get the same answer. A time limit that
    is near, a preemption, `dtrain cancel` and Ctrl-C ask a process to stop. From the first call on
    they no longer end the process: save and exit when this returns True.

    Raises:
        UsageError: there are several processes, but no process group yet.
    """
    global _listening
    require_group("dtrain.stopping()")
    if not _listening:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, _note)
        _listening = True
    if not collectives.in_group():
        return _STOP.reason is not None
    asked = torch.tensor(int(_STOP.reason is not None), device=_device())
    dist.all_reduce(asked)
    return bool(asked)


def _note(number: int, _frame: object) -> None:
    _STOP.request(signal.Signals(number).name)


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
