"""Runs at a URL, and the directory of this host that holds their working copies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import RunNotFound
from dtrain.run import files, rundir
from dtrain.run.attempts import HEARTBEAT_S, Handle
from dtrain.run.remote.mirror import CODE, LAUNCH, LOGS, SNAPSHOT, Mirror, changed_at
from dtrain.run.remote.store import RemoteStore, RemoteStoreError
from dtrain.run.rundir import RunDir
from dtrain.waiting import repeating

STAGING = "DTRAIN_STAGING"
_OLD_S = 14 * 86400.0
_REFRESH_S, _PUSH_S = 2.0, 5.0


def staging(url: str) -> Path:
    """Return this host's directory for runs at a URL: `$DTRAIN_STAGING`, or in the user's cache."""
    root = os.environ.get(STAGING)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = re.sub(r"[^a-z0-9]+", "-", url.lower()).strip("-")[-40:]
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:8]
    return Path(root or os.path.join(cache, "dtrain", "runs")).absolute() / f"{name}-{digest}"


def create(run: RunDir, url: str) -> None:
    """Make a run's directory on this host: the copy that is ahead of the one at the URL.

    Raises:
        PlanError: the URL cannot be written to. The error gives the reason.
        LaunchError: the directory cannot be made.
    """
    RemoteStore(url.rpartition("/")[0]).check()
    _remove_old(run.path.parent)
    run.create()
    files.write_atomic(run.url_file, url, mode=0o600)


def claim(run: RunDir, path: Path) -> None:
    """Make a file of a run's directory at its URL, if it has one. Only one host can make it.

    Raises:
        FileExistsError: another host has made it.
        RemoteStoreError: the URL does not answer.
    """
    url = run.url
    if url is not None:
        RemoteStore(url).create_exclusive(str(path.relative_to(run.path)), path.read_bytes())


def release(run: RunDir, path: Path) -> None:
    """Remove a file of a run's directory at its URL, if it has one; the opposite of `claim`.

    Raises:
        RemoteStoreError: the URL does not answer.
    """
    url = run.url
    if url is not None:
        RemoteStore(url).remove(str(path.relative_to(run.path)))


def send_heartbeat(run: RunDir) -> None:
    """Show other hosts that a process holds a run, if it is kept at a URL.

    Raises:
        RemoteStoreError: the URL does not answer.
    """
    url = run.url
    if url is not None:
        Mirror(run, url).send_heartbeat()


def holder(run: RunDir, attempt: int) -> Handle | None:
    """Return the handle of the driver that claimed an attempt at a run's URL. None without one."""
    url = run.url
    data = None if url is None else RemoteStore(url).read(_handle_name(attempt))
    return None if data is None else _parse_handle(data, url)


def mark_unsynced(run: RunDir) -> None:
    """Record that the directory on this host is ahead of the copy at the URL, if there is one."""
    if run.url is not None:
        run.unsynced.touch()


def attach(run: RunDir, url: str) -> None:
    """Make a run's directory on a host that continues a run from elsewhere.

    Raises:
        PlanError: the URL cannot be written to. The error gives the reason.
    """
    RemoteStore(url.rpartition("/")[0]).check()
    files.write_atomic(run.url_file, url, mode=0o600)
    run.unsynced.touch()
    Mirror(run, url).pull(exclude=(*CODE, *LOGS))


def detach(run: RunDir) -> None:
    """Remove a run's directory from this host, unless parts of it are not yet at its URL."""
    if not run.unsynced.exists():
        shutil.rmtree(run.path, ignore_errors=True)


