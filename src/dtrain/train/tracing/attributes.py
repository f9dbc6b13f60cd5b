"""The attributes of a task, for `dtrain verify`: digests show whether a step changes them."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dtrain.task import Task
from dtrain.train.data import content


class Attributes:
    """The attributes of a task object, except the model, the optimizer and data sets.

    Args:
        task: the task, or the adapter of an object that does not derive from `Task`.
        frozen: the names of attributes that `put_back` resets to their values at `keep`.
    """

    def __init__(self, task: Task, frozen: tuple[str, ...]) -> None:
        adapted = getattr(task, "adapted", task)
        # the adapter of a LightningModule or a Keras model has no attributes of the user's
        self._held = {} if _is_of_dtrain(adapted) else vars(adapted)
        self._frozen = frozen
        self._kept: dict[str, Any] = {}

    def keep(self) -> None:
        self._kept = {name: _copy(self._held[name]) for name in self._frozen if name in self._held}

    def put_back(self) -> None:
        for name, value in self._kept.items():
            self._held[name] = _copy(value)

    def digests(self, model: torch.nn.Module | None) -> dict[str, str]:
        """Return the type of each attribute and the digest of its value, by name.

        Args:
            model: the trained model; an attribute that holds it is left out.
        """
        trained = {id(each) for each in model.parameters()} if model is not None else set()
        return {
            name: f"{type(value).__name__} {content.digest(_opened(value, set())):016x}"
            for name, value in self._held.items()
            if not (callable(value) and not isinstance(value, torch.nn.Module))
            and not _is_data(value)
            and not _is_of_dtrain(value)
            and not _holds(value, trained)
        }


def _is_of_dtrain(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "dtrain"


def _opened(value: Any, opened: set[int], depth: int = 4) -> Any:
    """Return the content of a value in plain containers, also of modules and generators.

    Args:
        value: any value.
        opened: the addresses of the objects opened so far. Each is opened once: a reference to a
            trainer leads to thousands of objects in many ways.
        depth: the number of nested objects that are opened.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value
    if isinstance(value, torch.nn.Module | torch.optim.Optimizer):
        return dict(value.state_dict())
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    if depth == 0 or id(value) in opened:
        return type(value).__name__
    opened.add(id(value))
    if isinstance(value, Mapping):
        return {str(key): _opened(each, opened, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple | deque):
        return [_opened(each, opened, depth - 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    inside = {} if callable(value) else getattr(value, "__dict__", {})
    return {name: _opened(each, opened, depth - 1) for name, each in inside.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Generator):  # deepcopy cannot copy it
        made = torch.Generator(device=value.device)
        made.set_state(value.get_state())
        return made
    return copy.deepcopy(value)


def _is_data(value: Any) -> bool:
    """Return whether it is a data set or an optimizer: large, or compared elsewhere."""
    known = torch.utils.data.Dataset | torch.utils.data.DataLoader | torch.optim.Optimizer
    return isinstance(value, known)


def _holds(value: Any, trained: set[int]) -> bool:
    if isinstance(value, torch.nn.Module):
        return any(id(each) in trained for each in value.parameters())
    return id(value) in trained
