"""Reading and writing the files of a run directory. A damaged file is named and affects no other.

The files are written atomically (see `write_atomic`), but disks, users and other programs change
them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dtrain.errors import DamagedError, shortened
from dtrain.plainjson import to_json

Shape = TypeVar("Shape")

_MOST_BYTES = 64 << 20


def read_text(path: Path) -> str | None:
    """Return the text of a file in UTF-8. None when there is no such file.

    Raises:
        DamagedError: it is not a text file, or has more than 64 MiB.
    """
    file = _open(path)
    if file is None:
        return None
    with file:
        if os.fstat(file.fileno()).st_size > _MOST_BYTES:
            raise DamagedError(str(path), f"it has more than {_MOST_BYTES >> 20} MiB")
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise DamagedError(str(path), f"it is not text in UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """Return the JSON in a file, which is not null. None when there is no such file.

    Raises:
        DamagedError: it is not valid JSON.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DamagedError(str(path), f"it is not valid JSON: {shortened(why, 300)}") from None
    if value is None:
        raise DamagedError(str(path), "it contains only null")
    return value


def read_as(shape: type[Shape], path: Path) -> Shape | None:
    """Return the content of a JSON file, of a certain shape. None when there is no such file.

    Args:
        shape: a dataclass, or a type, for example `dict[str, str]`.
        path: the path of the file.

    Raises:
        DamagedError: it holds something else.
    """
    text = read_text(path)
    return None if text is None else parse_as(shape, text, str(path))


def parse_as(shape: type[Shape], text: str | bytes, where: str) -> Shape:
    """Return the content of a JSON text from `where`, of a certain shape, with all types checked.

    Raises:
        DamagedError: it holds something else. The error names the part.
    """
    from dtrain import checked  # this imports pydantic: too slow for `dtrain --help`

    try:
        return checked.read(shape, text)
    except ValueError as error:
        raise DamagedError(where, shortened(str(error), 300)) from None


def read_lines(path: Path, **fields: type) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a .jsonl file, one per line.

    A line is skipped if a kill has cut it short, or if it lacks one of `fields` or has it with
    another type. The other lines remain valid.
    """
    file = _open(path)
    if file is None:
        return
    with file:
        yield from _parsed(file, fields)


def read_newest_lines(
    path: Path, most_bytes: int, marks: Sequence[bytes], **fields: type
) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects at the end of a .jsonl file, as `read_lines` does.

    To parse a line takes a hundred times longer than to read it.

    Args:
        path: the path of the file.
        most_bytes: the most bytes of its end that are parsed.
        marks: before these, the newest earlier line that contains a mark is yielded too, for each
            mark that the end does not contain.
        fields: as for `read_lines`.
    """
    file = _open(path)
    if file is None:
        return
    with file:
        data = file.read()  # a memory map would end this process if the file was truncated
    start = data.find(b"\n", len(data) - most_bytes) + 1 if len(data) > most_bytes else 0
    for mark in marks:
        at = -1 if data.find(mark, start) >= 0 else data.rfind(mark, 0, start)
        if at >= 0:
            first, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
            yield from _parsed([data[first:end]], fields)
    yield from _parsed(data[start:].splitlines(), fields)


def _parsed(lines: Iterable[bytes], fields: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    wanted = tuple(fields.items())
    for line in lines:
        value = parse_line(line)
        if value is None:
            continue
        for name, kind in wanted:
            found = type(value.get(name))
            if found is not kind and not (kind is float and found is int):
                break
        else:
            yield value


def parse_line(line: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object of one line. None when it is not one, for example a truncated line."""
    try:
        value = _fast_json()(line)
    except ValueError:  # also for one half of a surrogate, which json accepts
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


@functools.cache
def _fast_json() -> Callable[[str | bytes], Any]:
    """Return pydantic's parser, which is 3 times as fast as json. Its import takes 20 ms."""
    from pydantic_core import from_json

    return from_json


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank. Empty where there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    except OSError:
        return ""


def local_time(seconds: float) -> str:
    """Format seconds since the epoch as local time, or `?` for a value that is no valid time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


def duration(seconds: float) -> str:
    """Format seconds for people: `0:01:05`, `2 days, 3:00:00`."""
    try:
        return str(timedelta(seconds=round(max(0.0, seconds))))
    except (OverflowError, ValueError):
        return "?"


def _open(path: Path) -> BinaryIO | None:
    """Open a regular file. A pipe at this path would block for ever."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
        raise DamagedError(str(path), str(error.strerror)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamagedError(str(path), "it is not a regular file")
    return os.fdopen(fd, "rb")


def write_atomic(path: Path, data: str | bytes, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash, sees the old file or the new one, never a part.

    It is written under a temporary name in the same directory, fsynced and renamed. Then the
    directory is fsynced.
    """
    with replacing(path, mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Yield a file to write that becomes `path` at the end, as in `write_atomic`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def create_exclusive(path: Path, data: str | bytes, mode: int = 0o644) -> bool:
    """Write a file that only one process can make. Return whether it was this process."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    make_parent(path)
    write_atomic(temporary, data, mode)
    try:
        os.link(temporary, path)  # a rename would replace what another process has just written
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and then finds its own file
        return os.stat(temporary).st_nlink == 2
    finally:
        temporary.unlink()
    fsync_dir(path.parent)
    return True


def fsync_dir(path: Path) -> None:
    """Make renames inside a directory survive a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_parent(path: Path) -> None:
    """Make the parent directory of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. A missing directory is made."""
    make_parent(path)
    write_atomic(path, to_json(value, indent=2) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Append one JSON object as one line, in one write, so that lines never interleave."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, to_json(value).encode() + b"\n")
    finally:
        os.close(fd)
