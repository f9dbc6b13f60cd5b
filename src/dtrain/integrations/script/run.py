"""Running a script or a module in a worker, like `python train.py` under torchrun.

dtrain warns of two mistakes that raise no error: several processes without a process group, each
of which trains alone, and threads that keep a script from ending.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch.distributed import constants, distributed_c10d

from dtrain import procs
from dtrain.integrations.script.stopping import prepare
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.events import note_event
from dtrain.run.failures import Frame, only_user_frames, user_frames
from dtrain.run.rundir import RunDir

GROUP_PATIENCE_S = 10.0
"""The time before a warning about a missing group. Most scripts make theirs at the start."""
_THREAD_PATIENCE_S = 5.0
"""The time before a warning about running threads. Many threads end soon."""


def run_script(
    spec: JobSpec, folder: Path, run: RunDir, leave: Callable[[str, list[Frame]], object]
) -> None:
    """Run a script or a module as the main program of this process.

    Return when it and its threads have ended. Only the environment is set up for it: no process
    group, no logging, no signals.

    Args:
        spec: the job.
        folder: the directory of its script or module.
        run: the run directory, where `dtrain.checkpoint` saves.
        leave: called with a text that names how the program has ended, and the lines it ended in.
    """
    prepare(run)
    procs.add_current_directory()
    main = ModuleType("__main__")
    sys.modules["__main__"] = main  # pickle and spawned processes look there
    how, frames = f"the end of {spec.module or Path(spec.script or '').name}", list[Frame]()
    try:
        if spec.module is not None:
            sys.path.insert(0, str(folder))
            sys.argv[:] = ["-m", *spec.script_args]
            runpy._run_module_as_main(spec.module)  # type: ignore[attr-defined]  # of python -m
        else:
            script = folder / str(spec.script)
            sys.path.insert(0, str(script.parent))
            sys.argv[:] = [str(script), *spec.script_args]
            main.__file__ = str(script)
            exec(compile(script.read_bytes(), str(script), "exec"), vars(main))
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
        how, frames = "sys.exit(0)", user_frames(end.__traceback__)
    leave(how, frames)
    _wait_for_threads(run)  # the os._exit that follows does not wait


class GroupWatch:
    """Watches whether the script of this process makes a process group.

    Without one each process trains alone, and nothing fails.
    """

    def __init__(self, run: RunDir, timeout_s: float) -> None:
        """Start before the script runs: libraries copy torch's constants when imported.

        Args:
            run: the run directory, for the event about a missing group.
            timeout_s: the timeout of groups for which the script gives none; torch's default is
                10 or 30 minutes.
        """
        self._run = run
        ranks = RankInfo.from_env()
        self._size = ranks.world_size
        self._warns = ranks.world_size > 1 and ranks.is_rank_zero
        self._made = self._warned = False
        limit = timedelta(seconds=timeout_s)
        for module in (constants, distributed_c10d):
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                setattr(module, name, limit)
        dist.init_process_group = distributed_c10d.init_process_group = self._watched()
        if self._warns:
            self._start_timer()

    def _start_timer(self) -> None:
        timer = threading.Timer(GROUP_PATIENCE_S, self._warn_after_imports)
        timer.daemon = True
        timer.start()

    def _warn_after_imports(self) -> None:
        """Warn, unless the script still imports modules: transformers alone takes 4 to 8 s."""
        if _is_importing(threading.main_thread()):
            self._start_timer()
        else:
            self.warn_if_none(f"after {GROUP_PATIENCE_S:g} s")

    def _watched(self) -> Callable[..., None]:
        make = dist.init_process_group

        @functools.wraps(make)
        def watched(*args: Any, **kwargs: Any) -> None:
            make(*args, **kwargs)
            self._made = True
            if self._warned:
                note_event(self._run, "group_made", pid=os.getpid())

        return watched

    def is_over(self) -> bool:
        """Return whether a group was made and destroyed."""
        return self._made and not dist.is_initialized()

    def warn_if_none(self, when: str) -> None:
        """Warn if several processes have no group; rank 0 does so for all."""
        if self._made or not self._warns:
            return
        what = (
            f"no process group {when}: without torch.distributed.init_process_group() each of the "
            f"{self._size} processes trains alone"
        )
        note_event(self._run, "no_group", what=what, pid=os.getpid())
        if not self._warned:
            _warn(what)
        self._warned = True


def _is_importing(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    names = (each.f_code.co_filename for each, _ in traceback.walk_stack(frame))
    return "<frozen importlib._bootstrap>" in names


def _wait_for_threads(run: RunDir) -> None:
    """Wait for all threads that are not daemons, like an interpreter at its end; report them."""
    timer = threading.Timer(_THREAD_PATIENCE_S, _report_threads, (run, RankInfo.from_env()))
    timer.daemon = True
    timer.start()
    threading._shutdown()  # type: ignore[attr-defined]
    timer.cancel()


def _report_threads(run: RunDir, ranks: RankInfo) -> None:
    main = threading.main_thread()
    left = [each for each in threading.enumerate() if not each.daemon and each is not main]
    if not left:
        return
    threads = "; ".join(map(_described, left))
    what = f"rank {ranks.rank} has finished except for {threads}; the run waits for it"
    note_event(run, "threads_left", rank=ranks.rank, what=what)
    _warn(what)


def _described(thread: threading.Thread) -> str:
    """Return the thread's name, and the user's line that it runs."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = [
        Frame(each.filename, each.lineno or 0, each.name, (each.line or "").strip())
        for each in traceback.extract_stack(frame)
    ]
    at = (only_user_frames(stack) or stack)[-1] if frame is not None and stack else None
    where = "" if at is None else f" at {at.file}:{at.line} in {at.function}: {at.code}"
    return f"thread {thread.name!r}{where}"


def _warn(what: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{stamp} WARNING dtrain: {what}", file=sys.stderr, flush=True)
