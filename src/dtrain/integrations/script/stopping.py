"""Whether the processes of a script were asked to leave."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from dtrain.errors import UsageError
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.context import StopFlag

RUN_VARIABLE = "DTRAIN_RUN_DIR"
"""Set in a script: the directory of its run."""

_STOP = StopFlag()
_listening = False


def require_group(what: str) -> RankInfo:
    """This process's ranks; several processes need a process group for what follows.

    Raises:
        UsageError: there is none yet.
    """
    ranks = RankInfo.from_env()
    if ranks.world_size > 1 and not collectives.in_group():
        raise UsageError(
            f"{what} speaks to the other {ranks.world_size - 1} processes: call it after "
            "torch.distributed.init_process_group()",
            code="script.no-process-group",
        )
    return ranks


def stopping() -> bool:
    """Whether any process was asked to leave; the same answer on all, which ask at one moment.

    Asked by a time limit that comes near, a preemption, `dtrain cancel` or Ctrl-C. From the first
    call on these no longer end the process: save and leave when this is true.

    Raises:
        UsageError: there is no process group yet, but several processes.
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
