"""Find a run by the name that a person gives it, in a folder or at a URL."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.run.rundir import RunDir


def find(name: str, runs: str) -> RunDir:
    """The run that a person named.

    Args:
        name: what they wrote.
        runs: folder or URL of all runs.

    Raises:
        RunNotFound: there is none.
    """
    from dtrain.run.remote.store import is_url

    return find_run(name, here(runs, name), runs if is_url(runs) else "")


def place_of_runs(runs: str | os.PathLike[str] | None = None) -> str:
    """The folder or URL of all runs; where a program names none, the command line's."""
    return os.environ.get("DTRAIN_RUNS", "runs") if runs is None else os.fspath(runs)


def here(runs: str, name: str | None = None) -> str:
    """The folder of all runs; of runs at a URL, one of this host with what is new of them.

    Args:
        runs: folder or URL.
        name: of the run that is meant; None: all, without their logs.
    """
    from dtrain.run.remote.store import is_url

    if not is_url(runs):
        return runs
    from dtrain.run.remote.runs import fetch

    return str(fetch(runs, name))


def find_run(name: str, root: str | os.PathLike[str], shown: str = "") -> RunDir:
    """The run of that id, path, unique prefix, or the newest one for `last`.

    Args:
        name: what a person wrote.
        root: folder of all runs.
        shown: how a person calls it, when that is not its path.

    Raises:
        RunNotFound: none, or more than one, answers to the name.
    """
    from dtrain.errors import RunNotFound, quoted
    from dtrain.run.rundir import RunDir, list_runs

    if not name:  # as of a variable of the shell that is not set: it would be any run's beginning
        raise RunNotFound(
            "RUN is empty; it is an id, the beginning of one, or `last`", code="run.empty-name"
        )
    with contextlib.suppress(OSError):  # too long for a path
        if os.sep in name and (Path(name) / "resolved.yaml").is_file():
            return RunDir(name)
    runs, where = list_runs(root), shown or str(Path(root).absolute())
    if not runs:
        raise RunNotFound(f"no runs in {where}; say where with --runs DIR", code="run.no-runs")
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
            f"{quoted(name)} could be any of {len(matches)} runs: {listed}", code="run.ambiguous"
        )
    raise RunNotFound(
        f"no run {quoted(name)} in {where}; `dtrain runs` lists them", code="run.not-found"
    )


def attempt_of(run: RunDir, number: int | None) -> int:
    """The number of an attempt that a person named; None is the newest.

    Raises:
        RunNotFound: the run has no such attempt; says which it has.
    """
    from dtrain.errors import RunNotFound
    from dtrain.words import numbered

    there = run.attempts()
    if number in there:
        return number
    if number is None and there:
        return there[-1]
    has = numbered("attempt", there) if there else "no attempt yet"
    text = f"run {run.id} has no attempt {number or 0}; it has {has}"
    raise RunNotFound(text, code="run.no-such-attempt")
