"""From the reference in job.yaml to the user's task object."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dtrain import catalog
from dtrain.task import REQUIRED, Task
from dtrain.train.importing import job_problem, load_class
from dtrain.train.seeding import derive_seed, seed_everything


class Adapter(Protocol):
    """Makes tasks of what is written for another framework; `catalog.FRAMEWORKS` names it.

    Its module imports nothing of the framework: whoever is adapted has imported that.
    """

    def matches(self, factory: Callable[..., Any], trainer: str) -> bool:
        """Whether the class or function that a job names is, or may return, the framework's."""

    def adapt(self, make: functools.partial[Any], name: str, trainer: str) -> Any:
        """The task of what `make` makes.

        Where that is not the framework's: what it made, or None after a call that left no trace.

        Args:
            make: the factory with the job's arguments.
            name: of the factory, for messages.
            trainer: of the job.

        Raises:
            JobError: it cannot be trained as asked.
        """


def load_task(
    reference: str,
    args: Mapping[str, Any],
    job_dir: str | os.PathLike[str],
    trainer: str = "native",
    seed: int = 0,
) -> Task:
    """Import and construct a task.

    Args:
        reference: `file.py:Class`, relative to the job's folder, or `package.module:Class`.
        args: keyword arguments of the constructor.
        job_dir: the folder of job.yaml; it is importable from here on, as is a file's own.
        trainer: `lightning` takes a LightningModule too.
        seed: the job's; what the constructor draws is the same on every rank.

    Returns:
        The task. An object of another class with a task's methods is adapted: methods it lacks
        that have a default get it. What a function returned for Keras's `fit` is a `KerasTask`.

    Raises:
        JobError: no such file, module or class, arguments that do not fit its constructor, or a
            class without the methods that every task needs. What the user's own code raises
            comes through as it is.
    """
    factory = load_class("task", reference, job_dir)
    name = reference.rpartition(":")[2]
    seed_everything(derive_seed("task", seed))  # after the imports, which may draw too
    _check_arguments(factory, name, args)
    make = functools.partial(factory, **args)
    for framework in catalog.FRAMEWORKS:
        adapter: Adapter = catalog.load("framework", framework)()
        if adapter.matches(factory, trainer):
            adapted = adapter.adapt(make, name, trainer)
            if adapted is not None:
                return as_task(adapted, name)
    return as_task(make(), name)


def _check_arguments(factory: Callable[..., Any], name: str, args: Mapping[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**args)
    except TypeError as error:
        raise job_problem(
            "args", f"{name}({', '.join(args)}): {error}", code="task.bad-arguments"
        ) from None
    except ValueError:
        pass  # a callable without a readable signature


def as_task(made: Any, name: str) -> Task:
    """An object with a task's methods as a `Task`.

    Raises:
        JobError: it lacks some.
    """
    if isinstance(made, Task):
        missing = [m for m in REQUIRED if getattr(type(made), m) is getattr(Task, m)]
    else:
        missing = [m for m in REQUIRED if not callable(getattr(made, m, None))]
    if missing:
        raise job_problem(
            "task",
            f"{name} lacks {', '.join(f'{m}()' for m in missing)}",
            code="job.task-incomplete",
        )
    return made if isinstance(made, Task) else _Adapted(made)


class _Adapted(Task):
    """An object with a task's methods whose class does not derive from `Task`."""

    def __init__(self, made: Any) -> None:
        self.adapted = made
        for method in vars(Task):
            if not method.startswith("_") and callable(getattr(made, method, None)):
                setattr(self, method, getattr(made, method))
