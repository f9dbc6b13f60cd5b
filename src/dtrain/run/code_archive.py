"""The code of a run as one file, for hosts that do not see the directory where it was written."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from dtrain.errors import PlanError
from dtrain.run import files, snapshot
from dtrain.run.rundir import RunDir

_SHOWN = 3


def pack(run: RunDir, attempt: int, limit: int, excludes: Sequence[str]) -> Path:
    """Pack the copy of the code that `snapshot.copy_tree` has made, and return the file's path.

    Args:
        run: the run whose code is packed.
        attempt: the attempt that begins.
        limit: the most bytes that may be sent.
        excludes: patterns of files that are not sent.

    Raises:
        PlanError: the code is larger than the limit. The error names the largest files.
        OSError: the file cannot be written.
    """
    tree = run.code_tree(attempt)
    check_size(tree, limit, excludes)
    target = run.code_tar(attempt)
    with (
        files.replacing(target) as file,
        tarfile.open(fileobj=file, mode="w", dereference=True) as archive,
    ):
        for path in sorted(tree.rglob("*")):
            if path.is_file() or (path.is_dir() and not path.is_symlink()):
                archive.add(path, str(path.relative_to(run.code)), recursive=False)
        job = tarfile.TarInfo(run.job_code(attempt).name)
        job.type = tarfile.SYMTYPE
        job.linkname = os.readlink(run.job_code(attempt))
        archive.addfile(job)
    return target


def unpack(run: RunDir) -> Path | None:
    """Unpack the newest file of `pack` in a run.

    Return the job's directory, or None without a file.
    """
    archives = sorted(run.code.glob("tree-*.tar"), key=lambda path: int(path.stem.split("-")[1]))
    if not archives:
        return None
    # outside the runs directory, which every snapshot skips
    folder = run.path.parent.with_name(f"{run.path.parent.name}.code") / run.id
    shutil.rmtree(folder, ignore_errors=True)
    snapshot.make_private(folder)
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(folder)
    return (folder / archives[-1].stem.replace("tree-", "job-")).resolve()


def check_size(tree: Path, limit: int, excludes: Sequence[str]) -> None:
    """Check that a copy of the code is small enough to send, and remove excluded files from it.

    Raises:
        PlanError: the code is larger than the limit. The error names the largest files.
    """
    sizes: dict[str, int] = {}
    for here, _, names in os.walk(tree):
        for name in names:
            path = Path(here, name)
            inside = str(path.relative_to(tree))
            if any(fnmatch(inside, pattern) for pattern in excludes):
                path.unlink()  # it is dtrain's copy, or a link
            elif path.exists():
                sizes[inside] = path.stat().st_size
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:_SHOWN]
        listed = ", ".join(f"{name} ({_mib(size)})" for name, size in largest)
        raise PlanError(
            f"the code of the job is {_mib(total)}, more than is sent to Ray's nodes "
            f"(upload_limit: {_mib(limit)}); largest: {listed}; keep data elsewhere, or exclude "
            "it with option excludes",
            code="ray.code-too-large",
        )


def _mib(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"
