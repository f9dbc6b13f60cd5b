"""Every code that the sources can raise, and the messages that come with it, found by AST.

`cd tests && python -m support.codes` generates tests/golden/messages.txt.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support import ROOT

SRC = ROOT / "src"
GOLDEN = ROOT / "tests" / "golden" / "messages.txt"
FORM = re.compile(r"[a-z]+\.[a-z0-9]+(-[a-z0-9]+)*")

_HEAD = """\
# Each code of an error, and below it every message that comes with it, as the sources have them.
# {…} is a value. <…> is an expression that makes the text, where the text is not written out.
# `cd tests && python -m support.codes` generates this file.
"""
_DEEP = 4
_PLACES = {"problem": 1, "add_problem": 1, "BadParameter": 0}
"""Calls that make a problem → which argument is the message."""
_RECORDS = {"record_node": 2, "of_node": 0, "of_worker": 1}
"""Calls that make a failure record → which argument is the message."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Site:
    """A place in the sources that makes an error, a problem, a finding or a failure record."""

    place: str
    codes: tuple[str, ...]
    messages: tuple[str, ...]
    passed_on: bool = False
    """Whether the code is that of something else: of an error, or of an argument."""


@dataclass
class Module:
    name: str
    path: Path
    tree: ast.Module
    functions: dict[str, list[Function]] = field(default_factory=dict)
    constants: dict[str, ast.expr] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name here → (module of dtrain, name there; empty for the module itself)."""


@functools.cache
def modules() -> dict[str, Module]:
    """All of dtrain but the tables of codes."""
    found = {}
    for path in sorted((SRC / "dtrain").rglob("*.py")):
        name = ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        if not name.startswith("dtrain.codes"):
            found[name] = _module(name, path)
    return found


def _module(name: str, path: Path) -> Module:
    made = Module(name, path, ast.parse(path.read_text()))
    for node in ast.walk(made.tree):
        if isinstance(node, Function):
            made.functions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dtrain"):
            for each in node.names:
                whole = f"{node.module}.{each.name}"
                is_module = (SRC / whole.replace(".", "/")).with_suffix(".py").exists()
                target = (whole, "") if is_module else (node.module, each.name)
                made.imported[each.asname or each.name] = target
    for line in made.tree.body:
        for target, value in _assigned(line):
            made.constants[target] = value
    return made


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The names of a target; of what a call returns several, each as a subscript of the call."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple):
        for index, each in enumerate(target.elts):
            part: ast.expr = ast.Subscript(value, ast.Constant(index))
            if isinstance(value, ast.Tuple):
                part = value.elts[index]
            yield from _unpacked(each, part)


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement or an expression gives values to."""
    if isinstance(node, ast.AnnAssign | ast.NamedExpr) and isinstance(node.target, ast.Name):
        if node.value is not None:
            yield node.target.id, node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _unpacked(target, node.value)


# -- classes of errors -----------------------------------------------------------------------------


@functools.cache
def family() -> dict[str, tuple[Module, ast.ClassDef]]:
    """DtrainError and every class below it, by name."""
    classes = {
        node.name: (module, node)
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"DtrainError"}
    while more := {n for n, (_, node) in classes.items() if found & {*_bases(node)}} - found:
        found |= more
    return {name: classes[name] for name in found}


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def own_code(name: str) -> str:
    """The code that a class has for all its errors; empty where each error has its own."""
    if name not in family():
        return ""
    _, node = family()[name]
    for line in node.body:
        for target, value in _assigned(line):
            if target == "code" and isinstance(value, ast.Constant) and value.value:
                return str(value.value)
    return next((code for base in _bases(node) if (code := own_code(base))), "")


def _text_of_class(name: str) -> tuple[ast.expr, Module, Function] | None:
    """What a class tells that makes its text of its arguments, as DamagedError does."""
    module, node = family()[name]
    for function in node.body:
        if not isinstance(function, Function) or function.name != "__init__":
            continue
        takes = {each.arg for each in function.args.args}
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
                text = call.args[0]
                if not (isinstance(text, ast.Name) and text.id in takes):
                    return text, module, function
    return None


# -- reading expressions ---------------------------------------------------------------------------

Place = tuple[tuple[int, int], ...]
"""Where a node is: of each block around it, outermost first, the id and the line in it."""
_LEAVES = (ast.Raise, ast.Return, ast.Continue, ast.Break)


@functools.cache
def places(function: Function) -> dict[ast.AST, tuple[Place, bool]]:
    """Each node of a function → where it is, and whether its block leaves at its end."""
    found: dict[ast.AST, tuple[Place, bool]] = {}

    def visit(node: ast.AST, place: Place, leaves: bool) -> None:
        found[node] = place, leaves
        for _, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            is_block = bool(parts) and all(isinstance(part, ast.stmt) for part in parts)
            out = is_block and isinstance(parts[-1], _LEAVES)
            for index, part in enumerate(parts):
                if isinstance(part, ast.AST):
                    inner = (*place, (id(value), index)) if is_block else place
                    visit(part, inner, out if is_block else leaves)

    visit(function, (), False)
    return found


