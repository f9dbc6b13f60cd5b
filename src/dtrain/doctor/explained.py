"""Explains an error by what a check measures on the node where it happened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

from dtrain.doctor.asked import open_files_limit
from dtrain.doctor.host import ENOUGH_SHM, LARGER_SHM, SHM, existing
from dtrain.run.failures import node_name
from dtrain.words import size

_NO_ROOM = "No space left on device"
_SHARED = re.compile(
    r"shared memory\(shm\)|</torch_|multiprocessing/(synchronize|shared_memory)\.py"
)
_BUS_ERROR = re.compile(r"\bSIGBUS\b|\bBus error\b")
_NO_FILES = re.compile(r"Too many open files|received \d+ items of ancdata")
"""The second is torch's: a descriptor that another process has sent could not be opened here."""
_FULL_BYTES = 16 << 20


def explain(text: str, directories: Iterable[Path] = ()) -> str:
    """Return what this host lacks, with the numbers, and what to do. Empty for other errors.

    Args:
        text: the message of an error, and the files of its traceback.
        directories: further directories to which the process may have written.
    """
    try:
        return _explained(text, directories)
    except OSError:  # the current directory is gone, for example
        return ""


def _explained(text: str, directories: Iterable[Path]) -> str:
    node = node_name()
    # with much room, a bus error has another cause, for example a file that was cut while mapped
    bus_error = _BUS_ERROR.search(text) and psutil.disk_usage(str(SHM)).free <= ENOUGH_SHM
    if bus_error or (_NO_ROOM in text and _SHARED.search(text)):
        return f"{of_shm(SHM)}: {LARGER_SHM}, or use fewer workers (data.workers)"
    if _NO_FILES.search(text):
        soft, hard = open_files_limit()
        return (
            f"a process on {node} may open {soft} files: raise the limit with "
            f"`ulimit -n {max(soft, min(65536, hard))}` before the launch, or use fewer workers"
        )
    if _NO_ROOM in text:
        # tempfile would look for another directory where that one is full
        places = (*directories, Path.cwd(), Path(os.environ.get("TMPDIR", "/tmp")))
        full = dict.fromkeys(filter(None, map(_if_full, places)))
        return f"on {node}, {', '.join(full)}: free space there" if full else ""
    return ""


def of_shm(directory: Path) -> str:
    """Return how much room the shared memory has now, as a sentence."""
    found = psutil.disk_usage(str(directory))
    return (
        f"loader processes send batches through {directory}, which on {node_name()} has "
        f"{size(found.free)} free of {size(found.total)} now"
    )


def _if_full(directory: Path) -> str:
    """Return how full the file system of a directory is; empty if it has room."""
    place = existing(directory)
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    has_inode = found.f_favail > 0 or not found.f_files
    if (free > _FULL_BYTES and has_inode) or not found.f_blocks:  # /proc has no blocks
        return ""
    total = size(found.f_blocks * found.f_frsize)
    return f"{place} has {size(free)} free of {total}{'' if has_inode else ', and no inode'}"
