"""Find a run by the name that a user gives, in a directory or at a URL."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.run.rundir import RunDir


def find(name: str, runs: str) -> RunDir:
    """Return the run that a user named.

    Args:
        name: the name that the user wrote.
        runs: the directory or URL of all runs.

    Raises:
        RunNotFound: there is no such run.
    """
    from dtrain.run.remote.store import is_url

    return find_run(name, local_directory(runs, name), runs if is_url(runs) else "")


def runs_location(runs: str | os.PathLike[str] | None = None) -> str:
    """Return the directory or URL of all runs. By default it is that of the command line."""
    return os.environ.get("DTRAIN_RUNS", "runs") if runs is None else os.fspath(runs)


def local_directory(runs: str, name: str | None = None) -> str:
    """Return the directory of all runs. For runs at a URL, it is an updated one of this host.

    Args:
        runs: the directory or URL.
        name: the name of the wanted run. None means all runs, without their logs.
    """
    from dtrain.run.remote.store import is_url

    if not is_url(runs):
        return runs
    from dtrain.run.remote.runs import fetch

    return str(fetch(runs, name))


def find_run(name: str, root: str | os.PathLike[str], shown: str = "") -> RunDir:
    """Return the run of that id, path or unique prefix, or the newest one for `last`.

    Args:
        name: the name that the user wrote.
        root: the directory of all runs.
        shown: the user's name for that directory, when it is not its path.

    Raises:
        RunNotFound: no run, or more than one, matches the name.
    """
    from dtrain.errors import RunNotFound, quoted
    from dtrain.run.rundir import RunDir, list_runs

    if not name:  # for example an unset shell variable: it would match every run
        raise RunNotFound(
            "RUN is empty; give an id, the beginning of one, or `last`", code="run.empty-name"
        )
    with contextlib.suppress(OSError):  # too long for a path
        if os.sep in name and (Path(name) / "resolved.yaml").is_file():
            return RunDir(name)
    runs, where = list_runs(root), shown or str(Path(root).absolute())
    if not runs:
        raise RunNotFound(
            f"no runs in {where}; give their directory with --runs", code="run.no-runs"
        )
    if name == "last":
        # started last, not made last: a resumed run is the newest again
        return max(runs, key=lambda run: run.resolved.stat().st_mtime_ns)
    matches = [run for run in runs if run.id == name] or [
        run for run in runs if run.id.startswith(name)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(run.id for run in matches[:6])
        raise RunNotFound(
            f"{quoted(name)} matches {len(matches)} runs: {listed}", code="run.ambiguous"
        )
    raise RunNotFound(
        f"no run {quoted(name)} in {where}; `dtrain runs` lists them", code="run.not-found"
    )


def attempt_of(run: RunDir, number: int | None) -> int:
    """Return the number of an attempt that a user named. None means the newest.

    Raises:
        RunNotFound: the run has no such attempt. The error lists its attempts.
    """
    from dtrain.errors import RunNotFound
    from dtrain.words import numbered

    known = run.attempts()
    if number in known:
        return number
    if number is None and known:
        return known[-1]
    listed = numbered("attempt", known) if known else "no attempt yet"
    text = f"run {run.id} has no attempt {number or 0}; it has {listed}"
    raise RunNotFound(text, code="run.no-such-attempt")
