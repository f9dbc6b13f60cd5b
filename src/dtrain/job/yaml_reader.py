"""Read YAML with locations: text → `Located`, every problem at its line and column.

It differs from PyYAML's YAML 1.1 where that surprises users: `1e-3` is a number. `2:4` and
`1:30:00` are text and not base 60. `010` and dates are text. `yes` and `no` are still booleans;
where text is needed, the code that reads the value explains this.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dtrain.errors import JobError, Problem
from dtrain.job.located import Located, SourceLocation, did_you_mean

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_SCALARS = {_TAG + kind for kind in ("null", "bool", "int", "float", "str", "value")}

Locate = Callable[[yaml.Mark], SourceLocation]
_Pairs = dict[str, tuple[yaml.Node, yaml.Node]]

_SYNTAX = (  # PyYAML's messages, and dtrain's
    (r"'\\t' that cannot start", "a tab; YAML is indented with spaces"),
    (
        r"mapping values are not allowed",
        "a `:` too many: put the text in quotes, or look at the "
        "indentation of this line and the one above",
    ),
    (r"could not find expected ':'", "a `:` is missing after a key, or a quote is not closed"),
    (r"unexpected end of stream", "the file ends inside quotes that begin here"),
    (r"expected <block end>", "this line's indentation does not fit the lines above"),
    (r"but found another document", "a second document begins here (`---`); one is allowed"),
    (r"expected ',' or '[\]}]'", "a bracket is not closed, or a comma is missing"),
)


_MOST_BYTES = 1_000_000
_MOST_VALUES = 20_000  # PyYAML takes 2 s to read so many
_MOST_DIGITS = 200  # also of hexadecimal numbers; a float holds no larger number


class _TooMuch(yaml.MarkedYAMLError):
    """An error for more values than a job can have, including those that aliases multiply."""

    def __init__(self, mark: yaml.Mark) -> None:
        super().__init__(
            problem=f"more than {_MOST_VALUES} values, each counted wherever an alias repeats it; "
            "keep so much in a file that the task reads",
            problem_mark=mark,
        )


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers in the forms that users write."""

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node as PyYAML does, up to the maximum number of values."""
        self.nodes += 1
        if self.nodes > _MOST_VALUES:
            raise _TooMuch(self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, at) for tag, at in rules if tag.split(":")[-1] not in ("int", "float", "timestamp")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _TAG + "int",
    re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_FLOAT = re.compile(
    r"[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with quotes around the text '1e-3', which PyYAML would omit."""


_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML that `read_yaml` and PyYAML both read back unchanged."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False))


def inline_yaml(value: Any) -> str:
    """Return a value as YAML in one line."""
    is_flow = isinstance(value, list | dict)
    settings: Any = {"sort_keys": False, "default_flow_style": is_flow, "width": 10**6}
    text = str(yaml.dump([value], Dumper=_Dumper, **settings))
    line = text[1:-2] if is_flow else text[2:-1]
    return json.dumps(value) if "\n" in line else line


