"""Check the classes that a job names (its task, its data module). Their files are read, not run."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.errors import Problem
from dtrain.job.frameworks import NamedClass, job_checks
from dtrain.job.located import Located, SourceLocation, did_you_mean, dotted, shown_path
from dtrain.job.static_source import Source, relative_import_advice
from dtrain.task import REQUIRED


def class_problems(root: Located, folder: Path, trainer: str | None) -> Iterator[Problem]:
    """Yield classes that do not exist, that lack a package, or that do not take their arguments.

    Args:
        root: the job as written.
        folder: the directory of job.yaml.
        trainer: the trainer of the job; None when it is not text.
    """
    for named in (
        NamedClass(root, ("task",), ("args",), trainer),
        NamedClass(root, ("lightning", "data_module"), ("lightning", "data_args"), trainer),
    ):
        written = root.get(named.field)
        if written is not None and isinstance(written.value, str):
            yield from _reference_problems(named, written.value, folder)


def _reference_problems(named: NamedClass, reference: str, folder: Path) -> Iterator[Problem]:
    target, colon, name = reference.rpartition(":")
    if not colon or not target or not name.isidentifier():
        python = reference.endswith((".py", ".py:"))
        example = f"{reference.rstrip(':')}:Class" if python else "file.py:Class"
        yield named.problem(
            f"expected a file or module and a class, as {example}; found {reference!r}",
            code="job.reference-syntax",
        )
        return
    file = file_of(reference, folder)
    if file is None or not os.path.isfile(file):
        near = similar(folder / target) if file else ""
        what = f"file: {shown_path(file)}" if file else f"module: {target}"
        yield named.problem(f"no such {what}{near}", code="job.code-not-found")
    elif file.suffix == ".py":
        yield from _class_problems(named, file, name, alone=target.endswith(".py"))


def _class_problems(named: NamedClass, file: Path, name: str, *, alone: bool) -> Iterator[Problem]:
    shown = shown_path(file)
    source, problems = readable(file, named.place, dotted(named.field), alone=alone)
    yield from problems
    if source is None:
        return
    if not source.has(name):
        classes = source.classes()
        listed = f"; it has: {', '.join(classes)}" if classes else ""
        yield named.problem(
            f"{shown} has no class {name!r}{listed}{did_you_mean(name, classes)}",
            code="job.class-not-found",
        )
        return
    for check in job_checks():
        yield from check.of_class(named, name, file, source)
    if named.field == ("task",):
        yield from _method_problems(source, name, shown)
    yield from _argument_problems(named, source, name)


def _method_problems(source: Source, name: str, shown: str) -> Iterator[Problem]:
    """Yield the missing methods of a class that is clearly meant as a task."""
    members = source.members(name)
    missing = [method for method in REQUIRED if members is not None and method not in members]
    if members is not None and 0 < len(missing) < len(REQUIRED):
        node = source.definitions[name][0]
        lacks = " and ".join(f"{method}()" for method in missing)
        message = f"class {name} has no {lacks}; a task needs {', '.join(REQUIRED)}"
        yield SourceLocation(shown, node.lineno, node.col_offset + 1).problem(
            "", message, code="job.task-incomplete"
        )


def _argument_problems(named: NamedClass, source: Source, name: str) -> Iterator[Problem]:
    written, takes = named.root.get(named.args), source.arguments(name)
    given = written.value if written else {}
    if takes is None or not isinstance(given, dict):
        return
    field, known = dotted(named.args), [*takes.required, *takes.optional]
    unknown = [] if takes.anything else [word for word in given if word not in known]
    for word in unknown:
        listed = f"it takes: {', '.join(known)}" if known else "it takes none"
        message = f"{name} has no such argument; {listed}{did_you_mean(word, known)}"
        yield (given[word].key or given[word].place).problem(
            f"{field}.{word}", message, code="job.unknown-argument"
        )
    for word in takes.required:
        if word not in given:
            place = named.root.place_of((*named.args, word) if written else named.field)
            yield place.problem(
                f"{field}.{word}",
                f"missing; {name} needs this argument",
                code="job.missing-argument",
            )


def readable(
    file: Path, place: SourceLocation, field: str, *, alone: bool
) -> tuple[Source | None, list[Problem]]:
    """Parse a Python file that a field names, and return its problems.

    `alone` is true when the field names the file by its path.
    """
    shown = shown_path(file)
    try:
        source = Source(file)
        return source, [
            SourceLocation(shown, each.lineno, each.col_offset + 1).problem(
                "", relative_import_advice(file.name, each), code="job.relative-import"
            )
            for each in (source.relative if alone else [])
        ]
    except SyntaxError as error:
        spot = SourceLocation(shown, error.lineno, error.offset)
        return None, [
            spot.problem(
                "", f"the {field}'s file is not Python: {error.msg}", code="job.not-python"
            )
        ]
    except (OSError, ValueError) as error:
        return None, [
            place.problem(field, f"{shown} cannot be read: {error}", code="file.unreadable")
        ]


def similar(path: Path) -> str:
    """Return a hint at a file of nearly the same name, or an empty text."""
    siblings = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    return did_you_mean(path.name, [name for name in siblings if name != path.name])


def task_derives(task: str, base: str, folder: Path) -> bool:
    """Return whether the class that a job names visibly has a base of that name, without importing
    it.

    Args:
        task: the task, in the form of job.yaml.
        base: the last part of the name of the base.
        folder: the directory of job.yaml.
    """
    file, name = file_of(task, folder), task.rpartition(":")[2]
    return file is not None and os.path.isfile(file) and Source(file).derives(name, base)


def file_of(reference: str, folder: Path) -> Path | None:
    """Return the file that a task's or script's reference names, or None when there is no such
    module."""
    target = reference if reference.endswith(".py") else reference.rpartition(":")[0]
    return folder / target if target.endswith(".py") else module_file(target, folder)


def main_file(module: str, folder: Path) -> Path | None:
    """Return the file that `python -m` runs for a module; None if there is none.

    For a package, it is that of its module `__main__`.
    """
    file = module_file(module, folder)
    is_package = file is not None and file.stem == "__init__"
    return module_file(f"{module}.__main__", folder) if file is None or is_package else file


def module_file(module: str, folder: Path) -> Path | None:
    """Return the file of a dotted module, found by its path alone. No parent package is
    imported."""
    where: Sequence[str] | None = None
    name, origin = "", None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = _find_spec(name, where, folder)
        if spec is None:
            return None
        where = spec.submodule_search_locations or ()
        origin = spec.origin
    return Path(origin) if origin else None


def _find_spec(
    name: str, where: Sequence[str] | None, folder: Path
) -> importlib.machinery.ModuleSpec | None:
    if where is None:
        here = importlib.machinery.PathFinder.find_spec(name, [str(folder.absolute())])
        if here is not None:
            return here
    for finder in sys.meta_path:
        spec = finder.find_spec(name, where)
        if spec is not None:
            return spec
    return None
