"""Running a script in a worker, as `python train.py` under torchrun would.

Two mistakes fail nowhere and are told: several processes without a process group, each of which
trains alone, and threads that keep a script from ending.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch.distributed import constants, distributed_c10d

from dtrain import procs
from dtrain.integrations.script.stopping import RUN_VARIABLE
from dtrain.ranks import RankInfo
from dtrain.run.events import note_event
from dtrain.run.failures import Frame, user_frames, users_own
from dtrain.run.rundir import RunDir

GROUP_PATIENCE_S = 10.0
"""Most scripts have made their group by then: they begin with it."""
_THREAD_PATIENCE_S = 5.0
"""A thread that ends by itself soon is nothing to tell of."""


def run_script(
    script: Path, arguments: Sequence[str], run: RunDir, leave: Callable[[str, list[Frame]], object]
) -> None:
    """Run a file as the main program of this process; returns when it and its threads have ended.

    Nothing is set up for it but the environment: no process group, no logging, no signals.

    Args:
        script: the file.
        arguments: its command line.
        run: where `dtrain.checkpoint` saves.
        leave: is told how it has ended, in words, and from which lines.
    """
    os.environ[RUN_VARIABLE] = str(run.path)
    # The warning before a time limit: for who asks `dtrain.stopping()`, no reason to die.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    sys.argv[:] = [str(script), *arguments]
    procs.offer_current_folder()
    sys.path.insert(0, str(script.parent))
    main = ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main  # where pickle, and processes that are spawned, look
    how, frames = f"the end of {script.name}", list[Frame]()
    try:
        exec(compile(script.read_bytes(), str(script), "exec"), vars(main))
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
        how, frames = "sys.exit(0)", user_frames(end.__traceback__)
    leave(how, frames)
    _wait_for_threads(run)  # os._exit, which follows, would not


class GroupWatch:
    """Watches whether the script of this process makes a group.

    Without one each process trains alone, and nothing fails.
    """

    def __init__(self, run: RunDir, timeout_s: float) -> None:
        """Begin, before the script runs: its libraries take torch's constants when imported.

        Args:
            run: where to tell of what is missing.
            timeout_s: of groups for which the script names none; torch's is 10 or 30 minutes.
        """
        self._run = run
        ranks = RankInfo.from_env()
        self._size = ranks.world_size
        self._is_to_tell = ranks.world_size > 1 and ranks.is_rank_zero
        self._made = self._told = False
        limit = timedelta(seconds=timeout_s)
        for module in (constants, distributed_c10d):
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                setattr(module, name, limit)
        dist.init_process_group = distributed_c10d.init_process_group = self._watched()
        if self._is_to_tell:
            timer = threading.Timer(
                GROUP_PATIENCE_S, self.tell_if_none, (f"after {GROUP_PATIENCE_S:g} s",)
            )
            timer.daemon = True
            timer.start()

    def _watched(self) -> Callable[..., None]:
        make = dist.init_process_group

        @functools.wraps(make)
        def watched(*args: Any, **kwargs: Any) -> None:
            make(*args, **kwargs)
            self._made = True
            if self._told:
                note_event(self._run, "group_made", pid=os.getpid())

        return watched

    def is_over(self) -> bool:
        """Whether a group was made and destroyed."""
        return self._made and not dist.is_initialized()

    def tell_if_none(self, when: str) -> None:
        """Warn where several processes have no group; rank 0 does so for all."""
        if self._made or not self._is_to_tell:
            return
        what = (
            f"no process group {when}: without torch.distributed.init_process_group() each of the "
            f"{self._size} processes trains by itself"
        )
        note_event(self._run, "no_group", what=what, pid=os.getpid())
        if not self._told:
            _warn(what)
        self._told = True


def _wait_for_threads(run: RunDir) -> None:
    """Wait as an interpreter does at its end for all threads that are no daemons; say for which."""
    told = threading.Timer(_THREAD_PATIENCE_S, _tell_of_threads, (run, RankInfo.from_env()))
    told.daemon = True
    told.start()
    threading._shutdown()  # type: ignore[attr-defined]
    told.cancel()


def _tell_of_threads(run: RunDir, ranks: RankInfo) -> None:
    main = threading.main_thread()
    left = [each for each in threading.enumerate() if not each.daemon and each is not main]
    if not left:
        return
    what = f"rank {ranks.rank} is done but for {'; '.join(map(_place, left))}; the run waits for it"
    note_event(run, "threads_left", rank=ranks.rank, what=what)
    _warn(what)


def _place(thread: threading.Thread) -> str:
    """Its name, and the user's line in it."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = [
        Frame(each.filename, each.lineno or 0, each.name, (each.line or "").strip())
        for each in traceback.extract_stack(frame)
    ]
    at = (users_own(stack) or stack)[-1] if frame is not None and stack else None
    where = "" if at is None else f" at {at.file}:{at.line} in {at.function}: {at.code}"
    return f"thread {thread.name!r}{where}"


def _warn(what: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{stamp} WARNING dtrain: {what}", file=sys.stderr, flush=True)
