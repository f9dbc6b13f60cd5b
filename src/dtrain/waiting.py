"""Waiting for something, and doing something again and again meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Found = TypeVar("Found")


def poll(
    look: Callable[[], Found],
    timeout_s: float,
    pause_s: float = 0.05,
    longest_pause_s: float | None = None,
) -> Found:
    """Call `look` until it finds something; what it found last, when the time is up.

    Args:
        look: what it returns is taken for found when it is true.
        timeout_s: how long to wait.
        pause_s: between two looks.
        longest_pause_s: to which pauses grow; None: they do not.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(pause_s)
        if longest_pause_s is not None:
            pause_s = min(pause_s * 1.2, longest_pause_s)
    return found


@contextlib.contextmanager
def repeating(action: Callable[[], object], pause_s: float) -> Iterator[None]:
    """While it lasts, call `action` from a thread: at once, and after each pause."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            action()
            ended.wait(pause_s)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
