"""From the reference in job.yaml to the user's task object."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain import procs
from dtrain.errors import JobError, Problem
from dtrain.integrations import lightning
from dtrain.task import REQUIRED, Task
from dtrain.train.seeding import RandomState, derive_seed, seed_everything

_OPTIONAL = (
    "scheduler",
    "eval_dataset",
    "evaluate",
    "predict",
    "sample_weights",
    "sample_order",
    "callbacks",
    "state_dict",
    "load_state_dict",
    "collate",
)


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
    package = _lightning_package(factory)
    if package is not None:
        _check_arguments(factory, name, args)
        if trainer != "lightning":
            raise _problem("task", f"{name} is a LightningModule; set trainer: lightning")
        return _of_lightning(functools.partial(factory, **args), name, package)
    before = RandomState.capture()
    made = _construct(factory, name, args)
    if _is_of_keras(made):
        from dtrain.integrations.keras.compiled_model import Given

        return Given(functools.partial(factory, **args), made, name, before)
    return _as_task(made, name)


def load_class(field: str, reference: str, job_dir: str | os.PathLike[str]) -> Callable[..., Any]:
    """The class, or whatever can be called, behind a reference in job.yaml.

    Raises:
        JobError: there is no such file, module or class; names `field`.
    """
    folder = Path(job_dir).absolute()
    procs.offer_current_folder()
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise _problem(field, f"{reference!r} is not `file.py:Class` or `package.module:Class`")
    module = _from_file(folder / place) if place.endswith(".py") else _from_name(place, folder)
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise _problem(field, f"{place} has no class {name!r}{_classes(module)}")
    made: Callable[..., Any] = factory
    return made


def _lightning_package(factory: Any) -> str | None:
    """The package whose LightningModule a class derives from; None when it does from neither.

    Asked without an import of Lightning: whoever derives from it has done that.
    """
    for base in getattr(factory, "__mro__", ()):
        package: str = base.__module__.removesuffix(".core.module")
        if base.__name__ == "LightningModule" and package in lightning.PACKAGES:
            return package
    return None


def _of_lightning(make: Callable[..., Any], name: str, package: str) -> Task:
    lightning.want(package)
    from dtrain.integrations.lightning.module import ModuleTask

    return ModuleTask(make, name)


def _is_of_keras(made: Any) -> bool:
    """Whether it is a Keras model, alone or with what `fit` takes; asked as for Lightning."""
    keras = sys.modules.get("keras")
    first = made[0] if isinstance(made, tuple) and made else made
    return keras is not None and isinstance(first, keras.Model)


def _from_file(path: Path) -> ModuleType:
    """The module in a file, under its stem, so that pickles and its siblings find the same one."""
    path = path.resolve()
    if not path.is_file():
        raise _problem("task", f"there is no file {path}")
    _make_importable(path.parent)
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        name += "_" + hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(name: str, folder: Path) -> ModuleType:
    _make_importable(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # the module is there, something that it imports is not
        raise _problem("task", f"there is no module {error.name!r}") from error


def _make_importable(folder: Path) -> None:
    if sys.path[:1] != [str(folder)]:  # further down it may be as the current folder
        sys.path.insert(0, str(folder))


def _construct(factory: Callable[..., Any], name: str, args: Mapping[str, Any]) -> Any:
    _check_arguments(factory, name, args)
    if "keras" in sys.modules and inspect.isfunction(factory):
        sys.modules["keras"].utils.clear_session()  # names count up, and checkpoints go by name
    return factory(**args)


def _check_arguments(factory: Callable[..., Any], name: str, args: Mapping[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**args)
    except TypeError as error:
        raise _problem("args", f"{name}({', '.join(args)}): {error}") from None
    except ValueError:
        pass  # a callable without a readable signature


def _as_task(made: Any, name: str) -> Task:
    if isinstance(made, Task):
        missing = [m for m in REQUIRED if getattr(type(made), m) is getattr(Task, m)]
    else:
        missing = [m for m in REQUIRED if not callable(getattr(made, m, None))]
    if missing:
        raise _problem("task", f"{name} lacks {', '.join(f'{m}()' for m in missing)}")
    return made if isinstance(made, Task) else _Adapted(made)


class _Adapted(Task):
    """An object with a task's methods whose class does not derive from `Task`."""

    def __init__(self, made: Any) -> None:
        self.adapted = made
        for method in (*REQUIRED, *_OPTIONAL):
            if callable(getattr(made, method, None)):
                setattr(self, method, getattr(made, method))


def _classes(module: ModuleType) -> str:
    here = [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return f"; it has {', '.join(here)}" if here else ""


def _problem(field: str, message: str) -> JobError:
    return JobError([Problem("job.yaml", None, None, field, message)])
