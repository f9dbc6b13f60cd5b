"""Keys that are read one by one, without Enter."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
import tty
from collections.abc import Iterator

_KEY = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
_NAMES = {
    "\x1b[A": "up",
    "\x1bOA": "up",
    "k": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "j": "down",
}


@contextlib.contextmanager
def single_keys() -> Iterator[None]:
    """Read keys one by one in the `with` block. After it, the terminal is as before."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def pressed(timeout_s: float) -> list[str]:
    """Return the keys pressed by then, as soon as there is one: a letter, `up` or `down`."""
    fd = sys.stdin.fileno()
    if not select.select([fd], [], [], timeout_s)[0]:
        return []
    text = os.read(fd, 1024).decode(errors="replace")
    return [_NAMES.get(key, key) for key in _KEY.findall(text or "q")]  # "" is the input's end
