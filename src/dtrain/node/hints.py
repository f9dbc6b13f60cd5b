"""Remedies for errors caused by the launch: the worker's location, and what it lacks."""

from __future__ import annotations

import ast
import os
import re
import sys
import traceback
from bdb import BdbQuit
from pathlib import Path
from typing import TypeGuard

from dtrain import catalog
from dtrain.job.static_source import relative_import_advice
from dtrain.run import files
from dtrain.run.failures import Frame, OtherProcessError
from dtrain.run.rundir import RunDir

_MISSING_FILE = re.compile(r"No such file or directory: '(.+?)'")
_NO_LINE = "EOF when reading a line"
_OF_LOADERS = {kind.__name__: kind for kind in (FileNotFoundError, ImportError, BdbQuit, EOFError)}
"""Errors whose text a loader process may send."""


def hint(error: BaseException, frames: list[Frame], run: RunDir) -> str:
    """Return what to do, in one sentence. Empty if no remedy is known.

    Args:
        error: the error that ended this worker, or came from one of its loader processes.
        frames: the user's own frames.
        run: the run. Its plan has the directories, and whether it runs a script.
    """
    plan = files.read_json(run.plan) or {}
    if isinstance(error, OtherProcessError):
        error = _OF_LOADERS.get(error.type, Exception)(str(error))
    from dtrain.doctor.explained import explain  # only a failure needs its imports

    places = [run.path, *([Path(error.filename).parent] if _names_file(error) else [])]
    if lacking := explain(_where(error), places):
        return lacking
    if isinstance(error, FileNotFoundError) and plan:
        return _of_missing_file(error, plan)
    if isinstance(error, ImportError) and "no known parent package" in str(error) and frames:
        return _of_relative_import(frames[-1])
    needs_terminal = isinstance(error, BdbQuit) or (
        isinstance(error, EOFError) and _NO_LINE in str(error)
    )
    if needs_terminal and not (sys.stdin is not None and sys.stdin.isatty()):
        return _of_terminal(plan.get("trainer") == catalog.SCRIPT)
    return ""


def _names_file(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and isinstance(error.filename, str)


def _where(error: BaseException) -> str:
    """Return the text of an error and the files through which it came."""
    trace = traceback.extract_tb(error.__traceback__)
    return "\n".join([str(error), *(frame.filename for frame in trace)])


def _of_missing_file(error: FileNotFoundError, plan: dict[str, str]) -> str:
    trace = traceback.extract_tb(error.__traceback__)
    found = _MISSING_FILE.search(str(error))
    if found is None or (trace and trace[-1].filename.endswith("subprocess.py")):
        return ""
    name, job_dir = Path(found[1]), Path(plan["job_dir"])
    code_dir = Path(plan["code_dir"] or job_dir)
    if name.is_relative_to(code_dir) and code_dir != job_dir:
        name = name.relative_to(code_dir)
        where = f", but in {job_dir}" if (job_dir / name).exists() else ""
        return f"{name} is not in the run's copy of the code{where}: give data an absolute path"
    if name.is_absolute():
        return ""
    looked = f"relative paths are looked up in the working directory, {os.getcwd()}"
    for folder, remedy in ((code_dir, f"Path(__file__).parent / {str(name)!r}"), (job_dir, "")):
        if (folder / name).exists():
            remedy = remedy or f"the absolute path, {job_dir / name}"
            return f"{looked}, and {name} is in {job_dir}: write {remedy}"
    return f"{looked}; {name} is not in the job's directory {job_dir} either"


def _of_relative_import(frame: Frame) -> str:
    try:
        tree = ast.parse(Path(frame.file).read_bytes())
    except (OSError, SyntaxError, ValueError):  # it has been edited since
        return ""
    for each in ast.walk(tree):
        if isinstance(each, ast.ImportFrom) and each.level and each.lineno == frame.line:
            return relative_import_advice(Path(frame.file).name, each)
    return ""


def _of_terminal(is_script: bool) -> str:
    what = "breakpoint(), pdb.set_trace() and input() need a terminal, and a worker has none"
    if is_script:
        return f"{what}: run the script in your own terminal with python, as one process"
    return (
        f"{what}: `dtrain plan --write --strategy single --procs 1 --run-id debug JOB`, then "
        "`python -P -m dtrain.worker runs/debug` in your terminal"
    )
