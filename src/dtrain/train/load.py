"""Loads the user's task object from the reference in job.yaml."""

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
    """Makes tasks of objects of another framework; `catalog.FRAMEWORKS` lists the adapters.

    The module of an adapter does not import the framework: the user's code has imported it.
    """

    def matches(self, factory: Callable[..., Any], trainer: str) -> bool:
        """Return whether the class or function that a job names belongs to the framework.

        A function belongs to it if it may return an object of the framework.
        """

    def adapt(self, make: functools.partial[Any], name: str, trainer: str) -> Any:
        """Return the task for the object that `make` returns.

        If the object is not one of the framework, return the object. Return None if `make` was
        called without a side effect and has to be called again.

        Args:
            make: the factory with the job's arguments.
            name: the name of the factory, for messages.
            trainer: the trainer of the job.

        Raises:
            JobError: the object cannot be trained in the requested way.
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
        reference: `file.py:Class`, relative to the job's directory, or `package.module:Class`.
        args: keyword arguments of the constructor.
        job_dir: the directory of job.yaml. It and that of the file are importable from here on.
        trainer: the trainer of the job; with `lightning`, the class may be a LightningModule.
        seed: the seed of the job, so that the constructor draws the same on every rank.

    Returns:
        The task. An object of another class with a task's methods is adapted: a method that it
        lacks gets the default, if there is one. The result of a function for Keras's `fit` becomes
        a `KerasTask`.

    Raises:
        JobError: there is no such file, module or class, the arguments do not fit its constructor,
            or the class lacks a method that every task needs. Errors of the user's own code are
            not changed.
    """
    factory = load_class("task", reference, job_dir)
    name = reference.rpartition(":")[2]
    seed_everything(derive_seed("task", seed))  # after the imports, which may draw numbers too
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
    """Return an object that has a task's methods as a `Task`.

    Raises:
        JobError: it lacks a required method.
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
    """A task made of an object that has a task's methods, but another base class."""

    def __init__(self, made: Any) -> None:
        self.adapted = made
        for method in vars(Task):
            if not method.startswith("_") and callable(getattr(made, method, None)):
                setattr(self, method, getattr(made, method))
