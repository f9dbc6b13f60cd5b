"""Jobs with a program of the user's own instead of a task: a script, a module or a command.

Their fields, and the settings that the program itself decides.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.errors import UsageError, quoted
from dtrain.job.located import FieldProblem
from dtrain.job.static_source import Definition, parsed
from dtrain.job.yaml_reader import dump_yaml

PROGRAMS = ("script", "module", "command")
"""The fields that name a program. A job has a task, or one of them."""
SCRIPT_FIELDS = ("name", *PROGRAMS, "script_args", "accelerate_config", "profile", "launch")
"""All fields of such a job."""

_ALLOWED = (*SCRIPT_FIELDS, "trainer", "strategy")  # the last two have their own messages
_UP_TO_THE_SCRIPT = (
    "does not apply to a {kind}: remove it and do it inside the {kind}, or write the training as "
    "a task"
)


def program_of(job: Any) -> str | None:
    """Return which of `PROGRAMS` a job has, as plain data. None if it has a task."""
    given = job if isinstance(job, Mapping) else {}
    return next((each for each in PROGRAMS if given.get(each) is not None), None)


def completed(job: Any) -> Any:
    """Fill in the fields that only a task needs, in a job with a program.

    Other code then finds every field filled in.
    """
    if program_of(job) is None:
        return job
    train = {"steps": 1, "global_batch_size": 1}
    return {
        "task": "",
        "train": train,
        "trainer": catalog.SCRIPT,
        "strategy": catalog.OWN,
        **job,
    }


def meaningless(job: Mapping[str, Any], kind: str) -> list[FieldProblem]:
    """Return the fields of a job with a program that would have no effect.

    Args:
        job: the job, as plain data.
        kind: the program that it has, one of `PROGRAMS`.
    """
    code = "job.field-without-effect"
    text = _UP_TO_THE_SCRIPT.format(kind=kind)
    problems = [((field,), text, code) for field in job if field not in _ALLOWED]
    if kind == "command" and job.get("profile") is not None:
        problems.append(
            (("profile",), "needs a script or a module, in whose process it runs", code)
        )
    others = [each for each in PROGRAMS if each != kind and job.get(each) is not None]
    either = f"the job has a {kind} too: give only one of {', '.join(PROGRAMS)}"
    return [*problems, *(((each,), either, code) for each in others)]


_NO_JOBS = (".sh", ".ipynb", ".sbatch", ".slurm")
_DEFINES = (ast.Import, ast.ImportFrom, ast.Pass, *Definition.__args__)


def does_nothing(path: Path) -> bool:
    """Return whether a file only imports and defines things. Return False when it is not Python."""
    try:
        body = parsed(path).body
    except SyntaxError:
        return False
    return all(isinstance(each, _DEFINES) or _is_constant(each) for each in body)


def _is_constant(statement: ast.stmt) -> bool:
    """Return whether a statement is a text, or assigns a value without a call."""
    if not isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign):
        return False
    return not any(isinstance(node, ast.Call | ast.Await) for node in ast.walk(statement))


def job_of_script(path: str) -> str | None:
    """Return the job that `dtrain launch train.py` means, or None for a job file."""
    if path.endswith(_NO_JOBS):
        raise UsageError(
            f"{quoted(path)} is neither a job (.yaml) nor a Python script (.py)",
            code="usage.not-a-job",
        )
    if not path.endswith(".py"):
        return None
    if not os.path.isfile(path):
        raise UsageError(f"there is no script {path}", code="job.script-not-found")
    if does_nothing(Path(path)):
        beside = Path(path).with_name("job.yaml")
        command = f"dtrain launch {beside if beside.is_file() else 'job.yaml'}"
        text = f"{path} only defines things. Launch the job that uses it: {command}"
        raise UsageError(text, code="job.script-only-defines")
    return dump_yaml({"name": Path(path).stem, "script": Path(path).name})