def read_text(path: Path, shown: str) -> str:
    """Return the text of a file that must be UTF-8.

    Raises:
        JobError: the file is missing, a directory, not readable or not UTF-8; the message names the
            cause.
    """
    try:
        raw = _bytes_of(path, shown)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        siblings = (
            [p.name for p in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []
        )
        message, code = f"no such file{did_you_mean(path.name, siblings)}", "file.not-found"
    except IsADirectoryError:
        message, code = "this is a directory; name the YAML file in it", "file.is-a-directory"
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        message = f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        place = SourceLocation(shown, line, column)
        raise JobError([place.problem("", message, code="file.not-utf8")]) from None
    except OSError as error:
        message, code = f"cannot be read: {error.strerror}", "file.unreadable"
    raise JobError([SourceLocation(shown).problem("", message, code=code)])


def _bytes_of(path: Path, shown: str) -> bytes:
    """Return the contents of a file. A pipe or a device may never end, so it is refused."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        if not stat.S_ISREG(mode):
            message = "this is a pipe or a device; name a regular file"
            raise JobError([SourceLocation(shown).problem("", message, code="file.not-regular")])
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        message = f"more than {_MOST_BYTES // 1_000_000} MB: too large for a job or a profile"
        raise JobError([SourceLocation(shown).problem("", message, code="file.too-large")])
    return raw


def read_yaml(text: str, locate: Locate) -> tuple[Located | None, list[Problem]]:
    """Read one YAML document.

    Args:
        text: the document.
        locate: a function from PyYAML's mark to the location that is shown to users.

    Returns:
        The values, or None when nothing could be read or the document is empty; and the problems.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        reader = _Reader(loader, locate)
        written = reader.value(node, None)
        return written, list(dict.fromkeys(reader.problems))
    except _TooMuch as error:
        mark = error.problem_mark or _mark(text, 0)
        return None, [locate(mark).problem("", str(error.problem), code="yaml.too-many-values")]
    except yaml.MarkedYAMLError as error:
        return None, [_syntax_problem(error, locate)]
    except yaml.reader.ReaderError as error:
        mark = _mark(text, error.position)
        message = f"character {text[error.position]!r} is not allowed"
        return None, [locate(mark).problem("", message, code="yaml.syntax")]
    except RecursionError:
        message = "nested too deeply, or an alias that contains itself"
        return None, [locate(_mark(text, 0)).problem("", message, code="yaml.too-deep")]


def in_file(shown: str, origin: str = "") -> Locate:
    """Return a function from marks to locations in a file, named as users see it."""
    return lambda mark: SourceLocation(shown, mark.line + 1, mark.column + 1, origin)


def _mark(text: str, position: int) -> yaml.Mark:
    line = text.count("\n", 0, position)
    column = position - text.rfind("\n", 0, position) - 1
    return yaml.Mark("", position, line, column, None, 0)


def _syntax_problem(error: yaml.MarkedYAMLError, locate: Locate) -> Problem:
    words = f"{error.problem}"
    mark = error.problem_mark or error.context_mark or _mark("", 0)
    for pattern, message in _SYNTAX:
        if re.search(pattern, words):
            if "inside quotes" in message:
                mark = error.context_mark or mark
            return locate(mark).problem("", message, code="yaml.syntax")
    return locate(mark).problem("", f"not YAML: {words}", code="yaml.syntax")


def _is_text(value: str) -> bool:
    r"""Return whether a text is free of lone surrogates, which `\\ud800` in quotes may be."""
    return re.search("[\ud800-\udfff]", value) is None


class _Reader:
    """A converter from PyYAML's nodes to `Located`, which also collects problems."""

    def __init__(self, loader: _Loader, locate: Locate) -> None:
        self.loader = loader
        self.locate = locate
        self.problems: list[Problem] = []
        self.merged: dict[int, _Pairs] = {}
        """The pairs of sections that were read before, by the id of their node."""
        self.count = 0

    def take(self, node: yaml.Node, count: int) -> None:
        """Count values. A value that an alias repeats is read and kept for each repetition."""
        self.count += count
        if self.count > _MOST_VALUES:
            raise _TooMuch(node.start_mark)

    def value(self, node: yaml.Node, key: yaml.Node | None) -> Located:
        self.take(node, 1)
        place = self.locate(node.start_mark)
        key_place = None if key is None else self.locate(key.start_mark)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            pairs = self.pairs(node)
            inside = {name: self.value(part, at) for name, (at, part) in pairs.items()}
            return Located(inside, place, key_place)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return Located([self.value(part, None) for part in node.value], place, key_place)
        raw = node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None
        return Located(self.scalar(node), place, key_place, raw)

    def scalar(self, node: yaml.Node) -> Any:
        try:
            if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
                self.take(node, len(node.value) // 100)
                if not _is_text(node.value):
                    self.add_problem(
                        node,
                        "an escape sequence that is not a character",
                        code="yaml.value-unsupported",
                    )
                    return None
                if node.tag == _TAG + "int" and len(node.value) > _MOST_DIGITS:
                    text = f"a whole number of more than {_MOST_DIGITS} digits"
                    self.add_problem(node, text, code="yaml.value-unsupported")
                    return None
                return self.loader.construct_object(node)
        except (ValueError, KeyError):
            pass
        tag = node.tag.replace(_TAG, "!!")
        text = f"a value of type {tag} is not understood here; write plain values"
        self.add_problem(node, text, code="yaml.value-unsupported")
        return None

    def pairs(self, node: yaml.MappingNode) -> _Pairs:
        """Return name → (key, value) with merge keys (`<<`) resolved. Pairs of the section itself
        win."""
        if id(node) not in self.merged:
            self.merged[id(node)] = self.resolved(node)
        return self.merged[id(node)]

    def resolved(self, node: yaml.MappingNode) -> _Pairs:
        """Return the pairs of a section that was not read before."""
        own: _Pairs = {}
        merged: _Pairs = {}
        for key, part in node.value:
            if key.tag == _MERGE:
                for source in part.value if isinstance(part, yaml.SequenceNode) else [part]:
                    if isinstance(source, yaml.MappingNode):
                        merged = {**self.pairs(source), **merged}
                        self.take(source, len(merged))
                    else:
                        text = "only a section can be merged with `<<`"
                        self.add_problem(source, text, code="yaml.merge-without-section")
                continue
            is_text = isinstance(key, yaml.ScalarNode) and _is_text(key.value)
            if not is_text or key.tag != _TAG + "str":
                self.add_problem(key, self.odd_key(key), code="yaml.key-not-text")
            elif key.value in own:
                first = own[key.value][0].start_mark
                text = f"{key.value!r} is given twice, first on line {first.line + 1}"
                self.add_problem(key, text, code="yaml.duplicate-key")
            else:
                own[key.value] = (key, part)
        return {**merged, **own}

    def odd_key(self, key: yaml.Node) -> str:
        if not isinstance(key, yaml.ScalarNode):
            return "a key must be one word; is a quote missing?"
        word = key.value or "nothing"
        reads = f", and YAML reads {word} as a boolean" if key.tag == _TAG + "bool" else ""
        return f'a key must be text{reads}: put it in quotes: "{word}"'

    def add_problem(self, node: yaml.Node, message: str, *, code: str) -> None:
        self.problems.append(self.locate(node.start_mark).problem("", message, code=code))
