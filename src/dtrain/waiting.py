"""Loops that wait for a result or repeat an action."""

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
    """Call `look` until it returns something true or the time is up; return its last result.

    Args:
        look: the function to call.
        timeout_s: how long to wait.
        pause_s: the pause between two calls.
        longest_pause_s: the limit to which pauses grow; None means that they do not grow.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(pause_s)
        if longest_pause_s is not None:
            pause_s = min(pause_s * 1.2, longest_pause_s)
    return found


@contextlib.contextmanager
def repeating(action: Callable[[], object], pause_s: float) -> Iterator[None]:
    """Call `action` from a thread while the context lasts: at once, and after each pause."""
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
