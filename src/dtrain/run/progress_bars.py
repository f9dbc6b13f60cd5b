r"""Progress bars that redraw a line with `\r`, like those of tqdm, in the log of a rank.

A log gets a bar once, as it looked in the end. The present state is in a small file beside the log,
from which a terminal shows it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
from pathlib import Path

_LIVE_BYTES = 1024
_MOST_ROWS = 20
_MOST_COLUMNS = 4096
_TOKEN = re.compile(r"\r|\n|\x08|\x1b\[[0-9;?]*[A-Za-z]|[^\r\n\x08\x1b]+|\x1b")
_REDRAWS = re.compile(r"[\r\x08]|\x1b\[\d*[AF]")
"""What moves the cursor back to text that is already there."""
_MOVES_UP = re.compile(r"\x1b\[\d*[AF]")


class Screen:
    """The lines at the bottom of a terminal that a program may still change.

    A line is finished, and returned for the log, when the program will hardly change it again:
    another text follows it, or the cursor comes back to a line below it. Programs with several bars
    (tqdm's nested bars) return to the first of them after each redraw.

    Several streams may write to one screen, each with plain text of its own.
    """

    def __init__(self) -> None:
        self._rows: list[str] = []
        """The lines that may still change. Empty while the program only writes plain text."""
        self._row = self._column = 0
        self._has_moved = False
        """Whether the cursor has come to its row since the row was last redrawn."""
        self._partial: dict[str, str] = {}
        """Each stream's plain text without its end. It is returned at a line's end, or by
        `flush`."""
        self._is_open = False
        """Whether the last text that was returned has no line end yet."""

    @property
    def live(self) -> str:
        """Return the lines that may still change, without empty ones."""
        return "\n".join(row.rstrip() for row in self._rows if row.strip())

    def feed(self, text: str, stream: str = "") -> str:
        """Take in what the program writes to a stream, and return what belongs into the log now."""
        text = text.replace("\r\n", "\n")
        if not text:
            return ""
        if not self._rows:
            redraw = _REDRAWS.search(text)
            if redraw is None:
                return self._plain(text, stream)
            begin = text.rfind("\n", 0, redraw.start()) + 1
            before = self._plain(text[:begin], stream)
            self._rows, self._row = [""], 0
            drawn = self._partial.pop(stream, "")
            return before + self._ended() + self._draw(drawn + text[begin:])
        is_in_line = self._is_open or stream in self._partial
        if is_in_line and text.startswith("\n"):  # print() writes the end of its line separately
            return self._plain("\n", stream) + self.feed(text[1:], stream)
        if self._is_drawn(text):
            return self._draw(text)
        above = "" if self._rows[self._row].strip() or self._are_cleared() else self.finish()
        return above + self._plain(text, stream)

    def flush(self, stream: str = "") -> str:
        """Return a stream's plain text that has no end yet."""
        text = self._partial.pop(stream, "")
        self._is_open = bool(text) or self._is_open
        return text

    def finish(self) -> str:
        """Return all lines, because the program can no longer change them."""
        kept = [row.rstrip() for row in self._rows]
        self._rows, self._row, self._column = [], 0, 0
        text = "".join(f"{row}\n" for row in kept if row)
        return (self._ended() if text else "") + text

    def _is_drawn(self, text: str) -> bool:
        """Return whether a text changes the lines here. Otherwise it is a print in between."""
        if text[0] in "\r\n\x08\x1b" or _REDRAWS.search(text):
            return True
        has_returned = self._column == 0 and not self._has_moved
        return has_returned and bool(self._rows[self._row].strip())

    def _are_cleared(self) -> bool:
        """Return whether there are several bars, cleared for a text that comes above them."""
        return len(self._rows) > 1 and not self.live

    def _plain(self, text: str, stream: str) -> str:
        whole, newline, rest = text.rpartition("\n")
        before = self._partial.pop(stream, "")
        done = before + whole + newline if newline else ""
        if kept := rest if newline else before + rest:
            self._partial[stream] = kept
        if done:
            self._is_open = False
        return done

    def _ended(self) -> str:
        """Return the end of a line that the log has only in part."""
        was_open, self._is_open = self._is_open, False
        return "\n" if was_open else ""

    def _draw(self, text: str) -> str:
        finished = ""
        for token in _TOKEN.findall(text):
            if token == "\n":
                self._move(1)
                self._column = 0
            elif token == "\r":
                if not self._has_moved and self._rows[self._row].strip():
                    finished += self._finish_above()
                self._column, self._has_moved = 0, False
            elif token == "\x08":
                self._column = max(0, self._column - 1)
            elif token.startswith("\x1b"):
                self._control(token)
            else:
                self._put(token)
        if _MOVES_UP.search(text) or len(self._rows) > _MOST_ROWS:
            finished += self._finish_above()
        return finished

    def _control(self, token: str) -> None:
        count = int(token[2:-1]) if token[2:-1].isdecimal() else 1
        row = self._rows[self._row]
        if token[-1] in "AF":
            self._move(-count)
        elif token[-1] in "BE":
            self._move(count)
        elif token[-1] == "K":
            self._rows[self._row] = "" if token == "\x1b[2K" else row[: self._column]
        if token[-1] in "EF":
            self._column = 0

    def _put(self, text: str) -> None:
        """Write at the cursor. The rest of the row goes: bars rewrite a line as a whole.

        Where they do not know the width (tqdm in a file), they leave parts of a longer text behind.
        """
        row = self._rows[self._row].ljust(self._column)[: self._column]
        self._rows[self._row] = (row + text)[:_MOST_COLUMNS]
        self._column = len(self._rows[self._row])

    def _move(self, count: int) -> None:
        self._row = max(0, min(self._row + count, self._row + _MOST_ROWS))
        self._rows += [""] * (self._row + 1 - len(self._rows))
        self._has_moved = True

    def _finish_above(self) -> str:
        above, self._rows = self._rows[: self._row], self._rows[self._row :]
        self._row = 0
        return "".join(f"{row.rstrip()}\n" for row in above if row.strip())


_LOCK = threading.RLock()
"""The lock of both streams of a process, which share a screen."""


def _renew_lock() -> None:
    global _LOCK
    _LOCK = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread may hold it now


class BarStream(io.TextIOWrapper):
    """A text stream into a rank's log, in which a progress bar is one line.

    Args:
        stream: the stream that it replaces.
        log: the log.
        beside: another stream into the log. On a terminal, they would share the screen.
    """

    def __init__(
        self, stream: io.TextIOWrapper, log: Path, beside: BarStream | None = None
    ) -> None:
        # Printing a name must not end a training where the locale is not UTF-8.
        super().__init__(stream.buffer, stream.encoding, "backslashreplace", line_buffering=True)
        self._screen: Screen = Screen() if beside is None else beside._screen
        self._live: _LiveFile = _LiveFile(log) if beside is None else beside._live

    def write(self, text: str) -> int:
        with _LOCK:
            done = self._screen.feed(text, self.name)
            if done:
                super().write(done)
            self._live.show(self._screen.live)
        return len(text)

    def flush(self) -> None:
        with _LOCK:
            if rest := self._screen.flush(self.name):
                super().write(rest)
            super().flush()

    def finish(self) -> None:
        """Write the bars as they look now, because the process ends."""
        with _LOCK:
            if rest := self._screen.finish() + self._screen.flush(self.name):
                super().write(rest)
            super().flush()
            self._live.show("")


def replace_streams(log: Path) -> tuple[BarStream, BarStream]:
    """Replace stdout and stderr of this process, which go into a rank's log."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    assert isinstance(sys.stderr, io.TextIOWrapper)
    stdout = BarStream(sys.stdout, log)
    stderr = BarStream(sys.stderr, log, beside=stdout)
    sys.stdout, sys.stderr = stdout, stderr
    return stdout, stderr


def live_file(log: Path) -> Path:
    """Return the file with the bars that a rank is drawing. It has one only while it does."""
    return log.with_suffix(".bar")


def live(log: Path) -> str:
    """Return the bars that a rank is drawing, one on each line. Empty if there are none."""
    try:
        return live_file(log).read_text(encoding="utf-8", errors="replace").rstrip()
    except OSError:
        return ""


def settle(log: Path) -> None:
    """Write the bars of a rank that has been killed into its log."""
    if text := live(log):
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
    with contextlib.suppress(OSError):
        live_file(log).unlink(missing_ok=True)


class _LiveFile:
    def __init__(self, log: Path) -> None:
        self._path = live_file(log)
        self._fd: int | None = None
        self._shown = ""

    def show(self, text: str) -> None:
        """Replace the content. This takes some microseconds; tqdm redraws ten times a second."""
        if text == self._shown:
            return
        self._shown = text
        with contextlib.suppress(OSError):  # a full disk must not end the training
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._fd, text.encode(errors="replace")[:_LIVE_BYTES].ljust(_LIVE_BYTES), 0)
            os.ftruncate(self._fd, _LIVE_BYTES if text else 0)
