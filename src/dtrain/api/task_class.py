"""Makes the job that trains a class, from the file in which the class was written."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain.api import cells
from dtrain.errors import UsageError
from dtrain.job.located import shown_path
from dtrain.job.static_source import Definition, Source, parsed
from dtrain.planning import JobWithoutFile

_INSTALLED = ("site-packages", "dist-packages")
_STARTS = ("launch", "resume", "verify")


def job_of_class(function: str, task: Any, fields: Mapping[str, Any]) -> JobWithoutFile:
    """Return the job of a task's class, or of a function that makes one.

    A class in a file is named by its file, and one in a package by its module. A class in the cells
    of a notebook is named by a file that is written from them, see `cells`.

    Args:
        function: the function that was called, for errors.
        task: the class or the function.
        fields: fields of job.yaml, except `name` and `task`.

    Raises:
        UsageError: workers could not import the class. The message gives the reason.
    """
    if not cells.is_definition(task):
        raise UsageError(
            f"{function}() takes the path of a job.yaml, or the class of a task, and not "
            f"{_described(task)}",
            code="api.invalid-argument",
        )
    name = task.__qualname__
    if not name.isidentifier():
        raise UsageError(
            f"{name} is defined inside a function or a class, where workers cannot import it: "
            "define it at the top level of a file or cell",
            code="api.class-not-importable",
        )
    folder, reference = _reference(task, function)
    values = {"name": name.lower(), "task": f"{reference}:{name}", **fields}
    return JobWithoutFile(values, folder, f"{function}({name})")


def _described(value: Any) -> str:
    kind = type(value).__qualname__
    return f"{value!r}" if isinstance(value, str | int | float | None) else f"a {kind}"


def _reference(task: Any, function: str) -> tuple[Path, str]:
    """Return (job directory, file or module) of a class."""
    module = sys.modules.get(task.__module__)
    file = getattr(module, "__file__", None)
    if task.__module__ == "__main__":
        if cells.is_from_cell(task):
            path = cells.write(task)
            return Path.cwd(), str(path.relative_to(Path.cwd()))
        if file is None or not os.path.isfile(file):
            raise UsageError(
                f"{task.__qualname__} has no source that workers could import: it was typed into "
                "an interpreter, or made by exec(); move it into a file and import it",
                code="api.class-without-source",
            )
        _refuse_to_launch_at_import(Path(file), function)
        return Path(file).absolute().parent, Path(file).name
    if file is None or not file.endswith(".py") or not _is_attribute(module, task):
        raise UsageError(
            f"workers cannot import {task.__qualname__} from module {task.__module__}: "
            "move it into a file and import it",
            code="api.class-not-importable",
        )
    path, parts = Path(file).absolute(), task.__module__.split(".")
    is_package = path.name == "__init__.py"
    root = path.parents[len(parts) - (0 if is_package else 1)]
    if set(_INSTALLED) & set(root.parts):
        return Path.cwd(), task.__module__
    return (root, task.__module__) if is_package or len(parts) > 1 else (root, path.name)


def _is_attribute(module: Any, task: Any) -> bool:
    return getattr(module, task.__name__, None) is task


def _refuse_to_launch_at_import(path: Path, function: str) -> None:
    """Refuse a script that would launch again in each worker, which imports it for the class."""
    try:
        source, tree = Source(path), parsed(path)
    except (SyntaxError, OSError, ValueError):
        return
    for call in _calls_at_import(tree.body):
        called = ast.unparse(call.func)
        first, _, rest = called.partition(".")
        origin = f"{source.origins.get(first, '')}{'.' + rest if rest else ''}"
        if origin in {f"dtrain.{name}" for name in _STARTS}:
            raise UsageError(
                f"{shown_path(path)}:{call.lineno}: the workers import this file for its class, "
                f"and would call {called}() too: put the call, and everything else that only the "
                'script should run, under `if __name__ == "__main__":`',
                code="api.launch-at-import",
            )


def _calls_at_import(body: list[ast.stmt]) -> Iterator[ast.Call]:
    """Yield the calls that run when a module is imported, except under `if __name__ == …`."""
    for statement in body:
        if isinstance(statement, Definition):
            continue
        if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            yield from _calls_at_import(statement.orelse)
            continue
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        for block in blocks:
            yield from _calls_at_import(block)
        inside = {id(node) for block in blocks for each in block for node in ast.walk(each)}
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and id(node) not in inside:
                yield node
