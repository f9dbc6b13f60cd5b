"""Jobs with a script: the fields they have, and the settings that the script decides."""

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

SCRIPT_FIELDS = ("name", "script", "script_args", "launch")
"""All fields of such a job."""

_ALLOWED = (*SCRIPT_FIELDS, "trainer", "strategy")  # the last two have their own messages
_UP_TO_THE_SCRIPT = (
    "does not apply to a script: remove it and do it inside the script, or write the training as "
    "a task"
)


def completed(job: Any) -> Any:
    """Fill in the fields that only a task needs, in a job with a script.

    Other code then finds every field filled in.
    """
    if not isinstance(job, dict) or job.get("script") is None:
        return job
    train = {"steps": 1, "global_batch_size": 1}
    return {
        "task": "",
        "train": train,
        "trainer": catalog.SCRIPT,
        "strategy": catalog.OWN,
        **job,
    }


def meaningless(job: Mapping[str, Any]) -> list[FieldProblem]:
    """Return the fields of a job with a script that would have no effect."""
    code = "job.field-without-effect"
    return [((field,), _UP_TO_THE_SCRIPT, code) for field in job if field not in _ALLOWED]


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
