"""What a job names outside its own file: task, arguments, paths, trainer, strategy.

Nothing of the user's is imported or run, and nothing is started.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain import catalog
from dtrain.errors import Problem
from dtrain.job.source import Source
from dtrain.job.spec import JobSpec
from dtrain.job.units import parse_nodes
from dtrain.job.written import Place, Written, did_you_mean, dotted, shown_path
from dtrain.task import REQUIRED


def outside_problems(root: Written, folder: Path) -> list[Problem]:
    """Everything that a job names and that is not there, or does not go together.

    Args:
        root: the job as written; fields of a wrong type are passed over.
        folder: where job.yaml lies.
    """
    return [
        *_name_problems(root),
        *_pair_problems(root),
        *_logger_problems(root),
        *_path_problems(root, folder),
        *_task_problems(root, folder),
        *_script_problems(root, folder),
    ]


def _text(root: Written, field: str) -> str | None:
    """A top-level text field, or its default; None when it is no text."""
    written = root.get((field,))
    of_script = {"trainer": catalog.SCRIPT, "strategy": catalog.OWN} if _has_script(root) else {}
    default = of_script.get(field, JobSpec.model_fields[field].default)
    value = default if written is None else written.value
    return value if isinstance(value, str) else None


def _has_script(root: Written) -> bool:
    written = root.get(("script",))
    return written is not None and written.value is not None


def _name_problems(root: Written) -> Iterator[Problem]:
    for kind in ("trainer", "strategy"):
        if root.get((kind,)) is None:
            continue
        name, known = _text(root, kind), catalog.names(kind)
        if name is not None and name not in known:
            message = f"unknown; known: {', '.join(known)}{did_you_mean(name, known)}"
            yield root.place_of((kind,)).problem(kind, message)


def _pair_problems(root: Written) -> Iterator[Problem]:
    trainer, strategy = _text(root, "trainer"), _text(root, "strategy")
    nodes = root.get(("launch", "nodes"))
    try:
        most = parse_nodes(nodes.plain())[1] if nodes else 1
    except ValueError:
        most = 1
    problem = trainer and strategy and _pair_problem(root, trainer, strategy, most)
    problem = problem or _missing_extra(trainer)
    if problem:
        said = [root.get((field,)) for field in ("strategy", "trainer")]
        place = next((written.place for written in (*said, nodes) if written), root.place)
        yield place.problem("strategy", problem)


def _pair_problem(root: Written, trainer: str, strategy: str, nodes: int) -> str | None:
    if _has_script(root) and trainer != catalog.SCRIPT:
        return (
            f"trainer {trainer!r} trains a task, and a script has a loop of its own: leave the "
            "trainer out, or write the training as a task"
        )
    if trainer == catalog.SCRIPT and not _has_script(root):
        return "trainer 'script' runs a script; name it as script: train.py instead of a task"
    return catalog.pair_problem(trainer, strategy, nodes)


def _missing_extra(trainer: str | None) -> str | None:
    fact = catalog.TRAINERS.get(trainer or "")
    if fact is None or fact.module is None or importlib.util.find_spec(fact.module) is not None:
        return None
    return f"trainer {trainer!r} needs a package: pip install 'dtrain[{fact.extra}]'"


def _script_problems(root: Written, folder: Path) -> Iterator[Problem]:
    """The file is there and is Python; a script that is not would fail on every node."""
    script, place = _text(root, "script"), root.place_of(("script",))
    if script is None:
        return
    file = folder / script
    if not file.is_file():
        yield place.problem("script", f"no such file: {shown_path(file)}{_similar(file)}")
        return
    yield from _readable(file, place, "script")[1]


def _logger_problems(root: Written) -> Iterator[Problem]:
    """Loggers whose library is missing here; the nodes run the same Python."""
    written = root.get(("log", "loggers"))
    entries = written.value if written and isinstance(written.value, list) else []
    for index, entry in enumerate(entries):
        plain = entry.plain()
        name = next(iter(plain), None) if isinstance(plain, dict) else plain
        problem = catalog.logger_problem(name) if isinstance(name, str) else None
        if problem:
            yield entry.place.problem(dotted(("log", "loggers", index)), problem)


def _path_problems(root: Written, folder: Path) -> Iterator[Problem]:
    written = root.get(("data", "paths"))
    paths = written.value if written and isinstance(written.value, list) else []
    for index, part in enumerate(paths):
        if isinstance(part.value, str) and not os.path.lexists(folder / part.value):
            path = folder / part.value
            message = f"no such file or folder: {shown_path(path)}{_similar(path)}"
            yield part.place.problem(dotted(("data", "paths", index)), message)


def _similar(path: Path) -> str:
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    return did_you_mean(path.name, [name for name in siblings if name != path.name])


def _task_problems(root: Written, folder: Path) -> Iterator[Problem]:
    task = _text(root, "task")
    if task is None or root.get(("task",)) is None:
        return
    place = root.place_of(("task",))
    target, colon, name = task.rpartition(":")
    if not colon or not target or not name.isidentifier():
        example = f"{task.rstrip(':')}:Class" if task.endswith((".py", ".py:")) else "file.py:Class"
        message = f"expected a file or module and a class, as {example}; found {task!r}"
        yield place.problem("task", message)
        return
    file = folder / target if target.endswith(".py") else _module_file(target, folder)
    if file is None or not file.is_file():
        near = _similar(folder / target) if file else ""
        what = f"file: {shown_path(file)}" if file else f"module: {target}"
        yield place.problem("task", f"no such {what}{near}")
    elif file.suffix == ".py":
        yield from _class_problems(root, place, file, name)


def _class_problems(root: Written, place: Place, file: Path, name: str) -> Iterator[Problem]:
    shown = shown_path(file)
    source, problems = _readable(file, place, "task")
    yield from problems
    if source is None:
        return
    if not source.has(name):
        classes = source.classes()
        listed = f"; it has: {', '.join(classes)}" if classes else ""
        near = did_you_mean(name, classes)
        yield place.problem("task", f"{shown} has no class {name!r}{listed}{near}")
        return
    if source.derives(name, "LightningModule") and _text(root, "trainer") == "native":
        near = "trainer: lightning, which has " + ", ".join(
            catalog.TRAINERS["lightning"].strategies
        )
        yield place.problem("task", f"{name} is a LightningModule; it needs {near}")
    yield from _method_problems(source, name, shown)
    yield from _argument_problems(root, source, name)


def _readable(file: Path, place: Place, field: str) -> tuple[Source | None, list[Problem]]:
    shown = shown_path(file)
    try:
        return Source(file), []
    except SyntaxError as error:
        spot = Place(shown, error.lineno, error.offset)
        return None, [spot.problem("", f"the {field}'s file is not Python: {error.msg}")]
    except (OSError, ValueError) as error:
        return None, [place.problem(field, f"{shown} cannot be read: {error}")]


def _method_problems(source: Source, name: str, shown: str) -> Iterator[Problem]:
    """What a class that is visibly meant as a task lacks of one."""
    members = source.members(name)
    missing = [method for method in REQUIRED if members is not None and method not in members]
    if members is not None and 0 < len(missing) < len(REQUIRED):
        node = source.definitions[name][0]
        lacks = " and ".join(f"{method}()" for method in missing)
        message = f"class {name} has no {lacks}; a task needs {', '.join(REQUIRED)}"
        yield Place(shown, node.lineno, node.col_offset + 1).problem("", message)


def _argument_problems(root: Written, source: Source, name: str) -> Iterator[Problem]:
    written, takes = root.get(("args",)), source.arguments(name)
    given = written.value if written else {}
    if takes is None or not isinstance(given, dict):
        return
    known = [*takes.required, *takes.optional]
    unknown = [] if takes.anything else [word for word in given if word not in known]
    for word in unknown:
        listed = f"it takes: {', '.join(known)}" if known else "it takes none"
        message = f"{name} has no such argument; {listed}{did_you_mean(word, known)}"
        yield (given[word].key or given[word].place).problem(f"args.{word}", message)
    for word in takes.required:
        if word not in given:
            place = root.place_of(("args", word) if written else ("task",))
            yield place.problem(f"args.{word}", f"missing; {name} needs this argument")


def _module_file(module: str, folder: Path) -> Path | None:
    """The file of a dotted module, found by its path alone: no parent package is imported."""
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
