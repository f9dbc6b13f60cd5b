"""Files of a run's directory, read so that a damaged one is named and stops nothing else.

They are written whole (see `files.write_atomic`), but disks, hands and other programs change them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dtrain.errors import DamagedError, shortened
from dtrain.plainjson import to_json

Shape = TypeVar("Shape")

_MOST_BYTES = 64 << 20


def read_text(path: Path) -> str | None:
    """The text of a file in UTF-8; None when there is no such file.

    Raises:
        DamagedError: it is no file with text, or has more than 64 MiB.
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
            raise DamagedError(str(path), f"it is no text in UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """The JSON in a file, which is not null; None when there is no such file.

    Raises:
        DamagedError: it holds no JSON.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise DamagedError(str(path), f"it holds no JSON: {shortened(why, 300)}") from None
    if value is None:
        raise DamagedError(str(path), "it holds only null")
    return value


def read_as(shape: type[Shape], path: Path) -> Shape | None:
    """What a JSON file holds, of a certain shape; None when there is no such file.

    Args:
        shape: a dataclass, or a type as `dict[str, str]`.
        path: of the file.

    Raises:
        DamagedError: it holds something else.
    """
    text = read_text(path)
    return None if text is None else parse_as(shape, text, str(path))


def parse_as(shape: type[Shape], text: str | bytes, where: str) -> Shape:
    """What a JSON text from `where` holds, of a certain shape, with all types in it checked.

    Raises:
        DamagedError: it holds something else; says which part of it.
    """
    from dtrain import checked  # which imports pydantic: not for `dtrain --help`

    try:
        return checked.read(shape, text)
    except ValueError as error:
        raise DamagedError(where, shortened(str(error), 300)) from None


def read_lines(path: Path, **fields: type) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file, one a line.

    A line that a kill has cut short, or that lacks one of `fields` or has it of another type, is
    passed over: what the others say holds.
    """
    file = _open(path)
    if file is None:
        return
    with file:
        for line in file:
            value = parse_line(line)
            if value is not None and all(_is(value.get(n), kind) for n, kind in fields.items()):
                yield value


def parse_line(line: str | bytes) -> dict[str, Any] | None:
    """The JSON object of one line; None when it is none, as when it was cut short."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def last_line(log: Path) -> str:
    """The last line of a log that says something; empty where there is none."""
    try:
        return log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    except OSError:
        return ""


def local_time(seconds: float) -> str:
    """Seconds since the epoch as people write them; `?` for what no clock has shown."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "?"


def duration(seconds: float) -> str:
    """Seconds as people read them: `0:01:05`, `2 days, 3:00:00`."""
    try:
        return str(timedelta(seconds=round(max(0.0, seconds))))
    except (OverflowError, ValueError):
        return "?"


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _open(path: Path) -> BinaryIO | None:
    """Open a regular file; a pipe in its place would be waited for, for ever."""
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
        raise DamagedError(str(path), "it is no regular file")
    return os.fdopen(fd, "rb")


def write_atomic(path: Path, data: str | bytes, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one, never a part.

    Written aside in the same folder, fsynced, renamed, and the folder fsynced.
    """
    with replacing(path, mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, as `write_atomic` does it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    fsync_dir(path.parent)


def make_once(path: Path, data: str | bytes, mode: int = 0o644) -> bool:
    """Write a file that only one process can make; whether it was this one."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    make_parent(path)
    write_atomic(aside, data, mode)
    try:
        os.link(aside, path)  # a rename would replace what another has just written
    except FileExistsError:
        # NFS sends a request again whose answer was lost, and then finds what it has made
        return os.stat(aside).st_nlink == 2
    finally:
        aside.unlink()
    fsync_dir(path.parent)
    return True


def fsync_dir(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_parent(path: Path) -> None:
    """Make the folder that a file will be in."""
    path.parent.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; the folder is made when it is missing."""
    make_parent(path)
    write_atomic(path, to_json(value, indent=2) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Append one JSON object as one line, in one write, so that lines never interleave."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, to_json(value).encode() + b"\n")
    finally:
        os.close(fd)
