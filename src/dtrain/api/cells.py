"""Writes a class from the cells of a notebook to a file that workers can import.

The file contains the class as it was written. From the other cells it contains what the class
needs: imports, functions, classes and constants. Names are found as Python's compiler finds them.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import inspect
import linecache
import symtable
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_origin

from dtrain.errors import LaunchError, UsageError
from dtrain.job.static_source import Definition
from dtrain.run import files

FOLDER = "notebook_cells"
"""A directory in the current one, which is the job's. A copy of the code includes it, since it is
not hidden, and it is not a run.
"""
_HEAD = '"""{name}, from the cells of a notebook. Edit it there: this file is generated."""\n'
_FUTURE = "from __future__ import annotations\n"


def is_definition(value: Any) -> bool:
    """Return whether a value is a class or a function, with or without decorators."""
    return isinstance(value, type) or isinstance(inspect.unwrap(value), FunctionType)


def is_from_cell(task: Any) -> bool:
    """Return whether a class or function was defined in a cell."""
    return _definition(task) is not None


def write(task: Any) -> Path:
    """Write the file of a class that was defined in a cell.

    Returns:
        The path of the file. Its name contains a digest of the content, so a run keeps the code
        that it started with.

    Raises:
        UsageError: the class uses something that a file cannot contain. The message names it.
        LaunchError: the file cannot be written.
    """
    text = source_of(task)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    path = Path.cwd() / FOLDER / f"{task.__name__.lower()}_{digest}.py"
    try:
        if not path.exists():
            files.make_parent(path)
            files.write_atomic(path, text)
    except OSError as error:
        raise LaunchError(
            f"cannot write {path}, for workers to import: {error.strerror}",
            code="file.not-writable",
        ) from None
    return path


def source_of(task: Any) -> str:
    """Return the text of the file. The errors are those of `write`."""
    return _SourceCollector(task).text()


class _SourceCollector:
    """Collects the names that a class needs, and the names that those need."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self._scope: dict[str, Any] = vars(sys.modules[task.__module__])
        self._statements = [each for cell in _cells(task) for each in _statements_of(cell)]
        self._imports: dict[str, None] = {}
        self._body: list[str] = []
        self._seen: set[str] = set()
        flag = self._scope.get("annotations")
        self._future = _FUTURE if type(flag).__module__ == "__future__" else ""

    def text(self) -> str:
        name = self._task.__name__
        self._seen.add(name)
        self._add_definition(name, self._task)
        head = _HEAD.format(name=name) + (f"\n{self._future}" if self._future else "")
        parts = ["\n".join(self._imports)] if self._imports else []
        return (
            "\n\n".join([head.rstrip(), *parts]) + "".join(f"\n\n\n{p}" for p in self._body) + "\n"
        )

    def _add_name(self, name: str, user: str) -> None:
        """Add a name to the file, unless Python provides it."""
        if name in self._seen or name not in self._scope or _is_builtin(name, self._scope[name]):
            return
        self._seen.add(name)
        value = self._scope[name]
        if lines := [*self._import_lines(name, value)]:
            self._imports.update(dict.fromkeys(lines))
        elif is_definition(value) and value.__module__ == self._task.__module__:
            self._add_definition(name, value)
        elif _is_literal(value):
            self._body.append(f"{name} = {value!r}")
        elif get_origin(value) is not None and (line := self._assignment(name)) is not None:
            self._add_source(line, name)  # a type, for example list[Tensor]
        else:
            kind = type(value).__qualname__
            article = "an" if kind[0] in "aeiouAEIOU" else "a"
            raise UsageError(
                f"{user} uses {name!r} of the notebook, {article} {kind}, which cannot be passed "
                "to workers: create it inside the class, or move it into a file and import it",
                code="api.class-needs-notebook",
            )

    def _add_definition(self, name: str, value: Any) -> None:
        """Add a class or function after all that its definition runs, and before the rest."""
        own: str = value.__name__
        found = _definition(value) if own == name else self._newest_definition(name)
        if found is not None:
            self._add_source(found, name)
        elif own != name and self._scope.get(own) is value:
            self._add_name(own, name)
            self._body.append(f"{name} = {own}")
        else:
            raise UsageError(
                f"{name!r} has no source that workers could import: move it into a file and "
                "import it",
                code="api.class-without-source",
            )

    def _newest_definition(self, name: str) -> str | None:
        """Return the newest definition of a name whose value a decorator has replaced."""
        texts = (_find_definition(cell, name) for cell in reversed(_cells(self._task)))
        return next((text for text in texts if text is not None), None)

    def _add_source(self, source: str, name: str) -> None:
        table = symtable.symtable(self._future + source, "<cell>", "exec")
        for needed in sorted(_names(table, at_once=True)):
            self._add_name(needed, name)
        self._body.append(source)
        for needed in sorted(_names(table, at_once=False)):
            self._add_name(needed, name)

    def _import_lines(self, name: str, value: Any) -> Iterator[str]:
        """Yield the imports of the cells that made a name, or else one that finds its value."""
        found: dict[str, None] = {}
        for statement in self._statements:
            if isinstance(statement, ast.Import):
                for alias in statement.names:
                    if (alias.asname or alias.name.partition(".")[0]) == name:
                        found[ast.unparse(ast.Import([alias]))] = None
            elif isinstance(statement, ast.ImportFrom) and not statement.level:
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        found[ast.unparse(ast.ImportFrom(statement.module, [alias], 0))] = None
        working = [line for line in found if _binds(line, name, value)]
        yield from working
        if working:
            return
        if isinstance(value, ModuleType):
            yield f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}")
            return
        module, own = getattr(value, "__module__", None), getattr(value, "__name__", None)
        if module not in (None, self._task.__module__) and isinstance(own, str):
            line = f"from {module} import {own}" + ("" if own == name else f" as {name}")
            if _binds(line, name, value):  # for example from `from torch.nn import *`
                yield line

    def _assignment(self, name: str) -> str | None:
        """Return the newest assignment to a name, as written."""
        for statement in reversed(self._statements):
            if isinstance(statement, ast.Assign | ast.AnnAssign) and name in _targets(statement):
                return ast.unparse(statement)
        return None


