"""State of a training other than model and optimizer: the task's own state, and averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from dtrain.errors import DtrainError
from dtrain.task import Task
from dtrain.train import digest
from dtrain.train.checkpoint.leaves import changed, leaves, plain, restoring
from dtrain.train.context import TrainContext
from dtrain.train.ema import EMA, averages_of

FINAL = "final"
"""The owner of weights that replace the model's at the end of training, in checkpoints."""
_TASK = "task"
_FILE = "kept"


class FinalWeights(ABC):
    """A callback of a library that may replace the model's weights at the end of training."""

    @abstractmethod
    def kept(self) -> dict[str, Any]:
        """Return the state for checkpoints."""

    @abstractmethod
    def load_kept(self, state: Mapping[str, Any]) -> None:
        """Load a state that `kept` returned."""


class Kept:
    """The state of one task and of its averages, for checkpoints and comparisons."""

    def __init__(self, context: TrainContext) -> None:
        self._task = context.task
        self._device = context.device
        self._has_state = _has_state(self._task)
        self._averages: dict[str, EMA] = {}
        self._keepers: dict[str, EMA | FinalWeights] = {}
        """Everything that keeps weights: the averages, and one callback of a library at most."""
        self._evaluated: EMA | None = None
        self._rolls_back = context.spec.checks.on_mismatch == "rollback"
        self._first: dict[str, Any] | None = None
        """The task's state before the first step, kept if a rollback may need it."""

    def begin(self, model: torch.nn.Module, callbacks: Iterable[Any]) -> None:
        """Find the averages of a model that was just built, and set the initial state."""
        callbacks = list(callbacks)
        listed = [each for each in callbacks if isinstance(each, EMA)]
        for each in listed:
            each.attach(model)
        found = averages_of(model)
        self._refuse_other_models(found)
        self._averages = {f"EMA.{index}": each for index, each in enumerate(found)}
        self._keepers = {**self._averages}
        for each in callbacks:
            if isinstance(each, FinalWeights):
                self._keepers[FINAL] = each
        self._evaluated = _evaluated(listed)
        for each in found:
            each.start()
        state = self.state().get(_TASK, {})  # raises now rather than at the first save
        if self._first is not None:
            self._task.load_state_dict(changed(self._first, _TASK, _copied))
        elif self._has_state and self._rolls_back:
            self._first = changed(state, _TASK, _copied)

    def evaluated(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model to evaluate: the model, or its average if `callbacks()` has one."""
        averaged: torch.nn.Module | None = self._evaluated and self._evaluated.model
        return model if averaged is None else averaged

    def update(self) -> None:
        for each in self._averages.values():
            each.update()

    def state(self) -> dict[str, Any]:
        """Return the state of each owner that has state; the tensors are not copied."""
        states: dict[str, Any] = {name: each.kept() for name, each in self._keepers.items()}
        if self._has_state:
            given = self._task.state_dict()
            if not isinstance(given, Mapping):
                raise DtrainError(
                    f"state_dict() of the task returned {type(given).__name__}; return a dict",
                    code="task.bad-state",
                )
            states[_TASK] = given
        return {owner: plain(each, owner) for owner, each in states.items() if each}

    def leaves(self) -> dict[str, Any]:
        return _leaves(self.state())

    def to_saved(self) -> dict[str, Any]:
        """Return the contents for a checkpoint by file stem; empty if there is no state."""
        state = self.state()
        moved = [name for name, each in _leaves(state).items() if not _on_cpu(each)]
        return {_FILE: {"states": state, "on_device": moved}} if state else {}

    def load(self, tensors: Mapping[str, Any]) -> list[str]:
        """Load what `to_saved` returned.

        A task without state in the checkpoint stays as it is. An average without state starts with
        the weights, which are loaded before.

        Args:
            tensors: the contents of a checkpoint, by file stem.

        Returns:
            One sentence for each state that was not restored.

        Raises:
            CheckpointError: the task or an average cannot load its state.
        """
        saved = tensors.get(_FILE, {"states": {}, "on_device": []})
        on_device, mine = set(saved["on_device"]), self.state()

        def placed(name: str, leaf: Any) -> Any:
            return leaf.to(self._device) if name in on_device else leaf

        states = {owner: changed(each, owner, placed) for owner, each in saved["states"].items()}
        notes = [
            f"it holds no state of {_described(each)}, which starts with its initial state"
            for each in mine
            if each not in states
        ]
        for owner, average in self._averages.items():
            if owner not in states:
                average.start()
        for owner, state in states.items():
            if owner not in self._keepers and not (owner == _TASK and self._has_state):
                notes.append(f"it holds state of {_described(owner)}, which has no state now")
            else:
                notes += self._load(owner, state)
        return notes

    def _load(self, owner: str, state: dict[str, Any]) -> list[str]:
        """Load the state of one owner. Return one sentence for each value that it did not load."""
        wanted = digest.of_leaves(leaves(state, owner))  # before the task can change it
        if owner != _TASK:
            self._keepers[owner].load_kept(state)
            return []
        with restoring("the task"):
            self._task.load_state_dict(state)
        now = digest.of_leaves(leaves(self.state().get(owner, {}), owner))
        lost = [name for name, fact in wanted.items() if now.get(name) != fact]
        return [f"load_state_dict() of the task did not restore {name}" for name in lost]

    def _refuse_other_models(self, found: list[EMA]) -> None:
        """Raise if the task keeps an average of another model, which would never be updated."""
        task = getattr(self._task, "adapted", self._task)
        for name, each in vars(task).items():
            if isinstance(each, EMA) and each not in found and each.source is not None:
                raise DtrainError(
                    f"the task's {name} is a dtrain.EMA of a {type(each.source).__name__} that is "
                    "not part of the model that model() returned, so it would never change; make "
                    "it of that model",
                    code="ema.of-other-model",
                )


def _has_state(task: Task) -> bool:
    pair = ("state_dict", "load_state_dict")
    own = [n for n in pair if n in vars(task) or getattr(type(task), n) is not getattr(Task, n)]
    if len(own) == 1:
        other = pair[1 - pair.index(own[0])]
        raise DtrainError(
            f"the task has {own[0]}() but no {other}(), so a resume would lose its state. Write "
            "both methods, or neither",
            code="task.incomplete-state",
        )
    return bool(own)


def _evaluated(listed: list[EMA]) -> EMA | None:
    if len(listed) > 1:
        raise DtrainError(
            f"callbacks() returned {len(listed)} of dtrain.EMA, but only one is evaluated; keep "
            "the others in the task, for example self.ema = dtrain.EMA(model, 0.999)",
            code="ema.several",
        )
    return listed[0] if listed else None


def _leaves(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for owner, each in state.items() for k, v in leaves(each, owner).items()}


def _copied(name: str, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _on_cpu(leaf: Any) -> bool:
    return not isinstance(leaf, torch.Tensor) or leaf.device.type == "cpu"


def _described(owner: str) -> str:
    return "the task" if owner == _TASK else owner
