"""Where lines for people go, and what happens when nobody takes them any more."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TextIO

from dtrain.errors import DtrainError, told

_STATE_COLOURS = {
    "running": "cyan",
    "succeeded": "green",
    "failed": "red",
    "lost": "red",
    "damaged": "red",
    "cancelled": "yellow",
}
"""A run's state → its colour; one that is only prepared has none."""
_COLOURS = {"dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_STDOUT = 1
_GONE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)


def on_terminal() -> bool:
    """Whether a person looks at what is printed."""
    return sys.stdout is not None and sys.stdout.isatty()


def width() -> int | None:
    """Columns of the terminal; None of a file or a pipe, which have no width."""
    return shutil.get_terminal_size().columns if on_terminal() else None


def paint(text: str, colour: str | None, stream: TextIO | None = None) -> str:
    """A text in a colour, on a terminal that shows colours and where NO_COLOR is not set.

    Args:
        text: what is printed.
        colour: of `_COLOURS`; None: none.
        stream: where it is printed; None: stdout.
    """
    if colour is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    is_shown = on_terminal() if stream is None else stream.isatty()
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if is_shown else text


def state(name: str) -> str:
    """The state of a run, in its colour."""
    return paint(name, _STATE_COLOURS.get(name))


def say(text: str) -> None:
    """Print a line, for who has more to do than to print; see `unless_gone`."""
    with unless_gone():
        print(text, flush=True)


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    """Print in here what may be lost: a training does not end because nobody reads on.

    When the console is gone or full, this and all that is printed later is dropped.
    """
    try:
        yield
    except OSError:
        give_up()


def give_up() -> None:
    """Let what is printed from now on, and what is in the buffers still, go nowhere."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, _STDOUT)
    os.close(sink)


def complain(error: DtrainError, command: str, *, as_json: bool) -> None:
    """Tell of an error on stderr.

    Args:
        error: that ends the command.
        command: its name, for the hint at its help; empty: none.
        as_json: one JSON object instead of lines.
    """
    lines = [_as_json(error) if as_json else told(error, _dim)]
    if error.code.startswith("usage.") and not as_json:
        lines.append(f"see: {' '.join(['dtrain', *command.split(), '--help'])}")
    with contextlib.suppress(OSError):  # stderr may be gone as well
        print("\n".join(lines), file=sys.stderr, flush=True)


def _dim(text: str) -> str:
    return paint(text, "dim", sys.stderr)


def _as_json(error: DtrainError) -> str:
    from dtrain.plainjson import to_json

    names = ("code", "file", "line", "column", "field", "message")
    problems = [{name: getattr(each, name) for name in names} for each in error.problems]
    about = {"code": error.code, "message": str(error), "exit_code": error.exit_code}
    return to_json({"error": {**about, "problems": problems}})


def is_gone(error: OSError) -> bool:
    """Whether an error is of the console, which has no name, and not of a file."""
    return error.filename is None and error.errno in _GONE


def prepare() -> None:
    """Let anything be printed, wherever we were started.

    What was closed goes nowhere, and is no descriptor that a file of ours would get, and that
    what we start takes for its own stdin. A character that a console does not have is escaped.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
        if getattr(sys, name) is None and fd:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for ever
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
