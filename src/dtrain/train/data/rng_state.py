"""The process's global random generators, with methods to seed, watch and restore them.

Reading the state of a generator takes 1 to 4 µs here, and 30 to 80 with Python's `random.getstate`
or NumPy's `get_state`.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

_WORDS = 625 * 4
"""The number of bytes of a Mersenne Twister: 624 words and a position."""


class Generator(Protocol):
    def seed(self, word: int) -> None:
        """Seed the generator with 64 random bits."""

    def mark(self) -> Any:
        """Return a mark of the state. Two marks are equal only if nothing was drawn in between."""

    def return_to(self, mark: Any) -> None:
        """Restore the state of a mark."""

    def capture(self) -> Any:
        """Return the whole state, including cached halves of Gaussian pairs."""

    def restore(self, state: Any) -> None:
        """Restore a state of `capture`."""


class _Python:
    """The module `random`."""

    def __init__(self) -> None:
        self._generator: Any = random._inst
        self._address = id(self._generator) + object.__basicsize__
        self._readable = self._try_reading()

    def seed(self, word: int) -> None:
        random.seed(word)

    def mark(self) -> Any:
        if not self._readable:
            return random.getstate()
        return ctypes.string_at(self._address, _WORDS), self._generator.gauss_next

    def return_to(self, mark: Any) -> None:
        if self._readable:
            data, gauss_next = mark
            position, *words = np.frombuffer(data, dtype=np.uint32).tolist()
            mark = (random.Random.VERSION, (*words, position), gauss_next)
        random.setstate(mark)

    def capture(self) -> Any:
        return random.getstate()

    def restore(self, state: Any) -> None:
        random.setstate(state)

    def _try_reading(self) -> bool:
        """Return whether CPython's object holds the position and then the words (up to 3.14)."""
        if self._generator.__sizeof__() < object.__basicsize__ + _WORDS:
            return False
        position, *words = np.frombuffer(
            ctypes.string_at(self._address, _WORDS), dtype=np.uint32
        ).tolist()
        return bool((*words, position) == random.getstate()[1])


class _NumPy:
    """The generator of `numpy.random`'s own functions, not those that a user makes."""

    def __init__(self) -> None:
        self._bits: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        self._address = None
        if isinstance(self._bits, np.random.MT19937):
            self._address = self._bits.ctypes.state_address  # 624 words, then the position

    def seed(self, word: int) -> None:
        # The high half: torch's CPU generator is the same Mersenne Twister, seeded in the same way
        # with the low half. With the same seed both would draw the same words.
        np.random.seed(word >> 32)

    def mark(self) -> Any:
        if self._address is None:
            return repr(np.random.get_state(legacy=False))
        return ctypes.string_at(self._address, _WORDS)

    def return_to(self, mark: Any) -> None:
        # The cached half of a Gaussian pair is not in the mark, because reading it costs 60 µs. If
        # the training has one when a data set draws for the first time, it is lost.
        if self._address is not None:
            *words, position = np.frombuffer(mark, dtype=np.uint32).tolist()
            np.random.set_state(("MT19937", words, position, 0, 0.0))

    def capture(self) -> Any:
        return np.random.get_state(legacy=False)

    def restore(self, state: Any) -> None:
        np.random.set_state(state)


class _Torch:
    """A default generator of torch, on the CPU or on one GPU."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def seed(self, word: int) -> None:
        # not torch.manual_seed: without CUDA it formats a stack for a lazy call, 50 µs each time
        self._generator.manual_seed(word & (2**63 - 1))

    def mark(self) -> Any:
        return self._generator.get_state().numpy().tobytes()

    def return_to(self, mark: Any) -> None:
        self._generator.set_state(torch.frombuffer(bytearray(mark), dtype=torch.uint8))

    def capture(self) -> Any:
        return self._generator.get_state()

    def restore(self, state: Any) -> None:
        self._generator.set_state(state)


_ON_CPU: list[Generator] = []


def global_generators() -> list[Generator]:
    """Return the generators of Python, NumPy and torch, and of the current GPU if one is used."""
    if not _ON_CPU:
        _ON_CPU.extend([_Python(), _NumPy(), _Torch(torch.default_generator)])
    if torch.cuda.is_initialized():
        gpu = torch.cuda.default_generators[torch.cuda.current_device()]
        return [*_ON_CPU, _Torch(gpu)]
    return list(_ON_CPU)


_OWN = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_MAX_DEPTH = 5
_MAX_VISITED = 1000


def drawn_from(holder: Any, read: Callable[[], Any]) -> list[str]:
    """Return the paths of an object's own generators that `read` draws from.

    A path is for example `rng` or `crop.rng`.
    """
    generators = dict(held(holder, _OWN))
    before = {path: _state_of(generator) for path, generator in generators.items()}
    read()
    return [path for path, generator in generators.items() if _state_of(generator) != before[path]]


def _state_of(generator: Any) -> str:
    for name in ("getstate", "get_state"):
        if hasattr(generator, name):
            state = getattr(generator, name)()
            return str(state.tolist() if isinstance(state, torch.Tensor) else state)
    return str(generator.bit_generator.state)


def held(holder: Any, kinds: type | tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that hold an object of these classes, except the global generators."""
    known = {id(random._inst), id(torch.default_generator)}
    queue = deque([("", holder, 0)])
    for _ in range(_MAX_VISITED):
        if not queue:
            return
        path, value, depth = queue.popleft()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, kinds):
            yield path, value
        elif depth < _MAX_DEPTH:
            for step, inner in _inside(value):
                queue.append(((path + step).removeprefix("."), inner, depth + 1))


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", inner) for key, inner in value.items())
    elif isinstance(value, list | tuple) and len(value) < _MAX_VISITED:
        yield from ((f"[{index}]", inner) for index, inner in enumerate(value))
    else:
        yield from ((f".{name}", inner) for name, inner in getattr(value, "__dict__", {}).items())