def _before(first: Place, then: Place) -> bool:
    """Whether what is at one place has been run in any case when the other is reached."""
    *around, (block, index) = first or ((0, 0),)
    if then[: len(around)] != tuple(around) or len(then) <= len(around):
        return False
    other, line = then[len(around)]
    return other == block and index <= line


class Reader:
    """Reads what the expressions in one function can be."""

    def __init__(self, module: Module, function: Function | None, deep: int = _DEEP) -> None:
        self.module = module
        self.function = function
        self.deep = deep
        self.arguments = set[str]()
        if function is not None:
            takes = function.args
            every = (*takes.posonlyargs, *takes.args, *takes.kwonlyargs)
            self.arguments = {each.arg for each in every}

    def values(self, node: ast.Name) -> list[ast.expr]:
        """All that a name can have been set to when it is used, in the function or the module."""
        found = [value for _, value in self.settings(node)]
        known = self.module.constants
        if not found and node.id not in self.arguments and node.id in known:
            found = [known[node.id]]
        return found

    def settings(self, node: ast.Name) -> list[tuple[ast.AST, ast.expr]]:
        """The assignments of a function that can have set a name, with their values."""
        if self.function is None:
            return []
        at = places(self.function)
        here = at[node][0]
        found: list[tuple[ast.AST, ast.expr]] = []
        for each, (place, leaves) in at.items():
            if getattr(each, "lineno", node.lineno + 1) > node.lineno:
                continue
            if node in ast.walk(each) and isinstance(each, ast.Assign):
                continue
            for target, value in _assigned(each):
                if target == node.id and _before(place, here):
                    found = [(each, value)]
                elif target == node.id and not leaves:
                    found.append((each, value))
        return found

    def called(self, call: ast.Call) -> list[tuple[Module, Function]]:
        """The functions of dtrain that a call can mean."""
        module, name = self.module, ""
        if isinstance(call.func, ast.Name):
            name = call.func.id
            if name not in module.functions and name in module.imported:
                target, name = module.imported[name]
                module = modules().get(target, module)
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            target, inside = module.imported.get(call.func.value.id, ("", "?"))
            if call.func.value.id in ("self", "cls"):
                name = call.func.attr
            elif not inside and target in modules():
                module, name = modules()[target], call.func.attr
        return [(module, function) for function in module.functions.get(name, [])]

    def returned(self, call: ast.Call) -> Iterator[tuple[Reader, ast.expr]]:
        """What the functions of a call can return, each with a reader of its own."""
        for module, function in self.called(call) if self.deep else []:
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield Reader(module, function, self.deep - 1), node.value

    def parts(self, call: ast.Call, index: int) -> list[tuple[Reader, ast.expr]]:
        """What a call can return at a place of a tuple."""
        if ast.unparse(call.func).endswith("from_zero"):  # the ranks get what rank 0 has given
            inside = call.args[0]
            return [(self, inside.elts[index])] if isinstance(inside, ast.Tuple) else []
        returned = self.returned(call)
        return [
            (there, each.elts[index]) for there, each in returned if isinstance(each, ast.Tuple)
        ]

    def codes(self, node: ast.expr) -> list[str]:
        """The codes that an expression can be; empty where it is that of something else."""
        match node:
            case ast.Constant(value=str(text)):
                return [text] if FORM.fullmatch(text) else []
            case ast.IfExp():
                return [*self.codes(node.body), *self.codes(node.orelse)]
            case ast.BoolOp():
                return [code for each in node.values for code in self.codes(each)]
            case ast.JoinedStr(values=[ast.FormattedValue(value=ast.Name(id="area")), last]):
                assert isinstance(last, ast.Constant)
                return [f"{area}{last.value}" for area in areas()]
            case ast.Name():
                return [code for value in self.values(node) for code in self.codes(value)]
            case ast.Subscript(value=ast.Name(id=name) as table) if name.endswith("_CODES"):
                listed = [each for value in self.values(table) for each in _listed(value)]
                return [code for each in listed for code in self.codes(each)]
            case ast.Subscript(value=ast.Call() as call, slice=ast.Constant(value=int(index))):
                return [c for there, each in self.parts(call, index) for c in there.codes(each)]
            case ast.Call():
                found = [
                    code for reader, value in self.returned(node) for code in reader.codes(value)
                ]
                given = [each.value for each in node.args if isinstance(each, ast.Constant)]
                mine = [area for area in areas() if area in given]  # code_of(kind, "option")
                return [c for c in found if not mine or c.split(".")[0] in mine]
            case _:
                return []

    def texts(self, node: ast.expr) -> list[str]:
        """The texts that an expression can be, with `{…}` for values."""
        match node:
            case ast.Constant(value=None):
                return []
            case ast.Constant(value=str(text)):
                return [text] if text else []
            case ast.JoinedStr():
                return ["".join(map(_part, node.values))]
            case ast.IfExp():
                return [*self.texts(node.body), *self.texts(node.orelse)]
            case ast.BoolOp(op=ast.And()):
                return self.texts(node.values[-1])
            case ast.BoolOp():
                return [text for each in node.values for text in self.texts(each)]
            case ast.BinOp(op=ast.Add()):
                left, right = self.texts(node.left), self.texts(node.right)
                return [first + last for first in left for last in right]
            case ast.Name() if self.deep:
                found = Reader(self.module, self.function, self.deep - 1)
                values = [text for each in self.values(node) for text in found.texts(each)]
                return values or [f"<{node.id}>"]
            case ast.Subscript(value=ast.Call() as call, slice=ast.Constant(value=int(index))):
                values = [t for there, each in self.parts(call, index) for t in there.texts(each)]
                return values or [_source(node)]
            case ast.Call():
                values = [
                    text for reader, each in self.returned(node) for text in reader.texts(each)
                ]
                return values or [_source(node)]
            case _:
                return [_source(node)]


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    assert isinstance(node, ast.Constant)
    return str(node.value)


