"""Running a script in a worker, as `python train.py` under torchrun would."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from dtrain import procs
from dtrain.integrations.script.placement import RUN_VARIABLE
from dtrain.integrations.script.threads import wait_for_threads
from dtrain.run.failures import Frame, user_frames
from dtrain.run.rundir import RunDir


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
    wait_for_threads(run)  # os._exit, which follows, would not
