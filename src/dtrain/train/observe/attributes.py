"""What a task keeps in its attributes, for `dtrain verify`: does a step change it?"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dtrain.task import Task
from dtrain.train.data import content


class Attributes:
    """The data that a task object holds, besides the model, the optimizer and data sets.

    Args:
        task: or what stands for an object that does not derive from `Task`.
        frozen: attributes that stay as they were when `keep` was called.
    """

    def __init__(self, task: Task, frozen: tuple[str, ...]) -> None:
        self._held = vars(getattr(task, "adapted", task))
        self._frozen = frozen
        self._kept: dict[str, Any] = {}

    def keep(self) -> None:
        """Take note of the frozen ones as they are now."""
        self._kept = {name: _copy(self._held[name]) for name in self._frozen if name in self._held}

    def put_back(self) -> None:
        """Give the frozen ones the values that they had."""
        for name, value in self._kept.items():
            self._held[name] = _copy(value)

    def digests(self, model: torch.nn.Module | None) -> dict[str, str]:
        """Of each attribute its type and the digest of its value, by name.

        Args:
            model: what is trained; an attribute that holds it is left out.
        """
        trained = {id(each) for each in model.parameters()} if model is not None else set()
        return {
            name: f"{type(value).__name__} {content.digest(_opened(value)):016x}"
            for name, value in self._held.items()
            if not (callable(value) and not isinstance(value, torch.nn.Module))
            and not _is_data(value)
            and not _holds(value, trained)
        }


def _opened(value: Any, depth: int = 4) -> Any:
    """A value with plain containers instead of what has its content inside: modules, generators."""
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
    if depth == 0:
        return value
    if isinstance(value, Mapping):
        return {key: _opened(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_opened(each, depth - 1) for each in value]
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Generator):  # which cannot be copied as other objects are
        made = torch.Generator(device=value.device)
        made.set_state(value.get_state())
        return made
    return copy.deepcopy(value)


def _is_data(value: Any) -> bool:
    """Whether it is a data set or an optimizer: large, or compared in another place."""
    known = torch.utils.data.Dataset | torch.utils.data.DataLoader | torch.optim.Optimizer
    return isinstance(value, known)


def _holds(value: Any, trained: set[int]) -> bool:
    if isinstance(value, torch.nn.Module):
        return any(id(each) in trained for each in value.parameters())
    return id(value) in trained