@contextlib.contextmanager
def syncing(
    run: RunDir,
    notify: Callable[[str], None],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Iterator[None]:
    """Copy new data of a run's directory to its URL, if it has one, within the `with` block.

    Args:
        run: the run.
        notify: called with a message when not everything could be copied in the end.
        include: patterns of the files that this process is responsible for. Without any, all.
        exclude: patterns of files that it is not responsible for.
    """
    url = run.url
    if url is None:
        yield
        return
    mirror = Mirror(run, url)
    heartbeat_at, failure = 0.0, ""

    def push() -> None:
        nonlocal heartbeat_at, failure
        try:
            if not include and time.monotonic() >= heartbeat_at:
                heartbeat_at = time.monotonic() + HEARTBEAT_S
                mirror.send_heartbeat()
            mirror.push(include, exclude)
            failure = ""
        except (RemoteStoreError, OSError) as error:
            failure = str(error)

    try:
        with repeating(push, _PUSH_S):
            yield
    finally:
        push()
        if failure:
            notify(f"not all files of the run were copied: {failure}; they are in {run.path}")
        else:
            _remove_large_files(run)


def download_code(run: RunDir) -> None:
    """Download the copies of a run's code to this host, if the run is kept at a URL."""
    url = run.url
    if url is not None:
        Mirror(run, url).pull(include=("code/tree-*.tar",))


def download_snapshot(run: RunDir) -> None:
    """Download the record of a run's code to this host, if the run is kept at a URL."""
    url = run.url
    if url is not None:
        Mirror(run, url).pull(include=SNAPSHOT)


def push(run: RunDir, include: Sequence[str] = ()) -> None:
    """Copy new data to a run's URL, if it has one. A URL that does not answer is ignored."""
    url = run.url
    if url is not None:
        with contextlib.suppress(RemoteStoreError):
            Mirror(run, url).push(include)


def fetch(url: str, name: str | None = None) -> Path:
    """Bring the records of runs at a URL to this host. Return the directory that holds them.

    Args:
        url: the URL of all runs.
        name: the id, the beginning of an id, or `last`. None means all runs, without their logs.

    Raises:
        PlanError: it is not a URL of runs.
        RunNotFound: it cannot be read.
    """
    folder = staging(url)
    try:
        jobs = RemoteStore(url).matching("*/resolved.yaml")  # written again by each attempt
        ids = {path.split("/")[0]: info for path, info in jobs.items()}
        for run_id in sorted(ids, key=lambda run_id: _time(ids[run_id])):
            if name is None or _matches(run_id, name, ids):
                _download(RunDir(folder / run_id), f"{url.rstrip('/')}/{run_id}", name is None)
    except RemoteStoreError as error:
        raise RunNotFound(str(error), code=error.code) from error
    for run in rundir.list_runs(folder):
        is_newer = run.unsynced.exists() or is_driven_here(run)
        if run.id not in ids and not is_newer:
            shutil.rmtree(run.path, ignore_errors=True)  # removed at the URL
    return folder


def refresher(run: RunDir) -> Callable[[], None]:
    """Return a function that brings new data of a run to this host, at a limited rate."""
    refreshed_at = time.monotonic()

    def refresh() -> None:
        nonlocal refreshed_at
        url = run.url
        if url is None or time.monotonic() - refreshed_at < _REFRESH_S:
            return
        with contextlib.suppress(RemoteStoreError):  # tried again later
            _download(run, url, False)
        refreshed_at = time.monotonic()

    return refresh


def is_driven_here(run: RunDir) -> bool:
    """Return whether a process of this host drives a run. Then the copy here is the newest."""
    handle = Handle.read(run)
    return handle is not None and handle.is_visible and handle.is_alive(run)


def _download(run: RunDir, url: str, without_logs: bool) -> None:
    if is_driven_here(run):
        return
    if run.unsynced.exists():  # its driver was killed before everything was written
        handle = Handle.read(run)
        if handle is not None and _is_newest_at(url, handle):
            Mirror(run, url).push(() if handle.job_id is None else LAUNCH)
        run.unsynced.unlink()
    run.create()
    files.write_atomic(run.url_file, url, mode=0o600)
    Mirror(run, url).pull(exclude=(*CODE, *LOGS) if without_logs else CODE)


def _is_newest_at(url: str, handle: Handle) -> bool:
    """Return whether no other host has begun the attempt of a handle, or a later one."""
    store = RemoteStore(url)
    begun = [int(name.split("/")[1]) for name in store.matching("attempts/*/handle.json")]
    if max(begun, default=-1) < handle.attempt:
        return True
    data = store.read(_handle_name(handle.attempt))
    is_same = data is not None and _parse_handle(data, url).identity == handle.identity
    return is_same and max(begun) == handle.attempt


def _parse_handle(data: bytes, url: str | None) -> Handle:
    return files.parse_as(Handle, data, f"a handle.json at {url}")


def _handle_name(attempt: int) -> str:
    return f"attempts/{attempt}/handle.json"


def _matches(run_id: str, name: str, ids: dict[str, Any]) -> bool:
    if name == "last":
        return run_id == max(ids, key=lambda each: _time(ids[each]))
    return run_id.startswith(name)


def _time(info: Any) -> float:
    return changed_at(info) or 0.0


def _remove_large_files(run: RunDir) -> None:
    """Remove large files: everything is at the URL."""
    run.unsynced.unlink(missing_ok=True)
    for path in (*run.checkpoints.glob("*"), *run.code.glob("tree-*"), *run.code.glob("job-*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove_old(folder: Path) -> None:
    """Remove runs that have not been used for weeks. They are at the URL."""
    for run in rundir.list_runs(folder):
        is_old = time.time() - run.path.stat().st_mtime > _OLD_S
        if is_old and not run.unsynced.exists() and not is_driven_here(run):
            shutil.rmtree(run.path, ignore_errors=True)
