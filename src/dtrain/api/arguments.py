"""The keyword arguments that `launch`, `plan` and `resume` share, and the `Request` they become."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from dtrain.errors import UsageError
from dtrain.run.lookup import runs_location

if TYPE_CHECKING:
    from dtrain.job.located import Located
    from dtrain.planning import Request

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ResumeArguments(TypedDict, total=False):
    """The arguments of every attempt. The last ones are sections of job.yaml."""

    launcher: str | None
    nodes: int | str | None
    gpus: int | None
    procs: int | None
    strategy: str | None
    max_restarts: int | None
    set: Mapping[str, Any] | None
    env: Mapping[str, str] | None
    options: Mapping[str, Any] | None
    runs: str | os.PathLike[str] | None
    preflight: bool
    args: Mapping[str, Any]
    train: Mapping[str, Any]
    data: Mapping[str, Any]
    eval: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    checks: Mapping[str, Any]
    log: Mapping[str, Any]
    lightning: Mapping[str, Any]
    fsdp: Mapping[str, Any]
    profile: Mapping[str, Any]
    launch: Mapping[str, Any]


class LaunchArguments(ResumeArguments, total=False):
    """The arguments of a new run."""

    trainer: str | None
    seed: int | None
    name: str | None
    script_args: Sequence[str]
    accelerate_config: str | None
    run_id: str | None


_NO_FIELD = {"set", "env", "options", "runs", "launcher", "run_id", "preflight"}
_DEFAULTS = {"script_args": ()}


def request(function: str, arguments: ResumeArguments, kind: type[Any]) -> Request:
    """Return the request that the keyword arguments of a call make.

    Args:
        function: the function that was called. Errors name it, for example `launch(procs=…)`.
        arguments: its keyword arguments.
        kind: the `TypedDict` that defines these arguments.

    Raises:
        UsageError: an argument is unknown or has an invalid value.
    """
    from dtrain.planning import Request

    given = cast("dict[str, Any]", arguments)
    for name in (given.keys() & _NO_FIELD) - kind.__annotations__.keys():
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return Request(
        launcher=given.get("launcher"),
        runs=runs_location(given.get("runs")),
        run_id=given.get("run_id"),
        preflight=given.get("preflight", False),
        fields=dict(_fields(function, given)),
        options={
            name: _located(f"{function}(options={{'{name}': …}})", value)
            for name, value in _mapping(function, "options", given).items()
        },
    )


def sections(arguments: ResumeArguments) -> dict[str, Any]:
    """Return the keyword arguments that are fields of job.yaml under the same name."""
    from dtrain.planning import FIELDS

    return {
        name: value
        for name, value in arguments.items()
        if name not in _NO_FIELD and name not in FIELDS and value is not None
    }


def _fields(function: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Located]]:
    """Yield fields of job.yaml, each with the argument that sets it. Later ones win."""
    from dtrain.job.load import flag
    from dtrain.planning import FIELDS

    for name, value in sections(cast("ResumeArguments", given)).items():
        yield name, _located(f"{function}({name}=…)", value)
    for field, value in _mapping(function, "set", given).items():
        yield field, _located(f"{function}(set={{'{field}': …}})", value)
    for name, field in FIELDS.items():
        if given.get(name) is not None:
            yield field, _located(f"{function}({name}=…)", given[name])
    for name, value in _mapping(function, "env", given).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        yield f"launch.env.{name}", flag(f"{function}(env=…)", str(value) if number else value)


def _mapping(function: str, name: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    value = given.get(name) or {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(
            f"{function}({name}=…): expected a dict with strings as keys: {value!r}",
            code="api.invalid-argument",
        )
    return value


def _located(source: str, value: Any) -> Located:
    from dtrain.job.load import flag

    return flag(source, _plain(source, value))


def _plain(source: str, value: Any) -> Any:
    """Return a value as job.yaml can contain it: numpy's become numbers, paths become strings.

    Raises:
        UsageError: job.yaml cannot contain it.
    """
    if isinstance(value, Mapping):
        return {_key(source, name): _plain(source, part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(source, part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value)
    raise UsageError(
        f"{source}: a job can contain numbers, strings, lists and dicts, but this is a "
        f"{kind.__module__}.{kind.__qualname__}; create it inside the task",
        code="api.value-not-for-jobs",
    )


def _key(source: str, name: Any) -> Any:
    if not isinstance(name, str | int | float):
        raise UsageError(
            f"{source}: {name!r} cannot be a key in a job", code="api.value-not-for-jobs"
        )
    return name


def signature_from(kind: type[Any]) -> Callable[[_Function], _Function]:
    """Show the keyword arguments of a `TypedDict` in a function's signature, as `help` does."""

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
        shown = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_DEFAULTS.get(name),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in kind.__annotations__.items()
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *shown])
        return function

    return decorate
