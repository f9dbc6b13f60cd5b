"""Report modules that a task's file imports and that this Python lacks, before a launch.

Nothing is imported. The check ignores imports that are not always executed. It also ignores files
that may change the module search path.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.errors import JobError, Problem
from dtrain.job.located import SourceLocation, did_you_mean, shown_path
from dtrain.job.spec import JobSpec
from dtrain.job.static_check import file_of, main_file
from dtrain.job.static_source import Source, is_installed, parsed

_CHANGES_THE_PATH = {
    "addsitedir",
    "meta_path",
    "path_hooks",
    "subprocess",
    "pyximport",
    "cppimport",
    "hy",
}
"""Words in a file that may make further modules importable."""


def refuse_missing(job: JobSpec, folder: Path) -> None:
    """Check that the modules that the job's own files import exist.

    Args:
        job: a job that this Python, on this host, will train.
        folder: the directory of the job file.

    Raises:
        JobError: one problem for each module that does not exist.
    """
    if job.launch.preload:
        return  # preloaded modules may change the module search path
    python_path = job.launch.env.get("PYTHONPATH", "").split(os.pathsep)
    extra = [str(folder.absolute()), os.getcwd(), *filter(None, python_path)]
    seen: set[Path] = set()
    problems = [
        problem for file in _own_files(job, folder) for problem in _missing(file, extra, seen)
    ]
    if problems:
        raise JobError(problems)


def installed_imports(job: JobSpec, folder: Path) -> tuple[str, ...]:
    """Return the modules that the job's task or program imports and that are installed here."""
    files = [file for file in _own_files(job, folder) if file.suffix == ".py" and file.is_file()]
    names = Source(files[0]).modules if files else []
    return tuple(name for name in names if is_installed(name))


def _own_files(job: JobSpec, folder: Path) -> list[Path]:
    """Return the files of the user's code that a job names, where they are known."""
    named = [each for each in (job.script, job.task, job.lightning.data_module) if each]
    found = [file_of(each, folder) for each in named]
    if job.module is not None:
        found.append(main_file(job.module, folder))
    return [file for file in found if file is not None]


def _missing(file: Path, extra: Sequence[str], seen: set[Path]) -> Iterator[Problem]:
    """Yield the missing modules of a file, and of the files beside it that it imports."""
    if file in seen or file.suffix != ".py":
        return
    seen.add(file)
    try:
        tree = parsed(file)
    except (OSError, SyntaxError, ValueError):
        return
    if _may_change_the_path(tree):
        return
    own = str(file.resolve().parent)
    for statement, name in _imports(tree):
        beside = importlib.machinery.PathFinder.find_spec(name, [own, *extra])
        if beside is None and not _is_here(name):
            others = [path.stem for path in file.parent.glob("*.py") if path != file]
            yield SourceLocation(
                shown_path(file), statement.lineno, statement.col_offset + 1
            ).problem(
                "",
                f"imports {name}, which {sys.executable} does not have"
                f"{did_you_mean(name, others) or '; install the package that has it there'}",
                code="job.missing-import",
            )
        elif beside is not None and beside.origin and Path(beside.origin).parent == Path(own):
            yield from _missing(Path(beside.origin), extra, seen)


def _imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each import that is always executed, with the name of its package."""
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield statement, alias.name.partition(".")[0]
        elif isinstance(statement, ast.ImportFrom) and not statement.level and statement.module:
            yield statement, statement.module.partition(".")[0]


def _is_here(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # the module is imported but has no __spec__
        return True


def _may_change_the_path(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        words = {getattr(node, name, "") for name in ("attr", "id", "name", "module")}
        if words & _CHANGES_THE_PATH:
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "sys.modules"):
            return True
    return False
