"""Check everything that a job names outside its own file: task, arguments, paths, trainer,
strategy.

No code of the user is imported or run, and nothing is started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dtrain import catalog
from dtrain.errors import Problem, quoted
from dtrain.job.frameworks import job_checks
from dtrain.job.located import Located, did_you_mean, dotted, shown_path
from dtrain.job.script import program_of
from dtrain.job.spec import JobSpec
from dtrain.job.static_check import class_problems, main_file, module_file, readable, similar
from dtrain.job.units import parse_nodes


def outside_problems(root: Located, folder: Path) -> list[Problem]:
    """Return a problem for everything that a job names and that is missing or does not go together.

    Args:
        root: the job as written; fields of a wrong type are ignored.
        folder: the directory of job.yaml.
    """
    return [
        *_name_problems(root),
        *_pair_problems(root),
        *_logger_problems(root),
        *(problem for check in job_checks() for problem in check.references(root)),
        *_path_problems(root, folder),
        *class_problems(root, folder, _text(root, "trainer")),
        *_program_problems(root, folder),
    ]


def _text(root: Located, field: str) -> str | None:
    """Return a top-level text field or its default, or None when it is not text."""
    written = root.get((field,))
    of_script = {"trainer": catalog.SCRIPT, "strategy": catalog.OWN} if _program(root) else {}
    default = of_script.get(field, JobSpec.model_fields[field].default)
    value = default if written is None else written.value
    return value if isinstance(value, str) else None


def _program(root: Located) -> str | None:
    """Return which field names the program of the job; None if it has a task."""
    return program_of({name: part.value for name, part in root.value.items()})


def _name_problems(root: Located) -> Iterator[Problem]:
    for kind in ("trainer", "strategy"):
        if root.get((kind,)) is None:
            continue
        name, known = _text(root, kind), catalog.names(kind)
        if name is not None and name not in known:
            message = f"unknown; known: {', '.join(known)}{did_you_mean(name, known)}"
            yield root.place_of((kind,)).problem(kind, message, code="job.unknown-name")


def _pair_problems(root: Located) -> Iterator[Problem]:
    trainer, strategy = _text(root, "trainer"), _text(root, "strategy")
    nodes = root.get(("launch", "nodes"))
    try:
        most = parse_nodes(nodes.plain())[1] if nodes else 1
    except ValueError:
        most = 1
    problem = trainer and strategy and _pair_problem(root, trainer, strategy, most)
    missing = trainer and catalog.problem_of("trainer", trainer)
    if problem:
        fields = [root.get((field,)) for field in ("strategy", "trainer")]
        place = next((written.place for written in (*fields, nodes) if written), root.place)
        yield place.problem("strategy", problem, code="plan.unsupported-combination")
    elif missing:
        yield root.place_of(("trainer",)).problem("trainer", missing, code="plan.missing-package")


def _pair_problem(root: Located, trainer: str, strategy: str, nodes: int) -> str | None:
    program = _program(root)
    if program and trainer != catalog.SCRIPT:
        return (
            f"trainer {trainer!r} trains a task, and a {program} has a loop of its own: leave the "
            "trainer out, or write the training as a task"
        )
    if trainer == catalog.SCRIPT and not program:
        return "trainer 'script' runs a script; name it as script: train.py instead of a task"
    return catalog.pair_problem(trainer, strategy, nodes)


def _program_problems(root: Located, folder: Path) -> Iterator[Problem]:
    """Check that the program's file exists, and can be run. It would fail on every node."""
    script, module = _text(root, "script"), _text(root, "module")
    if script is not None:
        place, file = root.place_of(("script",)), folder / script
        if os.path.isfile(file):
            yield from readable(file, place, "script", alone=True)[1]
        else:
            yield _not_found(root, "script", file, code="job.script-not-found")
    elif module is not None:
        yield from _module_problems(root, module, folder)
    elif (command := root.get(("command",))) is not None:
        yield from _command_problems(root, command, folder)


def _not_found(root: Located, kind: str, file: Path, *, code: str) -> Problem:
    message = f"no such file: {shown_path(file)}{similar(file)}"
    return root.place_of((kind,)).problem(kind, message, code=code)


def _module_problems(root: Located, module: str, folder: Path) -> Iterator[Problem]:
    """Check that `python -m` would find the module. No package is imported."""
    place = root.place_of(("module",))
    if not all(part.isidentifier() for part in module.split(".")):
        name = module.removesuffix(".py").replace("/", ".").lstrip(".")
        instead = f"a script is given by its path: script: {module}"
        if all(part.isidentifier() for part in name.split(".")):
            instead = f"write {name}, or script: {module}"
        message = f"{quoted(module)} is not the dotted name of a module; {instead}"
        yield place.problem("module", message, code="job.module-not-found")
        return
    file = main_file(module, folder)
    if file is None:
        message = (
            f"no module {module} here: looked in {shown_path(folder)}, and in the packages of "
            f"{sys.executable}"
        )
        if module_file(module, folder) is not None:
            message = f"{module} is a package without a __main__.py, which -m would run"
        yield place.problem("module", message, code="job.module-not-found")
    elif file.suffix == ".py":
        yield from readable(file, place, "module", alone=False)[1]


def _command_problems(root: Located, command: Located, folder: Path) -> Iterator[Problem]:
    """Check a program that is given by its path. Others are looked for where the workers run."""
    words = command.plain()
    if not isinstance(words, list) or not words or not isinstance(words[0], str):
        return
    file = folder / words[0]
    if os.sep not in words[0]:
        return
    if not os.path.isfile(file):
        yield _not_found(root, "command", file, code="job.command-not-found")
    elif not os.access(file, os.X_OK):
        message = f"{shown_path(file)} may not be executed; run chmod +x on it, or name its " + (
            "interpreter first, for example [bash, train.sh]"
        )
        yield command.place.problem("command", message, code="job.command-not-executable")


def _logger_problems(root: Located) -> Iterator[Problem]:
    """Yield loggers whose library is missing here. The nodes run the same Python."""
    written = root.get(("log", "loggers"))
    entries = written.value if written and isinstance(written.value, list) else []
    for index, entry in enumerate(entries):
        plain = entry.plain()
        name = next(iter(plain), None) if isinstance(plain, dict) else plain
        problem = catalog.problem_of("logger", name) if isinstance(name, str) else None
        if problem:
            yield entry.place.problem(
                dotted(("log", "loggers", index)), problem, code="plan.missing-package"
            )


def _path_problems(root: Located, folder: Path) -> Iterator[Problem]:
    written = root.get(("data", "paths"))
    paths = written.value if written and isinstance(written.value, list) else []
    for index, part in enumerate(paths):
        if isinstance(part.value, str) and not os.path.lexists(folder / part.value):
            path = folder / part.value
            message = f"no such file or directory: {shown_path(path)}{similar(path)}"
            yield part.place.problem(
                dotted(("data", "paths", index)), message, code="job.data-not-found"
            )
