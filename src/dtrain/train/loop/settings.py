"""What a resumed training makes otherwise than the one that was saved: used, refused, or told.

Optimizers and schedulers come back from a checkpoint with the rates and lengths that they had, so
that another `args.lr` would change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

from dtrain.environ import shown
from dtrain.errors import UsageError
from dtrain.job.spec import JobSpec
from dtrain.train.checkpoint.state import optimizer_state
from dtrain.train.loop.step import Parts

Numbers = dict[str, Any]


class Settings:
    """What the job says of a training, and what its task made of that before a checkpoint came."""

    def __init__(self, spec: JobSpec, parts: Parts) -> None:
        said = spec.to_plain()
        self._args, self._train = said["args"], said["train"]
        self._kind = type(parts.optimizer).__name__
        groups = optimizer_state(parts.model, parts.optimizer)["groups"]
        self._groups = [dict(_plain(group)) for group in groups]
        inner = getattr(parts.scheduler, "scheduler", parts.scheduler)
        self._scheduler: Numbers = {}
        if parts.scheduler is not None:
            state = dict(_numbers(parts.scheduler.state_dict(), type(inner).__name__))
            self._scheduler = {"the scheduler's class": type(inner).__name__, **state}

    def to_saved(self) -> dict[str, Any]:
        return {
            "args": self._args,
            "train": self._train,
            "optimizer": self._kind,
            "groups": self._groups,
            "scheduler": self._scheduler,
        }

    def has_new_course(self, saved: Mapping[str, Any]) -> bool:
        """Whether the job says otherwise than then how training goes, as with a later end."""
        return bool(saved["train"] != self._train)

    def reconcile(self, saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[str]:
        """Decide for each difference to when the run began which value holds.

        With other `args` the new value of an option does, where nothing has changed the old one
        since: no schedule, no callback. Without, the checkpoint's does: the rate may have followed
        from the number of processes.

        Args:
            saved: see `to_saved`.
            groups: the optimizer's groups in the checkpoint, in which new values are put.

        Returns:
            What holds, in words.

        Raises:
            UsageError: neither would be right.
        """
        if saved["optimizer"] != self._kind:
            self._refuse(saved, f"the optimizer is {self._kind}, and was {saved['optimizer']}")
        new_args = saved["args"] != self._args
        told = []
        for name, was, now in _differences(saved["scheduler"], self._scheduler):
            if new_args:
                self._refuse(saved, f"{name} is {now}, and was {was}")
            told.append(f"{name} stays as it was, {was}, though the task makes {now} now")
        return told + self._options(saved, {frozenset(g["params"]): g for g in groups}, new_args)

    def _options(
        self, saved: Mapping[str, Any], restored: Mapping[Any, dict[str, Any]], new_args: bool
    ) -> list[str]:
        began = {frozenset(group["params"]): group for group in saved["groups"]}
        told: dict[str, list[str]] = {}
        for index, group in enumerate(self._groups):
            key = frozenset(group["params"])
            if key not in began or key not in restored:
                continue
            for option, was, now in _differences(began[key], group):
                holds = restored[key].get(option)
                if not new_args:
                    text = f"{option} stays {holds}, though the task makes {now} now"
                elif holds == was:
                    restored[key][option] = now
                    text = f"{option} is {now} from here on, it was {was}"
                else:
                    what = f"{option} of parameter group {index} is {now}, was {was}"
                    self._refuse(saved, f"{what}, and has become {holds}")
                told.setdefault(text, []).append(str(index))
        return [f"{text} (parameter group {', '.join(each)})" for text, each in told.items()]

    def _refuse(self, saved: Mapping[str, Any], what: str) -> NoReturn:
        differing = list(_differences(saved["args"], self._args))
        fields = " and ".join(f"args.{name}" for name, _, _ in differing)
        given = f"given by {fields}" if fields else "made by the task"
        given_then = [(name, json.dumps(shown(name, was))) for name, was, _ in differing]
        back = " ".join(f"--set args.{name}={was}" for name, was in given_then)
        raise UsageError(
            f"what is {given} cannot be taken in the middle of this training: {what}, while "
            f"the checkpoint goes on with the old; resume with {back or 'the code as it was'}, or "
            "launch a new run",
            code="resume.settings-changed",
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            yield name, then.get(name), now.get(name)


def _plain(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options that are numbers or texts, or a few of them."""
    for name, value in group.items():
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if all(isinstance(each, _PLAIN) for each in _items(value)):
            yield name, value


def _numbers(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The numbers and texts in a state, by name."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(each, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _numbers(each, f"{name}[{index}]")
    elif isinstance(value, _PLAIN):
        yield name, value


_PLAIN = (bool, int, float, str, type(None))


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
