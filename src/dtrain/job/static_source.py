"""Read a user's Python file without running it: its names, and the arguments of its classes.

The launch plane checks here that a task exists and can be called. Importing the file would run the
user's code, and torch, on a login node.
"""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parsed(path: Path) -> ast.Module:
    """Parse a file.

    Raises:
        SyntaxError: the file is not Python.
        OSError, ValueError: the file cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the user's own literals, for example "\d"
        return ast.parse(path.read_bytes())


@dataclass(frozen=True)
class Arguments:
    """The keyword arguments that a constructor takes."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    anything: bool = False
    """True if it has `**kwargs`."""


class Source:
    """The module-level names of one Python file."""

    def __init__(self, path: Path) -> None:
        """Read and parse a file. The errors are those of `parsed`."""
        self._tree = tree = parsed(path)
        words = {getattr(n, name, "") for n in ast.walk(tree) for name in ("attr", "id", "name")}
        self._is_plain = not words & _DYNAMIC
        at_top = [each for each in tree.body if isinstance(each, ast.ImportFrom) and each.level]
        self.relative = [] if "__package__" in words else at_top
        """Relative imports, which work only if the file is part of a package."""
        self._attributes = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        self.definitions: dict[str, list[Definition]] = {}
        self.origins: dict[str, str] = {}
        """The origin of each imported name, for example `dtrain.Task`."""
        self.others: set[str] = set()
        self.modules: list[str] = []
        """The modules that are imported along with this file, in the order of its statements."""
        for statement in _statements(tree.body):
            self._note(statement)
        self.open_ended = "*" in self.origins or "__getattr__" in self.definitions
        """True if the file may have more names than are visible."""

    def _note(self, statement: ast.stmt) -> None:
        if isinstance(statement, Definition):
            self.definitions.setdefault(statement.name, []).append(statement)
        elif isinstance(statement, ast.Import):
            self.modules += [alias.name for alias in statement.names]
            for alias in statement.names:
                top = alias.name.partition(".")[0]
                self.origins[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(statement, ast.ImportFrom):
            self.modules += [statement.module] if statement.module and not statement.level else []
            for alias in statement.names:
                self.origins[alias.asname or alias.name] = f"{statement.module}.{alias.name}"
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            self.others |= {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }

    def has(self, name: str) -> bool:
        """Return whether the file has this name, as far as is visible."""
        known = name in self.definitions or name in self.origins or name in self.others
        return known or self.open_ended

    def classes(self) -> list[str]:
        return [n for n, found in self.definitions.items() if isinstance(found[-1], ast.ClassDef)]

    def derives(self, name: str, base: str) -> bool:
        """Return whether a class of this file has a base of that name, at any visible depth."""
        found = self.definitions.get(name, [])
        if len(found) != 1 or not isinstance(found[0], ast.ClassDef):
            return False
        bases = [ast.unparse(each) for each in found[0].bases]
        return any(
            self.origins.get(each, each).rpartition(".")[2] == base
            or (
                each in self.definitions
                and self._is_before(each, found[0])
                and self.derives(each, base)
            )
            for each in bases
        )

    def imports(self, module: str) -> bool:
        """Return whether a module, or a part of it, is imported anywhere in the file."""
        names: list[str] = []
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
        return any(name.partition(".")[0] == module for name in names)

    def calls(self, method: str) -> Iterator[ast.Call]:
        """Yield every call of a method of that name, on any object."""
        for node in ast.walk(self._tree):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr == method:
                assert isinstance(node, ast.Call)
                yield node

    def has_method(self, name: str, method: str) -> bool:
        """Return whether a class, or a base of it in this file, has a member of that name."""
        found = [each for each in self.definitions.get(name, []) if isinstance(each, ast.ClassDef)]
        return any(
            method in _names_in(each)
            or any(
                self._is_before(base, each) and self.has_method(base, method)
                for base in map(ast.unparse, each.bases)
            )
            for each in found
        )

    def keywords_of(self, called: str, argument: str) -> Iterator[ast.keyword]:
        """Yield an argument, by its name, of each call of what ends with `called`."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(called):
                yield from (each for each in node.keywords if each.arg == argument)

    def defaults_of(self, argument: str) -> Iterator[ast.expr]:
        """Yield the default of an argument of that name, of each constructor."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
                defaults = node.args.defaults
                pairs = zip(names[len(names) - len(defaults) :], defaults, strict=True)
                yield from (default for name, default in pairs if name == argument)

    def sets_on_self(self, name: str, attribute: str, value: object) -> bool:
        """Return whether a method of this class sets an attribute to a constant:
        `self.a = False`."""
        found = self.definitions.get(name, [])
        return any(
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and node.value.value is value
            and any(ast.unparse(target) == f"self.{attribute}" for target in node.targets)
            for definition in found
            for node in ast.walk(definition)
        )

    def members(self, name: str) -> set[str] | None:
        """Return the members that a class may have in addition to those of `Task`, or None if
        unknown."""
        found = self.definitions.get(name, [])
        if len(found) != 1 or not isinstance(found[0], ast.ClassDef) or not self._is_plain:
            return None
        node = found[0]
        if node.keywords or not all(_is_dataclass(each) for each in node.decorator_list):
            return None
        members = self._attributes | _names_in(node)
        for base in node.bases:
            if self._origin(base) in _WITHOUT_CONSTRUCTOR:
                continue
            above = ast.unparse(base)
            inherited = self.members(above) if self._is_before(above, node) else None
            if inherited is None:
                return None
            members |= inherited
        return members

    def _origin(self, base: ast.expr) -> str:
        """Return the full name of a base class, for example `dtrain.Task`."""
        first, _, rest = ast.unparse(base).partition("[")[0].partition(".")
        return f"{self.origins.get(first, first)}{'.' + rest if rest else ''}"

    def _is_before(self, name: str, node: ast.ClassDef) -> bool:
        """Return whether a base is defined above a class. Otherwise A(B), B(A) would never end."""
        return all(each.lineno < node.lineno for each in self.definitions.get(name, []))

    def arguments(self, name: str) -> Arguments | None:
        """Return the arguments of a call of this name, or None if this file alone does not show
        them."""
        found = self.definitions.get(name, [])
        if len(found) != 1:
            return None
        if isinstance(found[0], ast.ClassDef):
            return self._of_class(found[0])
        return _of_function(found[0], skip=0)

    def _of_class(self, node: ast.ClassDef) -> Arguments | None:
        dataclass_like = [_is_dataclass(decorator) for decorator in node.decorator_list]
        if not all(dataclass_like) or node.keywords:
            return None
        methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
        if "__new__" in methods:
            return None
        if "__init__" in methods:
            return _of_function(methods["__init__"], skip=1)
        inherited = self._inherited(node)
        if inherited is None or not dataclass_like:
            return inherited
        return _of_fields(node, inherited)

    def _inherited(self, node: ast.ClassDef) -> Arguments | None:
        """Return the arguments of the first base that has a constructor."""
        for base in node.bases:
            name = ast.unparse(base).partition("[")[0]
            if self._origin(base) in _WITHOUT_CONSTRUCTOR:
                continue
            arguments = self.arguments(name) if self._is_before(name, node) else None
            if arguments is None or arguments != Arguments():
                return arguments
        return Arguments()


_DYNAMIC = {"setattr", "vars", "__dict__", "__getattr__", "__getattribute__", "exec"}
"""Words by which a class may get invisible methods."""

_WITHOUT_CONSTRUCTOR = {
    "object",
    "abc.ABC",
    "typing.Generic",
    "typing.Protocol",
    "dtrain.Task",
    "dtrain.task.Task",
    "pytorch_lightning.LightningDataModule",
    "lightning.LightningDataModule",
    "lightning.pytorch.LightningDataModule",
}


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements that run at import, including those inside `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, Definition):
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _names_in(node: ast.ClassDef) -> set[str]:
    """Return every name that a class's body may bind."""
    names: set[str] = set()
    for statement in _statements(node.body):
        if isinstance(statement, Definition):
            names.add(statement.name)
            continue
        for part in ast.walk(statement):
            if isinstance(part, ast.alias):
                names.add((part.asname or part.name).partition(".")[0])
            elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                names.add(part.id)
    return names


def _is_dataclass(decorator: ast.expr) -> bool:
    if isinstance(decorator, ast.Call):
        if any(keyword.arg == "init" for keyword in decorator.keywords):
            return False
        decorator = decorator.func
    return ast.unparse(decorator) in ("dataclass", "dataclasses.dataclass")


def _of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, skip: int) -> Arguments | None:
    """Return a signature's keyword arguments, without the first `skip` (self)."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    if node.decorator_list or len(given.posonlyargs) > skip or len(positional) < skip:
        return None
    names = [argument.arg for argument in positional]
    plain = len(names) - len(given.defaults)
    keyword_only = dict(zip((a.arg for a in given.kwonlyargs), given.kw_defaults, strict=True))
    return Arguments(
        required=(*names[skip:plain], *(n for n, d in keyword_only.items() if d is None)),
        optional=(*names[max(skip, plain) :], *(n for n, d in keyword_only.items() if d)),
        anything=given.kwarg is not None,
    )


def _of_fields(node: ast.ClassDef, inherited: Arguments) -> Arguments:
    """Return a dataclass's fields in addition to those it inherits."""
    required = dict.fromkeys(inherited.required)
    optional = dict.fromkeys(inherited.optional)
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        name, kind = line.target.id, ast.unparse(line.annotation)
        if "ClassVar" in kind or "KW_ONLY" in kind:
            continue
        required.pop(name, None)
        optional.pop(name, None)
        options = _field_options(line.value)
        if "init" in options:
            continue
        has_default = line.value is not None and (
            options is _NO_FIELD or bool({"default", "default_factory"} & options)
        )
        (optional if has_default else required)[name] = None
    return Arguments(tuple(required), tuple(optional), inherited.anything)


_NO_FIELD: frozenset[str] = frozenset({"no field()"})


def _field_options(value: ast.expr | None) -> frozenset[str]:
    """Return the keywords of a `field(...)` call, or a marker for any other default."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        return frozenset(keyword.arg for keyword in value.keywords if keyword.arg)
    return _NO_FIELD


def is_installed(module: str) -> bool:
    """Return whether a module's package is installed. A plain directory of that name does not
    count."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    return spec is not None and spec.origin is not None


def relative_import_advice(file: str, statement: ast.ImportFrom) -> str:
    """Return one sentence about a relative import in a file of that name."""
    what = f"{file} is a file of its own, not part of a package"
    if statement.level > 1:
        return (
            f"{what}: write the package's name instead of the dots, or name a task by its package, "
            "as `task: package.module:Class`, or a script as `module: package.module`"
        )
    names = ast.unparse(ast.Import(statement.names)).removeprefix("import ")
    way = f"from {statement.module} import" if statement.module else "import"
    return f"{what}: write `{way} {names}`"
