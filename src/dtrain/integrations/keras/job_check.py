"""The checks of a Keras job that need no import of Keras."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from dtrain import catalog
from dtrain.errors import Problem
from dtrain.job.frameworks import JobCheck, NamedClass
from dtrain.job.located import Located, SourceLocation, shown_path
from dtrain.job.static_source import Source

_BACKEND = "KERAS_BACKEND"


class KerasCheck(JobCheck):
    def of_class(
        self, named: NamedClass, name: str, file: Path, source: Source
    ) -> Iterator[Problem]:
        if named.field != ("task",) or not _is_keras(source, name):
            return
        if problem := catalog.FRAMEWORKS["keras"].needs.problem("the task"):
            yield named.problem(problem, code="plan.missing-package")
        yield from _strategy_problems(named.root)
        yield from _backend_problems(named)
        for call in source.calls("compile"):
            for keyword in call.keywords:
                message = _compile_problem(keyword)
                if message:
                    line, column = keyword.lineno, keyword.col_offset + 1
                    location = SourceLocation(shown_path(file), line, column)
                    yield location.problem("", message, code="keras.compile-argument")


def _is_keras(source: Source, name: str) -> bool:
    """Return whether a name is a KerasTask, or a function in a file that imports Keras."""
    if source.derives(name, "KerasTask"):
        return True
    found = source.definitions.get(name, [])
    return len(found) == 1 and isinstance(found[0], ast.FunctionDef) and source.imports("keras")


def _strategy_problems(root: Located) -> Iterator[Problem]:
    strategy = root.get(("strategy",))
    if strategy is not None and strategy.value == "fsdp":
        message = (
            "strategy 'fsdp' cannot shard the variables of Keras; use 'ddp': single, dp, ddp and "
            "exact work"
        )
        yield strategy.place.problem("strategy", message, code="plan.unsupported-combination")


def _backend_problems(named: NamedClass) -> Iterator[Problem]:
    """Check the backend in the job's variables, or in this process's, which workers inherit."""
    given = named.root.get(("launch", "env", _BACKEND))
    backend = given.value if given else os.environ.get(_BACKEND, "torch")
    if backend != "torch":
        where = f"launch.env.{_BACKEND}" if given else "task"
        message = (
            f"{_BACKEND} is {backend!r}{'' if given else ' in the environment'}, and dtrain trains "
            f"with 'torch': leave it unset, or give --env {_BACKEND}=torch"
        )
        place = given.place if given else named.place
        yield place.problem(where, message, code="keras.other-backend")


def _compile_problem(keyword: ast.keyword) -> str | None:
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    if keyword.arg == "jit_compile" and value is True:
        return (
            "compile(jit_compile=True) is for fit, and dtrain does not compile models; leave it out"
        )
    if keyword.arg == "steps_per_execution" and isinstance(value, int) and value > 1:
        return f"compile(steps_per_execution={value}): Keras supports it on other backends only"
    return None
