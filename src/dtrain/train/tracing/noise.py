"""Random numbers that a task draws in `loss`: fixed for each sample, and located in the code.

In another layout the ranks draw other numbers than one process does, which is correct. To compare
everything else, `FixedNoise` gives each row that torch draws for a batch numbers that depend only
on the content of that sample.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import xxhash
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dtrain.train.data.rng_state import global_generators
from dtrain.train.seeding import derive_seed, seed_everything, seed_torch

_LIBRARIES = str(Path(torch.__file__).parents[1])
_PACKAGE = str(Path(__file__).resolve().parents[2])


class FixedNoise(TorchDispatchMode):
    """While it is active, torch's global generators draw numbers that belong to each sample.

    An operator that draws is run once for each sample of the batch, on its part of dimension 0. If
    there is no dimension of samples, every call draws the same numbers. Operations of Python's and
    NumPy's generators cannot be intercepted: these are seeded again in every call.

    Args:
        by_sample: whether every call has one sample, which then also decides the numbers of Python
            and NumPy.
    """

    def __init__(self, *, by_sample: bool) -> None:
        super().__init__()
        self._by_sample = by_sample
        self._calls = 0
        self._keys: list[int] = []
        """The keys of the samples of this call."""
        self._draws = 0
        """The number of draws in this call."""
        self._known: dict[int, tuple[list[int], int]] = {}
        """The keys and the number of each draw, by the state that torch's generator had. A layer
        that is computed again in backward has the same state, possibly after the next call."""
        self.places: set[str] = set()
        """The operators and lines that drew, for example `randn_like at task.py:12`."""

    def begin(self, batch: Any) -> None:
        self._keys, self._draws = _sample_keys(batch), 0
        self._calls += 1
        sample = self._keys if self._by_sample else []
        seed_everything(derive_seed("noise", *sample))
        seed_torch(self._calls)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator"):
            return func(*args, **kwargs)
        self.places.add(f"{func._schema.name.partition('::')[2]} at {_user_line()}")
        state = xxhash.xxh3_64_intdigest(torch.get_rng_state().numpy().data)
        if state not in self._known:
            self._known[state] = self._keys, self._draws
            self._draws += 1
        torch.rand(())
        after = torch.get_rng_state()
        try:
            return _draw(func, args, kwargs, *self._known[state])
        finally:
            torch.set_rng_state(after)


def _draw(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], keys: list[int], number: int
) -> Any:
    """Run an operator on each sample's part, or once if there are no such parts."""
    count = len(keys)
    given = (*args, *kwargs.values())
    if not any(_has_rows(each, count) for each in given):
        seed_torch(derive_seed("noise", number))
        return func(*args, **kwargs)
    made = []
    for index, key in enumerate(keys):
        seed_torch(derive_seed("noise", number, key))
        parts = [_part(each, index, count) for each in args]
        made.append(func(*parts, **{k: _part(v, index, count) for k, v in kwargs.items()}))
    if func._schema.is_mutable:
        return args[0]
    return tree_map(lambda *parts: torch.cat(parts), *made)


def _has_rows(value: Any, count: int) -> bool:
    """Return whether dimension 0 of an argument has an equal number of rows for each sample.

    Args:
        value: a tensor, or the shape of a tensor to be made.
        count: the number of samples.
    """
    shape = value.shape if isinstance(value, torch.Tensor) else value
    if not isinstance(shape, list | tuple) or not shape or not isinstance(shape[0], int):
        return False
    return count > 0 and shape[0] > 0 and shape[0] % count == 0


def _part(value: Any, index: int, count: int) -> Any:
    if not _has_rows(value, count):
        return value
    if isinstance(value, torch.Tensor):
        size = value.shape[0] // count
        return value[index * size : (index + 1) * size]
    return [value[0] // count, *value[1:]]


def _sample_keys(batch: Any) -> list[int]:
    """Return a number for each sample, from its row of the first tensor that has rows."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        return []
    rows = tensors[0].detach().cpu().contiguous()
    rows = rows.reshape(len(rows), -1)
    return [xxhash.xxh3_64_intdigest(row.view(torch.uint8).numpy().data) for row in rows]


class Draws:
    """Finds the lines of a task's code that draw from Python's or NumPy's global generator."""

    def __init__(self) -> None:
        self.places: set[str] = set()
        self._generators = dict(zip(("random", "numpy.random"), global_generators(), strict=False))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one call; a draw in a library counts for the line that called it."""
        trace = self._trace_function()
        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(outer)

    def _trace_function(self) -> Callable[[FrameType, str, Any], Any]:
        marks = {name: each.mark() for name, each in self._generators.items()}
        before: list[str] = []

        def trace(frame: FrameType, event: str, _argument: Any) -> Any:
            if not _is_user_code(frame):
                return None
            for name, generator in self._generators.items():
                mark = generator.mark()
                if mark != marks[name]:
                    marks[name] = mark
                    self.places.add(f"{name} at {before[-1] if before else _line(frame)}")
            before[:] = [_line(frame)]
            return trace

        return trace


def _user_line() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_user_code(frame):
        frame = frame.f_back
    return "torch" if frame is None else _line(frame)


def _is_user_code(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith((_LIBRARIES, _PACKAGE, "<")) and "/lib/python3" not in file


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
