"""A chain hash over the collectives of a process, which must be the same on all ranks.

If one rank swaps two collectives of the same shape, they finish without an error and exchange each
other's values (gloo, also with TORCH_DISTRIBUTED_DEBUG=DETAIL). So every call of
`torch.distributed` on the whole group is added to a hash: operation, shape, type, and the line
that called it. This costs about 4 µs a call. DDP's own reductions happen in C++ and are not
included; their order follows from the model, which is compared before training.
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
"""The number of last calls that are kept as text, to name the first that differs."""

_TORCH = f"{Path(torch.__file__).parent}/"
_LIBRARIES = f"{Path(torch.__file__).parents[1]}/"
"""The directory of installed packages: collectives that Lightning calls are not the task's."""
_PACKAGE = f"{Path(__file__).resolve().parents[2]}/"

Call = Callable[[], Any]
FaultHook = Callable[[bool, Call], Any]


class Chain:
    """The chain hash of one process's collectives, with the last calls as text."""

    def __init__(self) -> None:
        self.value = 0
        self.count = 0
        self.tail: deque[str] = deque(maxlen=_KEPT)
        self.ring: Ring | None = None
        """The file in which the verdict finds the last calls."""
        self._written = 0
        self.offline = False
        """Whether this process computes something alone, without the other ranks."""
        self.fault_hook: FaultHook | None = None
        """A function that injects faults. Its arguments: whether the task made the call, and the
        call."""
        self._inside = threading.local()

    def reset(self) -> None:
        """Start the hash again. All ranks must call it at the same point."""
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
    def excluded(self) -> Iterator[None]:
        """Exclude the collectives of this block of code from the hash."""
        before = getattr(self._inside, "yes", False)
        self._inside.yes = True
        try:
            yield
        finally:
            self._inside.yes = before

    def call(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a collective. It is added unless it is part of another or on a smaller group."""
        if self.offline:
            return _stand_in(name, kwargs)
        if getattr(self._inside, "yes", False) or not _is_world(args, kwargs):
            return function(*args, **kwargs)

        def run() -> Any:
            self.add(f"{name}({_shape(args, kwargs)}) at {site}")
            with self.excluded():
                return function(*args, **kwargs)

        site, of_task = _caller(sys._getframe(2))
        return run() if self.fault_hook is None else self.fault_hook(of_task, run)


class AloneError(Exception):
    """Raised when a computation without the other ranks needs them."""


CHAIN = Chain()
"""The chain of this process."""


def install(ring: Ring | None = None) -> None:
    """Begin to watch `torch.distributed`, permanently. Call it before the task is imported.

    Args:
        ring: the file that keeps the last calls for the verdict.
    """
    CHAIN.ring = ring
    for name in _WATCHED:
        function = getattr(dist, name, None)
        if function is not None and not hasattr(function, "_dtrain_watched"):
            watched = _watched(name, function)
            setattr(dist, name, watched)
            setattr(dist.distributed_c10d, name, watched)


def first_difference(reference: int, suspect: int) -> str:
    """Describe the first of the kept calls that differs on two ranks. All ranks must call it."""
    everyone = collectives.gather_to_all((CHAIN.count, list(CHAIN.tail)))
    (expected, left), (found, right) = everyone[reference], everyone[suspect]
    begin = max(expected - len(left), found - len(right))
    left, right = left[begin - expected + len(left) :], right[begin - found + len(right) :]
    for number, (one, other) in enumerate(zip(left, right, strict=False), start=begin + 1):
        if one != other:
            return f"number {number} is {other} on rank {suspect} and {one} on rank {reference}"
    if expected != found:
        return f"{found} calls on rank {suspect} and {expected} on rank {reference}"
    return f"more than {_KEPT} calls ago"


def _stand_in(name: str, kwargs: Any) -> None:
    """Replace a collective in which the other ranks take no part: keep this rank's own values."""
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
    """Return the line that made a call, for example `file.py:12`, and whether it is the task's.

    If a library made the call, the text also has the line of the task that led to it, if any.
    """
    site = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_TORCH) and not file.startswith("<"):
            of_dtrain = file.startswith(_PACKAGE)
            of_task = not of_dtrain and not file.startswith(_LIBRARIES)
            here = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
            if of_task:
                return f"{here}, in {site}" if site else here, True
            site = site or here
            if of_dtrain:
                break
        frame = frame.f_back
    return site or "torch", False
