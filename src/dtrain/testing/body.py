"""Inside a rank: take over the caller's environment, join the other ranks, run the body.

`pack` is called by the process that requests ranks, everything else in a rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtrain.testing.wire import Kind, Outcome, Request

if TYPE_CHECKING:
    import pytest

_LAUNCHER_PREFIXES = ("SLURM_", "SUBMITIT_", "PET_", "TORCHELASTIC_", "PMI_", "OMPI_")

_rank: int | None = None
_kept: list[Generator[Any, Any, Any]] = []


class OwnRank:
    """A placeholder for the rank in pytest's process. In a rank it unpickles as the number."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_rank, ()

    def __repr__(self) -> str:
        return "<rank: known in the test's body only>"


def _own_rank() -> int:
    assert _rank is not None, "only a rank has a rank"
    return _rank


@dataclass(frozen=True)
class Context:
    """The state of the calling process that a rank takes over."""

    env: Mapping[str, str]
    cwd: str
    path: list[str]
    warning_filters: list[Any]

    @classmethod
    def current(cls) -> Context:
        filters = [entry for entry in warnings.filters if not why_not_picklable(entry)]
        return cls(dict(os.environ), os.getcwd(), list(sys.path), filters)

    def enter(self) -> None:
        """Give this process the same context, without the variables of an outer launcher."""
        stale = {
            name
            for name, value in os.environ.items()
            if name.startswith(_LAUNCHER_PREFIXES) and self.env.get(name) == value
        }
        os.environ.clear()
        os.environ.update({k: v for k, v in self.env.items() if k not in stale})
        os.chdir(self.cwd)
        sys.path[:] = self.path
        # resetwarnings also drops the caches that depend on the filters.
        warnings.resetwarnings()
        warnings.filters.extend(self.warning_filters)  # type: ignore[attr-defined]


def pack(body: bytes) -> bytes:
    """Return the payload of a request: this process's context, and the pickled body."""
    return pickle.dumps((Context.current(), body))


def why_not_picklable(value: object) -> str:
    """Return the error of pickling `value`; empty if it can be pickled."""
    try:
        pickle.dumps(value)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def run(
    rank: int,
    request: Request,
    port: int,
    item: pytest.Function | None,
    report: Callable[[Outcome], None],
) -> None:
    """Run a request's body as `rank`. `report` receives the outcome, again if more is known later.

    A failure is reported first in plain form. pytest's form takes a while to make, and it runs the
    user's code (`__repr__`).
    """
    global _rank
    _rank = rank
    try:
        context, body = pickle.loads(request.payload)
        context.enter()
        os.environ.update(request.layout.env(rank, port))
        if item is not None:
            _explain_asserts(item)
        if request.init:
            _join()
        returned = _call(request, body, item)
        report(Outcome("passed", time.monotonic(), value=_dump_returned(returned)))
    except BaseException as error:
        outcome = _outcome(error, time.monotonic())
        report(outcome)
        if item is not None and request.is_item and not outcome.is_lost_connection:
            _show_as_pytest(outcome, error, item)
            report(outcome)


def forget_pytest_logging() -> None:
    """Remove pytest's own handlers: log records of a rank belong in its stderr."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


def _join() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def _call(request: Request, body: bytes, item: pytest.Function | None) -> Any:
    if not request.is_item:
        fn, args, kwargs = pickle.loads(body)
        return fn(*args, **kwargs)
    if item is None:
        raise LookupError(f"{request.nodeid} was not collected when the ranks' server was forked")
    funcargs, attributes = pickle.loads(body)
    if attributes is not None:
        vars(item.instance).update(attributes)
    item.obj(**funcargs)
    return None


def _explain_asserts(item: pytest.Function) -> None:
    """Let failing asserts show their operands' differences, as pytest does around a test.

    The hook is not a documented API. Without it, an assert shows only its operands.
    """
    with contextlib.suppress(Exception):
        plugin: Any = item.config.pluginmanager.get_plugin("assertion")
        around = plugin.pytest_runtest_protocol(item)
        next(around)
        _kept.append(around)  # its finalizer would undo what it did


def _dump_returned(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"the value returned, a {type(value).__name__}, cannot be pickled: {error}"
        ) from error


def _outcome(error: BaseException, failed_at: float) -> Outcome:
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    inner = traceback.extract_tb(frames)
    kind = _kind(error)
    headline = str(error)
    if kind == "failed":
        headline = traceback.format_exception_only(error)[0].strip()
    return Outcome(
        kind,
        failed_at,
        headline,
        text="".join(traceback.format_exception(error.with_traceback(frames))),
        where=(inner[-1].filename, inner[-1].lineno or 0) if inner else None,
        value=_dump_error(error),
    )


def _kind(error: BaseException) -> Kind:
    if "pytest" in sys.modules:
        import pytest

        if isinstance(error, pytest.skip.Exception):
            return "skipped"
        if isinstance(error, pytest.xfail.Exception):
            return "xfailed"
    return "failed"


def _show_as_pytest(outcome: Outcome, error: BaseException, item: pytest.Function) -> None:
    import pytest

    with contextlib.suppress(Exception):
        shown = item.repr_failure(pytest.ExceptionInfo.from_exception(error))
        outcome.text = str(shown)
        crash = getattr(shown, "reprcrash", None)
        if crash is not None:
            outcome.where = (crash.path, crash.lineno)


def _dump_error(error: BaseException) -> bytes | None:
    with contextlib.suppress(Exception):
        dumped = pickle.dumps(error)
        pickle.loads(dumped)  # many exceptions can be pickled and not unpickled
        return dumped
    return None
