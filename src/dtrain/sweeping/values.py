"""The values of a sweep: what `--sweep` and `--sweep-file` mean, and which runs they make."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.environ import may_contain_secret
from dtrain.errors import JobError, Problem, UsageError
from dtrain.job.load import field_keys
from dtrain.job.located import Located, SourceLocation, dotted, shown_path
from dtrain.job.yaml_reader import in_file, read_text, read_yaml
from dtrain.words import counted

MOST_RUNS = 10_000
Values = Mapping[str, Located]
"""The values of one run: the dotted name of each field, with its value and where it is written."""

_VALUE = re.compile(r"""(?:[^,\[\]{}()"']|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|"[^"]*"|'[^']*')+""")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})|log\(({_NUMBER})\.\.({_NUMBER})\)")


@dataclass(frozen=True)
class _Range:
    """All numbers between two, both included."""

    low: float
    high: float
    is_log: bool
    """Whether each power of ten gets as many samples as any other."""
    place: SourceLocation

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def sample(self, numbers: random.Random) -> Located:
        low, high = self.low, self.high
        if self.is_log:
            low, high = math.log(low), math.log(high)
        elif self.is_whole:
            return Located.of(numbers.randint(int(low), int(high)), self.place)
        drawn = numbers.uniform(low, high)
        drawn = math.exp(drawn) if self.is_log else drawn
        return Located.of(round(drawn) if self.is_whole else float(f"{drawn:.6g}"), self.place)


_Choice = Sequence[Values] | _Range
"""The values of a field, or of the rows of a file, from which each run has one."""


def choices(
    texts: Sequence[str], file: str | None, sample: int | None, given: Iterable[str] = ()
) -> list[Values]:
    """Return the values of each run.

    Args:
        texts: the texts of `--sweep`: `args.lr=0.1,0.01`, `seed=0..4`, `args.lr=log(1e-5..1e-1)`.
        file: a YAML file with a list; each item has the fields and values of some runs.
        sample: how many random combinations to take. None means all.
        given: fields that other flags set, and that a sweep must not set as well.

    Raises:
        UsageError: a text does not have its form, a field is given twice, or there are too many
            runs.
        JobError: the file is wrong; the error has each place.
    """
    rows = [] if file is None else _rows(Path(file))
    named = [_name_of(text) for text in texts] + list({name: 0 for row in rows for name in row})
    if twice := [name for name in named if named.count(name) > 1 or name in set(given)]:
        raise UsageError(f"{twice[0]} is given twice", code="usage.sweep-repeats")
    fields = dict(_field(text) for text in texts)
    return _combined({**fields, **({"": rows} if rows else {})}, sample)


def choices_of(values: Mapping[str, Sequence[Any]], sample: int | None, place: str) -> list[Values]:
    """Return the values of each run, from a list of values for each field.

    Args:
        values: the dotted name of each field, with its values.
        sample: how many random combinations to take. None means all.
        place: the call that has given them, for errors.

    Raises:
        UsageError: a field has no values, or the same one twice, or there are too many runs.
    """
    for name, listed in values.items():
        if isinstance(listed, str) or not isinstance(listed, Sequence) or not listed:
            text = f"{place}: {name} needs a list of values, not {listed!r}"
            raise UsageError(text, code="usage.sweep-syntax")
    where = SourceLocation(place)
    fields = {
        name: [{name: Located.of(value, where)} for value in listed]
        for name, listed in values.items()
    }
    return _combined(fields, sample)


def _combined(parts: Mapping[str, _Choice], sample: int | None) -> list[Values]:
    """Return all combinations, or random ones. No two runs may be the same."""
    found = _grid(parts) if sample is None else _sampled(parts, sample)
    seen: set[str] = set()
    for each in found:
        text = ", ".join(f"{name}={value.plain()!r}" for name, value in each.items())
        if text in seen:
            raise UsageError(f"two runs would have {text}", code="usage.sweep-repeats")
        seen.add(text)
    return found


def _grid(parts: Mapping[str, _Choice]) -> list[Values]:
    """Return all combinations; the last field changes fastest."""
    lists = []
    for name, part in parts.items():
        if isinstance(part, _Range):
            if part.is_log or not part.is_whole:
                raise UsageError(
                    f"{part.place.file}: a range of numbers needs --sample N; without it, list the "
                    f"values of {name}",
                    code="usage.sweep-range",
                )
            _refuse_many(int(part.high) - int(part.low) + 1)
            whole = range(int(part.low), int(part.high) + 1)
            part = [{name: Located.of(number, part.place)} for number in whole]
        lists.append(part)
    _refuse_many(math.prod(map(len, lists)))
    return [_merged(parts) for parts in itertools.product(*lists)]


def _sampled(parts: Mapping[str, _Choice], count: int) -> list[Values]:
    """Return random combinations, each once. More of them begin with the same ones."""
    _refuse_many(count)
    sizes = [_size(part) for part in parts.values()]
    if math.prod(sizes) < count:
        raise _too_few(count, int(math.prod(sizes)))
    numbers = random.Random(0)
    found: dict[str, Values] = {}
    for _ in range(1000 * count):  # the last ones of a small number of combinations come seldom
        if len(found) == count:
            return list(found.values())
        drawn = [
            {name: part.sample(numbers)} if isinstance(part, _Range) else numbers.choice(part)
            for name, part in parts.items()
        ]
        values = _merged(drawn)
        found.setdefault(repr([value.plain() for value in values.values()]), values)
    raise _too_few(count, len(found))


def _too_few(count: int, found: int) -> UsageError:
    text = f"--sample {count}: there are only {counted(found, 'combination')}"
    return UsageError(text, code="usage.sweep-too-few")


def _size(part: _Choice) -> float:
    if not isinstance(part, _Range):
        return len(part)
    return part.high - part.low + 1 if part.is_whole else math.inf


def _merged(parts: Iterable[Values]) -> Values:
    return {name: value for part in parts for name, value in part.items()}


def _refuse_many(count: int) -> None:
    if count > MOST_RUNS:
        text = f"these are {count} runs, and a sweep has at most {MOST_RUNS}; take --sample N"
        raise UsageError(text, code="usage.sweep-too-many")


def _name_of(text: str) -> str:
    return dotted(field_keys(text.partition("=")[0].strip()))


def _field(text: str) -> tuple[str, _Choice]:
    """Parse `args.lr=0.1,0.01` or a range. A list in brackets is one value."""
    place = SourceLocation(f"--sweep {text}")
    name, _, listed = text.partition("=")
    written = _VALUE.findall(listed)
    if not name.strip() or not written or ",".join(written) != listed:
        raise _syntax(text)
    name = _name_of(text)
    if len(written) == 1 and (match := _RANGE.fullmatch(written[0].strip())):
        plain_low, plain_high, log_low, log_high = match.groups()
        low, high = _number(plain_low or log_low), _number(plain_high or log_high)
        if low >= high or (log_low and low <= 0):
            raise _syntax(text)
        return name, _Range(low, high, bool(log_low), place)
    return name, list(_listed(name, written, place, text))


def _listed(
    name: str, written: Sequence[str], place: SourceLocation, text: str
) -> Iterator[Values]:
    for each in written:
        secret = name.startswith("launch.env.") or may_contain_secret(f"{name}={each}")
        where = SourceLocation(f"--sweep {name}" if secret else f"--sweep {name}={each.strip()}")
        value, problems = read_yaml(each, partial(_same, where))
        if problems or not each.strip():
            raise _syntax(text)
        yield {name: value or Located(None, where)}


def _same(place: SourceLocation, _mark: object) -> SourceLocation:
    return place


def _number(text: str) -> float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _syntax(text: str) -> UsageError:
    return UsageError(
        f"--sweep {text}: expected FIELD=VALUE,VALUE,…, for example args.lr=0.1,0.01, or a range "
        "such as seed=0..4 or args.lr=log(1e-5..1e-1)",
        code="usage.sweep-syntax",
    )


def _rows(path: Path) -> list[Values]:
    """Read the list of a file. An item is `{args.lr: 0.1, seed: 3}`.

    Raises:
        JobError: it is not such a list.
    """
    shown = shown_path(path)
    root, problems = read_yaml(read_text(path, shown), in_file(shown, ""))
    if not problems and (root is None or not isinstance(root.value, list) or not root.value):
        where = SourceLocation(shown) if root is None else root.place
        problems = [_row_problem(where)]
    if problems or root is None:
        raise JobError(problems)
    wrong = [row for row in root.value if not isinstance(row.value, dict) or not row.value]
    if wrong:
        raise JobError([_row_problem(row.place) for row in wrong])
    return [
        {dotted(field_keys(name)): value for name, value in row.value.items()} for row in root.value
    ]


def _row_problem(place: SourceLocation) -> Problem:
    text = "expected a list whose items are the values of one run, such as `- {args.lr: 0.1}`"
    return place.problem("", text, code="sweep.file-shape")