def _source(node: ast.expr) -> str:
    return f"<{' '.join(ast.unparse(node).split())}>"


@functools.cache
def areas() -> tuple[str, ...]:
    """Of what the fields can be that pydantic checks."""
    from typing import get_args

    from dtrain.job.errors import Area

    return get_args(Area)


# -- the sites -------------------------------------------------------------------------------------


@functools.cache
def sites() -> tuple[Site, ...]:
    """All places that make something with a code, in order."""
    found = [site for module in modules().values() for site in _sites_in(module)]
    return tuple(found)


def _sites_in(module: Module) -> Iterator[Site]:
    for node, function in _with_functions(module.tree, None):
        reader = Reader(module, function)
        place = f"{module.path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        made = _pairs(node, reader) or _made_by(node, reader)
        for codes, messages, passed_on in made:
            yield Site(place, tuple(codes), tuple(messages), passed_on)


def _with_functions(
    node: ast.AST, function: Function | None
) -> Iterator[tuple[ast.AST, Function | None]]:
    for child in ast.iter_child_nodes(node):
        inside = child if isinstance(child, Function) else function
        yield child, inside
        yield from _with_functions(child, inside)


Made = tuple[list[str], list[str], bool]


def _pairs(node: ast.AST, reader: Reader) -> list[Made]:
    """Codes with messages of a call where both are names that are set together."""
    if not isinstance(node, ast.Call) or not node.args:
        return []
    given = [each.value for each in node.keywords if each.arg == "code"]
    text = node.args[-1]
    if not given or not isinstance(given[0], ast.Name) or not isinstance(text, ast.Name):
        return []
    codes = dict(reader.settings(given[0]))
    texts = dict(reader.settings(text))
    return [
        (reader.codes(codes[line]), reader.texts(texts[line]), False)
        for line in codes
        if line in texts and len(codes) > 1
    ]


def _made_by(node: ast.AST, reader: Reader) -> Iterator[Made]:
    if isinstance(node, ast.Call):
        yield from _by_call(node, reader)
    elif isinstance(node, ast.Tuple) and len(node.elts) == 3:  # a FieldProblem
        codes = reader.codes(node.elts[2]) if isinstance(node.ctx, ast.Load) else []
        if codes and isinstance(node.elts[0], ast.Tuple):
            yield codes, reader.texts(node.elts[1]), False
    for name, value in _assigned(node):
        if name.endswith("_CODES"):
            yield [code for each in _listed(value) for code in reader.codes(each)], [], False


def _listed(value: ast.expr) -> list[ast.expr]:
    """The values of a table of codes."""
    if isinstance(value, ast.Dict):
        return value.values
    rows = value.elts if isinstance(value, ast.Tuple) else []
    return [each for row in rows if isinstance(row, ast.Tuple) for each in row.elts]


