"""Settings that differ between a checkpoint and the training that resumes from it.

A checkpoint restores optimizers and schedulers with the rates and lengths that they had, so a new
`args.lr` would change nothing. Each difference is therefore applied, refused or reported.
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
    """The settings in the job, and what the task made of them before a checkpoint was loaded."""

    def __init__(self, spec: JobSpec, parts: Parts) -> None:
        plain = spec.to_plain()
        self._args, self._train = plain["args"], plain["train"]
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
        """Return whether section `train` of the job has changed, for example to a later end."""
        return bool(saved["train"] != self._train)

    def reconcile(self, saved: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[str]:
        """Decide which value is used where a setting differs from the start of the run.

        If `args` changed, the new value of an option is used, unless a schedule or a callback has
        changed the old one since. If `args` did not change, the checkpoint's value is used: the
        rate may depend on the number of processes.

        Args:
            saved: the settings in the checkpoint, see `to_saved`.
            groups: the optimizer's groups in the checkpoint; new values are written into them.

        Returns:
            One sentence for each difference, with the value that is used.

        Raises:
            UsageError: neither value would be right.
        """
        if saved["optimizer"] != self._kind:
            self._refuse(saved, f"the optimizer is {self._kind}, and was {saved['optimizer']}")
        new_args = saved["args"] != self._args
        notes = []
        for name, was, now in _differences(saved["scheduler"], self._scheduler):
            if new_args:
                self._refuse(saved, f"{name} is {now}, and was {was}")
            notes.append(f"{name} stays as it was, {was}, though the task makes {now} now")
        return notes + self._options(saved, {frozenset(g["params"]): g for g in groups}, new_args)

    def _options(
        self, saved: Mapping[str, Any], restored: Mapping[Any, dict[str, Any]], new_args: bool
    ) -> list[str]:
        began = {frozenset(group["params"]): group for group in saved["groups"]}
        notes: dict[str, list[str]] = {}
        for index, group in enumerate(self._groups):
            key = frozenset(group["params"])
            if key not in began or key not in restored:
                continue
            for option, was, now in _differences(began[key], group):
                current = restored[key].get(option)
                if not new_args:
                    text = f"{option} stays {current}, though the task makes {now} now"
                elif current == was:
                    restored[key][option] = now
                    text = f"{option} is {now} from here on, it was {was}"
                else:
                    what = f"{option} of parameter group {index} is {now}, was {was}"
                    self._refuse(saved, f"{what}, and has become {current}")
                notes.setdefault(text, []).append(str(index))
        return [f"{text} (parameter group {', '.join(each)})" for text, each in notes.items()]

    def _refuse(self, saved: Mapping[str, Any], what: str) -> NoReturn:
        differing = list(_differences(saved["args"], self._args))
        fields = " and ".join(f"args.{name}" for name, _, _ in differing)
        given = f"given by {fields}" if fields else "made by the task"
        given_then = [(name, json.dumps(shown(name, was))) for name, was, _ in differing]
        back = " ".join(f"--set args.{name}={was}" for name, was in given_then)
        raise UsageError(
            f"what is {given} cannot change in the middle of this training: {what}, while the "
            f"checkpoint continues with the old value; resume with {back or 'the old code'}, or "
            "launch a new run",
            code="resume.settings-changed",
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            yield name, then.get(name), now.get(name)


def _plain(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options that are numbers, strings, or sequences of these."""
    for name, value in group.items():
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if all(isinstance(each, _PLAIN) for each in _items(value)):
            yield name, value


def _numbers(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the numbers and strings in a state, by name."""
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
