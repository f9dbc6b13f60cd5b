"""Where failure records go when the run directory's disk is full, the likeliest cause."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from hashlib import blake2b
from pathlib import Path

from dtrain.run.rundir import RunDir


def folder(run: RunDir, attempt: int) -> Path | None:
    """The folder of an attempt on this host; None where there is none of our own.

    Any account may make one of that name: what another can write to is not believed.
    """
    path = _path(run, attempt)
    try:
        found = path.lstat()
    except OSError:
        return None
    others_can = found.st_mode & 0o077
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others_can
    return path if is_ours else None


def made(run: RunDir, attempt: int) -> Path:
    """The folder, made when it is missing.

    Raises:
        OSError: it cannot be, or another account has made it.
    """
    _path(run, attempt).mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder(run, attempt)
    if found is None:
        raise PermissionError(f"{_path(run, attempt)} is not ours")
    return found


def remove(run: RunDir, attempt: int) -> None:
    """Remove the folder, if there is one of our own."""
    found = folder(run, attempt)
    if found is not None:
        shutil.rmtree(found, ignore_errors=True)


def _path(run: RunDir, attempt: int) -> Path:
    place = blake2b(os.path.realpath(run.attempt(attempt)).encode(), digest_size=16)
    return Path(tempfile.gettempdir()) / f"dtrain-failures-{os.getuid()}-{place.hexdigest()}"