def _by_call(call: ast.Call, reader: Reader) -> Iterator[Made]:
    name = _name_of(call, reader)
    given = next((each.value for each in call.keywords if each.arg in ("code", "error_code")), None)
    codes = [] if given is None else reader.codes(given)
    passed_on = given is not None and not codes and _is_passed_on(given, reader)
    if name in family() and name != "JobError":
        codes = codes or [code for code in [own_code(name)] if code]
        yield codes, _of_class(name, call, reader), passed_on
    elif name in ("ValueError", "WrongTypeError"):
        if code := _of_value_error(name, reader):
            yield [code], reader.texts(call.args[0]), False
    elif name == "BadParameter":
        yield ["usage.invalid-value"], reader.texts(call.args[0]), False
    elif name == "Finding" or (name == "finding" and len(call.args) > 1):
        yield _of_finding(call, reader, of_case=name == "finding")
    elif name in _RECORDS and len(call.args) > _RECORDS[name]:
        kinds = [call.args[0]] if name == "of_worker" else []
        kinds += [each.value for each in call.keywords if each.arg == "kind"]
        kind = kinds[0].value if kinds and isinstance(kinds[0], ast.Constant) else "agent"
        if codes or not kinds or isinstance(kinds[0], ast.Constant):
            yield codes or [kind_codes()[str(kind)]], reader.texts(call.args[_RECORDS[name]]), False
    elif _is_problem(call, name):
        yield codes, reader.texts(call.args[min(_PLACES[name], len(call.args) - 1)]), passed_on
    elif codes:
        yield codes, reader.texts(call.args[0]) if "code" in _keywords(call) else [], False


def _name_of(call: ast.Call, reader: Reader) -> str:
    """What is called: a name, or the class of errors that a variable holds."""
    if isinstance(call.func, ast.Name) and call.func.id not in family():
        held = [each for value in reader.values(call.func) for each in ast.walk(value)]
        kinds = [each.id for each in held if isinstance(each, ast.Name) and each.id in family()]
        if kinds:
            return kinds[0]
    return ast.unparse(call.func).rpartition(".")[2]


def _is_problem(call: ast.Call, name: str) -> bool:
    if name not in ("problem", "add_problem") or not isinstance(call.func, ast.Attribute):
        return False
    if all(isinstance(each, ast.Constant) and not each.value for each in call.args):
        return False  # it only makes the place into text
    named = ast.unparse(call.func.value) == "named"
    return "code" in _keywords(call) or (name == "problem" and (named or len(call.args) > 1))


def _keywords(call: ast.Call) -> list[str | None]:
    return [each.arg for each in call.keywords]


def _is_passed_on(node: ast.expr, reader: Reader) -> bool:
    """Whether a code is an argument, part of a tuple that is gone through, or of another thing."""
    if isinstance(node, ast.Name):
        return not reader.values(node)
    return ast.unparse(node).endswith((".code", "['code']"))


def _of_class(name: str, call: ast.Call, reader: Reader) -> list[str]:
    own = _text_of_class(name)
    if own is not None:
        text, module, function = own
        said = Reader(module, function).texts(text)
        for argument, value in zip(function.args.args[1:], call.args, strict=False):
            if isinstance(value, ast.Constant | ast.JoinedStr):
                written = reader.texts(value)[0]
                said = [each.replace(f"{{{argument.arg}}}", written) for each in said]
        return said
    return reader.texts(call.args[0]) if call.args else []


def _of_value_error(name: str, reader: Reader) -> str:
    """The code under which a ValueError of a field's check is told."""
    parts = reader.module.name.split(".")
    if parts[1] == "job":
        return "job.invalid-value" if name == "ValueError" else "job.wrong-type"
    if parts[1] == "launchers" and parts[-1] == "options" and reader.function is not None:
        after = any("after" in ast.unparse(each) for each in reader.function.decorator_list)
        return "option.conflict" if after else "option.invalid-value"
    return ""


def _of_finding(call: ast.Call, reader: Reader, *, of_case: bool) -> Made:
    from dtrain.verification import rules

    given = [*call.args[2:3], *(each.value for each in call.keywords if each.arg == "rule")]
    rule = (given[0] if given else ast.Name("GRADIENT")) if of_case else call.args[0]
    names = [each.id for each in ast.walk(rule) if isinstance(each, ast.Name)]
    known = [name for name in names if isinstance(getattr(rules, name, None), str)]
    codes = [rules.RULE_CODES[getattr(rules, name)] for name in known]
    return codes, reader.texts(call.args[0 if of_case else 1]), not codes


def kind_codes() -> dict[str, str]:
    from dtrain.run.failures import KIND_CODES

    return {str(kind): code for kind, code in KIND_CODES.items()}


# -- the golden file -------------------------------------------------------------------------------


def messages() -> dict[str, list[str]]:
    """Code → its messages, in order of the codes; what only passes a message on is left out."""
    found: dict[str, dict[str, None]] = {}
    for site in sites():
        for code in site.codes:
            found.setdefault(code, {}).update(dict.fromkeys(site.messages))
    return {code: list(found[code]) for code in sorted(found)}


def golden() -> str:
    """What tests/golden/messages.txt has to be."""
    blocks = [
        "\n".join([code, *(f"    {text}".replace("\n", "\\n") for text in texts)])
        for code, texts in messages().items()
    ]
    return "\n".join([_HEAD, *blocks, ""])


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden())
