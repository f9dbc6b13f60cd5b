"""A chain hash over the collectives of a process, which is the same on all ranks.

Two collectives of one shape that change places on one rank finish without a word and exchange
each other's values (gloo, also with TORCH_DISTRIBUTED_DEBUG=DETAIL). So every call of
`torch.distributed` on the whole group is added to a hash: operation, shape, type, and the line
that called it. About 4 µs a call. DDP's own reductions, which are made in C++, are not seen; their
order follows from the model, which is compared before training.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from dtrain.run.flight_recorder import Ring
from dtrain.train import collectives

_WATCHED = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)
_KEPT = 256
"""How many of the last calls are kept in words, to name the first that differs."""

_TORCH = f"{Path(torch.__file__).parent}/"
_LIBRARIES = f"{Path(torch.__file__).parents[1]}/"
"""Where packages are installed: what Lightning calls by itself is not the task's."""
_PACKAGE = f"{Path(__file__).resolve().parents[2]}/"

Call = Callable[[], Any]
FaultHook = Callable[[bool, Call], Any]


class Chain:
    def __init__(self) -> None:
        self.value = 0
        self.count = 0
        self.tail: deque[str] = deque(maxlen=_KEPT)
        self.ring: Ring | None = None
        """Where the verdict finds the last calls."""
        self._written = 0
        self.offline = False
        """Whether this process computes something by itself that the others do not."""
        self.fault_hook: FaultHook | None = None
        """Makes faults on purpose: is given whether the task made the call, and the call."""
        self._inside = threading.local()

    def reset(self) -> None:
        """Begin anew; at a point that all ranks reach together."""
        self.value, self.count = 0, 0
        self.tail.clear()

    def add(self, text: str) -> None:
        self.value = xxhash.xxh3_64_intdigest(text.encode(), seed=self.value)
        self.count += 1
        self.tail.append(text)
        self._written += 1
        if self.ring is not None:
            self.ring.write(self._written, text)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out the collectives of this block of code."""
        before = getattr(self._inside, "yes", False)
        self._inside.yes = True
        try:
            yield
        finally:
            self._inside.yes = before

    def call(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a collective, and add it unless it is part of another or of a smaller group."""
        if self.offline:
            return _stand_in(name, kwargs)
        if getattr(self._inside, "yes", False) or not _is_world(args, kwargs):
            return function(*args, **kwargs)

        def run() -> Any:
            self.add(f"{name}({_shape(args, kwargs)}) at {site}")
            with self.apart():
                return function(*args, **kwargs)

        site, users = _caller(sys._getframe(2))
        return run() if self.fault_hook is None else self.fault_hook(users, run)


class AloneError(Exception):
    """A computation that needs the other ranks was tried without them."""


CHAIN = Chain()
"""This process's."""


def install(ring: Ring | None = None) -> None:
    """Begin to watch `torch.distributed`; for good, and before the task is imported.

    Args:
        ring: where to keep the last calls for the verdict.
    """
    CHAIN.ring = ring
    for name in _WATCHED:
        function = getattr(dist, name, None)
        if function is not None and not hasattr(function, "_dtrain_watched"):
            watched = _watched(name, function)
            setattr(dist, name, watched)
            setattr(dist.distributed_c10d, name, watched)


def first_difference(reference: int, suspect: int) -> str:
    """The first of the kept calls that two ranks made otherwise; called by all ranks."""
    everyone = collectives.gather_to_all((CHAIN.count, list(CHAIN.tail)))
    (ours, left), (theirs, right) = everyone[reference], everyone[suspect]
    begin = max(ours - len(left), theirs - len(right))
    left, right = left[begin - ours + len(left) :], right[begin - theirs + len(right) :]
    for number, (one, other) in enumerate(zip(left, right, strict=False), start=begin + 1):
        if one != other:
            return f"number {number} is {other} on rank {suspect} and {one} on rank {reference}"
    if ours != theirs:
        return f"{theirs} calls on rank {suspect} and {ours} on rank {reference}"
    return f"more than {_KEPT} calls ago"


def _stand_in(name: str, kwargs: Any) -> None:
    """Instead of a collective, where the others do not take part: leaves this rank's own values."""
    if name not in ("all_reduce", "barrier", "broadcast", "reduce") or kwargs.get("async_op"):
        raise AloneError(name)


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return CHAIN.call(name, function, args, kwargs)

    watched._dtrain_watched = True  # type: ignore[attr-defined]
    return watched


def _is_world(args: Any, kwargs: Any) -> bool:
    groups = [each for each in (*args, *kwargs.values()) if isinstance(each, dist.ProcessGroup)]
    return all(group is dist.group.WORLD for group in groups)


def _shape(args: Any, kwargs: Any) -> str:
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            found.append(f"{dtype}{list(value.shape)}")
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(str(value))
    return ", ".join(found)


def _caller(frame: FrameType | None) -> tuple[str, bool]:
    """Which line made a call, as `file.py:12`, and whether it is the task's.

    A call of a library's has the line of the task that led to it too, if one did.
    """
    site = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_TORCH) and not file.startswith("<"):
            ours = file.startswith(_PACKAGE)
            users = not ours and not file.startswith(_LIBRARIES)
            here = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
            if users:
                return f"{here}, in {site}" if site else here, True
            site = site or here
            if ours:
                break
        frame = frame.f_back
    return site or "torch", False
