"""How much the memory of a process grows during a call."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path


def in_use(field: str, pid: int | str = "self") -> int:
    """Return a field of a process's /proc/PID/status in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def growth(action: Callable[[], object]) -> int:
    """Return by how many bytes the memory of this process grew, at most, during a call."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the most ever in use
    except OSError:
        return _polled(action)
    before = in_use("VmRSS")
    action()
    return in_use("VmHWM") - before


def _polled(action: Callable[[], object]) -> int:
    before = most = in_use("RssAnon")
    over = threading.Event()

    def poll() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, in_use("RssAnon"))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        action()
    finally:
        over.set()
        thread.join()
    return most - before
