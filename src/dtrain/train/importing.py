"""Imports the classes that a job names, by `file.py:Class` or `package.module:Class`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain import procs
from dtrain.errors import JobError, Problem


def load_class(field: str, reference: str, job_dir: str | os.PathLike[str]) -> Callable[..., Any]:
    """Return the class or other callable that a reference in job.yaml names.

    Raises:
        JobError: there is no such file, module or class. The error names `field`.
    """
    folder = Path(job_dir).absolute()
    procs.add_current_directory()
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise job_problem(
            field,
            f"{reference!r} is not `file.py:Class` or `package.module:Class`",
            code="job.reference-syntax",
        )
    module = _from_file(folder / source) if source.endswith(".py") else _from_name(source, folder)
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise job_problem(
            field, f"{source} has no class {name!r}{_classes(module)}", code="job.class-not-found"
        )
    made: Callable[..., Any] = factory
    return made


def _from_file(path: Path) -> ModuleType:
    """Return the module of a file, imported under its stem.

    So pickles and other modules of the directory find the same module.
    """
    path = path.resolve()
    if not path.is_file():
        raise job_problem("task", f"there is no file {path}", code="job.code-not-found")
    _make_importable(path.parent)
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        name += "_" + hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(name: str, folder: Path) -> ModuleType:
    _make_importable(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module exists, but not a module that it imports
        raise job_problem(
            "task", f"there is no module {error.name!r}", code="job.code-not-found"
        ) from error


def _make_importable(folder: Path) -> None:
    if sys.path[:1] != [str(folder)]:  # a later entry may be the current directory
        sys.path.insert(0, str(folder))


def _classes(module: ModuleType) -> str:
    here = [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return f"; it has {', '.join(here)}" if here else ""


def job_problem(field: str, message: str, *, code: str) -> JobError:
    """Return the error for one wrong field of job.yaml."""
    return JobError([Problem("job.yaml", None, None, field, message, code)])