def _cells(task: Any) -> list[str]:
    """Return the cells that were run, in the order in which IPython keeps them."""
    return list(vars(sys.modules[task.__module__]).get("In", ()))


def _statements_of(cell: str) -> list[ast.stmt]:
    """Return the statements of a cell. A cell that is not Python has none."""
    try:
        return [*_top_level(ast.parse(cell).body)]
    except (SyntaxError, ValueError):
        return []


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements outside definitions, including those inside `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if not isinstance(statement, Definition):
            for block in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from _top_level(handler.body)


def _targets(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {each.id for each in targets if isinstance(each, ast.Name)}


def _binds(line: str, name: str, value: Any) -> bool:
    """Return whether an import, run again, binds a name to its present value."""
    statement = ast.parse(line).body[0]
    try:
        if isinstance(statement, ast.ImportFrom):
            module = importlib.import_module(statement.module or "")
            own = statement.names[0].name
            found = getattr(module, own, None)
            return (
                found if found is not None else sys.modules.get(f"{module.__name__}.{own}")
            ) is value
        assert isinstance(statement, ast.Import)
        alias = statement.names[0]
        return sys.modules.get(alias.name if alias.asname else name) is value
    except Exception:
        return False


def _definition(value: Any) -> str | None:
    """Return the source of a class or function, with its decorators, from the cell that defined it.

    The code of a function records its cell. Before Python 3.13 a class does not, but its methods
    do. A class without methods is searched for in the cells, from the newest on.
    """
    members = vars(value).values() if isinstance(value, type) else [inspect.unwrap(value)]
    for member in members:
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if isinstance(function, FunctionType) and _is_part_of(function, value):
            found = _find_definition(_cell_of(function), value.__name__)
            if found is not None:
                return found
    texts = (_find_definition(cell, value.__name__) for cell in reversed(_cells(value)))
    return next((text for text in texts if text is not None), None)


def _is_part_of(function: FunctionType, value: Any) -> bool:
    """Return whether a function is the definition itself, or a method that was written in it."""
    return f"{function.__qualname__}.".startswith(f"{value.__name__}.")


def _cell_of(function: FunctionType) -> str:
    """Return the text of the cell in which a function was defined; empty if there is none."""
    name = function.__code__.co_filename
    cached = linecache.cache.get(name)
    is_cell = cached is not None and len(cached) > 2 and cached[1] is None  # not a file
    return "".join(linecache.getlines(name)) if is_cell else ""


def _find_definition(text: str, name: str) -> str | None:
    """Return the last definition of a name in a cell, as written there."""
    lines = text.splitlines()
    for statement in reversed(_statements_of(text)):
        if isinstance(statement, Definition) and statement.name == name:
            first = min([statement.lineno, *(each.lineno for each in statement.decorator_list)])
            if statement.col_offset == 0:
                return "\n".join(lines[first - 1 : statement.end_lineno])
            return ast.unparse(statement)
    return None


def _names(table: symtable.SymbolTable, *, at_once: bool) -> set[str]:
    """Return the global names that a definition needs.

    With `at_once` these are the names it needs when it is run, otherwise when it is called.
    """
    names = set()
    if at_once or _runs_when_called(table):
        for symbol in table.get_symbols():
            is_global = symbol.is_global() or table.get_type() == "module"
            bound = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
            if is_global and symbol.is_referenced() and not (bound and not symbol.is_global()):
                names.add(symbol.get_name())
    for child in table.get_children():
        if not (at_once and _runs_when_called(child)):
            names |= _names(child, at_once=at_once)
    return names


def _runs_when_called(table: symtable.SymbolTable) -> bool:
    """Return whether a scope runs only when something is called.

    A list comprehension in the body of a class runs at once.
    """
    return table.get_type() == "function" and not table.get_name().endswith(("comp", "genexpr"))


def _is_builtin(name: str, value: Any) -> bool:
    return (name.startswith("__") and name.endswith("__")) or getattr(
        builtins, name, _is_builtin
    ) is value


def _is_literal(value: Any) -> bool:
    """Return whether the `repr` of a value evaluates to the same value."""
    try:
        return bool(_equal(ast.literal_eval(repr(value)), value))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False


def _equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal and have the same types at every depth.

    `True` is not 1, and a subclass of dict is not a dict.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return [*one] == [*other] and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
