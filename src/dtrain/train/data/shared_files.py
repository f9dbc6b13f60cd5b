"""Files that a data set has opened before its loader processes were forked.

A forked process shares the position in such a file: where one seeks, another reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import stat
from typing import Any

from dtrain.errors import BlamedError
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.data.rng_state import held

Places = dict[int, tuple[str, int]]
"""Of each descriptor the file's path, and the position in it."""


def places() -> Places:
    """The files that this process has open to read. Costs 0.1 ms for 20 of them."""
    found: Places = {}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):  # closed since, as that of the listing
            writes = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
            if stat.S_ISREG(os.fstat(fd).st_mode) and not writes:
                path = os.readlink(f"/proc/self/fd/{fd}")
                found[fd] = path, os.lseek(fd, 0, os.SEEK_CUR)
    return found


def moved(before: Places, dataset: Any) -> list[str]:
    """Files in which somebody has moved who shares their position: of each a few words.

    Args:
        before: `places()`, when the other processes were not forked yet. This process must not
            have read since.
        dataset: who may hold them.
    """
    now = places()
    fds = [fd for fd, place in before.items() if now.get(fd, place) != place]
    names = {_fd(file): name for name, file in held(dataset, io.IOBase)} if fds else {}
    return [
        before[fd][0] + (f" (its attribute {names[fd]})" if fd in names else "")
        for fd in fds
        if now[fd][0] == before[fd][0]
    ]


def refuse(files: list[str], workers: int, ranks: RankInfo) -> None:
    """Make sure that loader processes share no position in a file; called by all ranks.

    Args:
        files: those in which loader processes of this rank share it.
        workers: loader processes of each rank.
        ranks: the place of this process.
    """
    everyone = collectives.gather_to_all(files)
    culprits = [rank for rank, theirs in enumerate(everyone) if theirs]
    if culprits:
        raise BlamedError(
            f"{workers} loader processes share the position in a file that train_dataset() has "
            f"opened: {everyone[culprits[0]][0]}\n"
            "each of them reads from where another has moved the position: open the file in "
            "__getitem__ when it is not yet open in this process, read it by np.memmap or "
            "os.pread, or set data.workers: 0",
            culprits,
            ranks.rank,
            code="data.file-position-shared",
        )


def _fd(file: io.IOBase) -> int:
    try:
        return file.fileno()
    except (OSError, ValueError):  # in memory, or closed
        return -1
