"""Output for people, and its handling when no reader is left."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TextIO

from dtrain.errors import DtrainError, format_error

_STATE_COLOURS = {
    "running": "cyan",
    "succeeded": "green",
    "failed": "red",
    "lost": "red",
    "damaged": "red",
    "cancelled": "yellow",
}
"""The colour of each state of a run. A run that is only prepared has none."""
_COLOURS = {"dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_STDOUT = 1
_GONE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)


def on_terminal() -> bool:
    """Return whether the output goes to a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def width() -> int | None:
    """Return the columns of the terminal. None for a file or a pipe, which have no width."""
    return shutil.get_terminal_size().columns if on_terminal() else None


def paint(text: str, colour: str | None, stream: TextIO | None = None) -> str:
    """Return a text in a colour, on a terminal that shows colours and if NO_COLOR is not set.

    Args:
        text: the text.
        colour: a colour of `_COLOURS`. None means none.
        stream: the stream where it is printed. None means stdout.
    """
    if colour is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    is_shown = on_terminal() if stream is None else stream.isatty()
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if is_shown else text


def state(name: str) -> str:
    """Return the state of a run, in its colour."""
    return paint(name, _STATE_COLOURS.get(name))


def say(text: str) -> None:
    """Print a line, for a caller that must continue even if this fails. See `unless_gone`."""
    with unless_gone():
        print(text, flush=True)


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    """Allow output within the `with` block to be lost, so that a training never ends because of it.

    When the console is gone or full, this output and all later output is dropped.
    """
    try:
        yield
    except OSError:
        give_up()


def give_up() -> None:
    """Discard all further output, and the present content of the buffers."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, _STDOUT)
    os.close(sink)


def complain(error: DtrainError, command: str, *, as_json: bool) -> None:
    """Print an error to stderr.

    Args:
        error: the error that ends the command.
        command: the command's name, for the hint at its help. Empty for no hint.
        as_json: whether to print one JSON object instead of lines.
    """
    lines = [_as_json(error) if as_json else format_error(error, _dim)]
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
    """Return whether an error is of the console, which has no name, and not of a file."""
    return error.filename is None and error.errno in _GONE


def prepare() -> None:
    """Make all output possible, independent of how this process was started.

    A closed descriptor is replaced by /dev/null. Otherwise a file of dtrain would get its number,
    and a child process would take that file for its own stdin. A character that the console does
    not have is escaped.
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
