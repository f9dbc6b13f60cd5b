"""What a script leaves running when its last line is done: Python waits for it, without a word."""

from __future__ import annotations

import sys
import threading
import time
import traceback

from dtrain.ranks import RankInfo
from dtrain.run.events import note_event
from dtrain.run.failures import Frame, users_own
from dtrain.run.rundir import RunDir

PATIENCE_S = 5.0
"""A thread that ends by itself soon is nothing to tell of."""


def wait_for_threads(run: RunDir) -> None:
    """Wait as an interpreter does at its end for all threads that are no daemons; say for which."""
    told = threading.Timer(PATIENCE_S, _tell, (run, RankInfo.from_env()))
    told.daemon = True
    told.start()
    threading._shutdown()  # type: ignore[attr-defined]
    told.cancel()


def _tell(run: RunDir, ranks: RankInfo) -> None:
    main = threading.main_thread()
    left = [each for each in threading.enumerate() if not each.daemon and each is not main]
    if not left:
        return
    what = f"rank {ranks.rank} is done but for {'; '.join(map(_place, left))}; the run waits for it"
    note_event(run, "threads_left", rank=ranks.rank, what=what)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{stamp} WARNING dtrain: {what}", file=sys.stderr, flush=True)


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
