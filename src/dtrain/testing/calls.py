"""`run_ranks`: call a function in several processes, and return the value of each call."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from dtrain.testing import body, client, report, wire
from dtrain.testing.wire import Layout, Request

T = TypeVar("T")


class RankError(Exception):
    """A rank failed. The message contains its traceback.

    Attributes:
        rank: the rank that failed first. None means that none failed, and time ran out.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    nodes: int = 1,
    timeout: float = 60.0,
    init: bool = True,
    **kwargs: Any,
) -> list[T]:
    """Call `fn(*args, **kwargs)` in `world_size` processes that share a gloo process group.

    It works in any script or shell, and in a test that pytest runs. The processes are forked from a
    server that imported torch once. The first call outside pytest takes seconds, later ones a tenth
    of one. `fn` is pickled by reference, so it must be importable: a script's own functions need
    `if __name__ == "__main__":` around the call, as with multiprocessing. Where that is not enough
    (nested functions, lambdas, a notebook), cloudpickle is used if it is installed.

    The output of the ranks is printed here afterwards, each line marked with its rank.

    Args:
        fn: called in every rank, with the environment variables that torchrun would set.
        world_size: the number of ranks.
        args: passed to `fn`.
        nodes: the number of simulated nodes over which the ranks are spread.
        timeout: seconds until every rank's stack is shown and all are killed.
        init: whether the process group is initialized when `fn` is called.
        kwargs: passed to `fn`.

    Returns:
        The return values of `fn`, by rank.

    Raises:
        RankError: a rank raised, died or did not end in time. Its cause is the rank's own
            exception, if that can be pickled.
        ServerError: the process that forks the ranks died.
        TypeError: `fn` or an argument cannot be pickled.
    """
    if wire.is_importing_main:
        raise RuntimeError(
            "run_ranks was called while the script was imported again for the ranks; "
            "put the call under `if __name__ == '__main__':`"
        )
    layout = Layout(world_size, nodes)
    pickled, main = _pickle_call(fn, args, kwargs)
    nodeid = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0] or None
    request = Request(layout, timeout, init, nodeid, body.pack(pickled), is_item=False)
    answer = client.current_server().run(request, main)
    report.echo(answer)
    verdict = report.judge(answer)
    if verdict is not None:
        _raise(verdict)
    return [pickle.loads(result.outcome.value or b"") for result in answer.results]


def _raise(verdict: report.Verdict) -> None:
    if verdict.kind in ("skipped", "xfailed") and verdict.error is not None:
        raise verdict.error
    raise RankError(verdict.text, verdict.rank) from verdict.error


def _pickle_call(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bytes, dict[str, Any] | None]:
    """Return the pickled call, and what the server needs to import its script, if any."""
    call = (fn, args, kwargs)
    try:
        pickled = pickle.dumps(call)
    except Exception as error:
        return _pickle_by_value(call, str(error)), None
    if b"__main__" not in pickled or client.has_forked():
        return pickled, None
    from multiprocessing import spawn

    main = spawn.get_preparation_data("dtrain-ranks")
    main.pop("authkey", None)
    if "init_main_from_name" not in main and not os.path.isfile(
        main.get("init_main_from_path", "")
    ):
        return _pickle_by_value(call, "an interactive session has no file to import"), None
    return pickled, main


def _pickle_by_value(call: object, why: str) -> bytes:
    try:
        import cloudpickle  # type: ignore[import-untyped]
    except ImportError:
        raise TypeError(
            f"run_ranks cannot send the function and its arguments to the ranks: {why}. "
            "Define the function at the top of a module, or install cloudpickle."
        ) from None
    dumped: bytes = cloudpickle.dumps(call)
    return dumped
