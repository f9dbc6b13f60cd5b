"""Checks what a task's methods return, before the first step.

Without these checks, torch would report a mistake many steps later and at another location, or it
would not be reported at all.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from dtrain.errors import DtrainError
from dtrain.task import Task
from dtrain.train.checkpoint.state import plain_name

_DTRAIN_FOLDER = str(Path(__file__).resolve().parent.parent) + os.sep
_OPTIMIZER = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
_SCHEDULER = ("step", "state_dict", "load_state_dict")
_WRAPPERS = {
    "DistributedDataParallel": "torch.nn.parallel",
    "DataParallel": "torch.nn.parallel",
    "FullyShardedDataParallel": "torch.distributed",
    "FSDPModule": "torch.distributed",
}
"""Classes that share a model between processes, and the package of torch that has them."""


def named(task: Task, method: str) -> str:
    """Return the start of an error about a method's result, for example `task.py:41: optimizer()`.

    Args:
        task: the task. Its `written_as`, if it has one, maps a method to the function that the user
            wrote instead of it.
        method: the name of a method of the task. A method of dtrain itself has no location.
    """
    written = getattr(task, "written_as", {}).get(method)
    name = f"{getattr(written, '__name__', method)}()"
    for function in (written, getattr(task, method, None), getattr(type(task), method, None)):
        location = _location(function)
        if location:
            return f"{location}: {name}"
    return name


def _location(function: Any) -> str:
    """Return the location of a user's function, for example `task.py:41`; empty for dtrain's."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None or code.co_filename.startswith(_DTRAIN_FOLDER):
        return ""
    relative = os.path.relpath(code.co_filename)
    file = relative if len(relative) < len(code.co_filename) else code.co_filename
    return f"{file}:{code.co_firstlineno}"


def described(value: Any) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__} and not an object of it"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', '')}() itself: call it"
    return type(value).__name__


def refuse_wrapped(model: torch.nn.Module, origin: str) -> None:
    """Raise if a part of the model is already shared between processes.

    `origin` is the method that made it, for the message.
    """
    for name, module in model.named_modules():
        wrapper = _wrapper(module)
        if wrapper is not None:
            what = "a model" if not name else f"a model whose {name} is"
            raise DtrainError(
                f"{origin} made {what} already wrapped in {wrapper}; make the model without the "
                "wrapper, and set strategy: ddp, fsdp or dp in the job",
                code="task.model-wrapped",
            )


def check_model(model: Any, task: Task) -> None:
    """Raise unless it is a module without a wrapper that has trainable parameters."""
    origin = named(task, "model")
    if not isinstance(model, torch.nn.Module):
        raise DtrainError(
            f"{origin} returned {described(model)}, not a torch.nn.Module", code="task.not-a-model"
        )
    refuse_wrapped(model, origin)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, each in tensors.items() if torch.nn.parameter.is_lazy(each)]
    if lazy:
        raise DtrainError(
            f"{origin} returned a model whose {lazy[0]} has no shape yet. Its layer is lazy: it "
            "takes its size from the first batch, but the optimizer and the ranks need the size "
            "before. Call the model once in model() on zeros of a sample's shape, or write the "
            "size",
            code="task.lazy-layer",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DtrainError(
            f"{origin} returned a model without trainable parameters", code="task.nothing-to-train"
        )


def check_optimizer(optimizer: Any, model: torch.nn.Module, task: Task) -> None:
    """Raise unless it is one optimizer over parameters of the model, without a closure."""
    origin = named(task, "optimizer")
    if isinstance(optimizer, list | tuple):
        raise DtrainError(
            f"{origin} returned {len(optimizer)} optimizers, but a task has one. Give that one "
            "several groups of parameters, each with its own options",
            code="task.several-optimizers",
        )
    if not _has_all(optimizer, _OPTIMIZER):
        raise DtrainError(
            f"{origin} returned {described(optimizer)}, not a torch.optim.Optimizer",
            code="task.not-an-optimizer",
        )
    needed = _needed(getattr(type(optimizer), "step", None))  # a scheduler replaces the object's
    if needed:
        raise DtrainError(
            f"{origin} returned {type(optimizer).__name__}, whose step({', '.join(needed)}) "
            "computes the loss several times. In dtrain a step has one gradient, that of its "
            "global batch. Use an optimizer whose step() needs no argument, for example AdamW or "
            "SGD",
            code="task.optimizer-needs-closure",
        )
    known = {id(each) for each in model.parameters()}
    held = [each for group in optimizer.param_groups for each in group["params"]]
    foreign = [each for each in held if id(each) not in known]
    if foreign:
        raise DtrainError(
            f"{origin} returned an optimizer with {len(foreign)} of {len(held)} parameters that "
            f"are not the model's, the first of shape {tuple(foreign[0].shape)}. Take them from "
            "the model that optimizer(model) receives. If something else is trained, for example a "
            "layer of the loss, make it a part of that model in model()",
            code="task.optimizer-foreign-parameters",
        )


def left_out(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """Return the names of the trainable parameters that an optimizer does not hold."""
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    named = model.named_parameters()
    return [plain_name(name) for name, p in named if p.requires_grad and id(p) not in held]


def check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, task: Task) -> None:
    """Raise unless it is a scheduler of this optimizer that counts steps."""
    if scheduler is None:
        return
    origin = named(task, "scheduler")
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise DtrainError(
            f"{origin} returned ReduceLROnPlateau, which is stepped with a metric. dtrain steps "
            "the scheduler after every optimizer step, so use one that counts steps",
            code="task.plateau-scheduler",
        )
    if not _has_all(scheduler, _SCHEDULER):
        raise DtrainError(
            f"{origin} returned {described(scheduler)}, not a scheduler of "
            "torch.optim.lr_scheduler",
            code="task.not-a-scheduler",
        )
    for each, _ in _spans(scheduler, None):
        its = getattr(each, "optimizer", optimizer)
        if its is not optimizer and isinstance(its, torch.optim.Optimizer):
            raise DtrainError(
                f"{origin} returned {type(each).__name__} of another optimizer, so it would not "
                "change the learning rate of this training. Make it for the optimizer that "
                "scheduler(optimizer) receives",
                code="task.scheduler-of-other-optimizer",
            )


def remarks_on_length(scheduler: Any, steps: int | None, task: Task) -> Iterator[str]:
    """Yield a remark for each scheduler whose number of steps is not that of the training.

    Raises:
        DtrainError: torch would raise in the middle of the training.
    """
    if scheduler is None:
        return
    origin = named(task, "scheduler")
    for each, span in _spans(scheduler, steps):
        name, length, end = _length(each)
        if span is None or length is None or length == span:
            continue
        what = (
            f"{origin} returned {type(each).__name__} of {name}={length}, and this training has "
            f"{span} steps"
        )
        counted = "schedulers are stepped once after each optimizer step, of a global batch"
        if length > span and name == "total_steps":
            yield f"{what}: training ends before the rate has decreased; {counted}"
        elif length < span and not end:
            raise DtrainError(
                f"{what}: torch would raise after step {length}; {counted}",
                code="task.scheduler-too-short",
            )
        elif length < span:
            yield f"{what}: {end} from step {length} on; {counted}"


def check_data(dataset: Any, origin: str) -> None:
    """Raise unless samples can be read from what a method returned."""
    iterable = "return an object whose __iter__ starts from the beginning each time"
    why = ""
    if dataset is None:
        why = ": is there a return?"
    elif isinstance(dataset, str | bytes):
        why = ": open the file that it names, and return an object with its samples"
    elif isinstance(dataset, DataLoader):
        why = ", but dtrain makes the batches and the order itself: return its data set"
    elif isinstance(dataset, Mapping) and len(dataset) > 0 and 0 not in dataset:
        keys = ", ".join(repr(key) for key in list(dataset)[:3])
        why = f", whose keys ({keys}) are not positions: return one of its values, or a list"
    elif inspect.isclass(dataset):
        why = ": make an object of it"
    elif inspect.isroutine(dataset):
        why = f", or, if it yields samples, {iterable}"
    elif hasattr(dataset, "__next__") and not hasattr(dataset, "__getitem__"):
        why = f", an iterator, which can be read only once; {iterable}"
    if why:
        raise DtrainError(
            f"{origin} returned {described(dataset)}{why}", code="data.not-a-data-set"
        )


def check_dataset(dataset: Any, origin: str) -> int:
    """Return the length of a map-style data set; raise if it is not one."""
    check_data(dataset, origin)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DtrainError(
            f"{origin} returned {type(dataset).__name__}, which lacks __len__ or __getitem__; "
            "dtrain computes the order and the shares of ranks from positions, so it needs a "
            "map-style data set",
            code="data.no-positions",
        )
    length = len(dataset)
    if length == 0:
        raise DtrainError(f"{origin} returned an empty data set", code="data.empty")
    return length


def _has_all(value: Any, names: tuple[str, ...]) -> bool:
    return not inspect.isclass(value) and all(hasattr(value, name) for name in names)


def _needed(method: Any) -> list[str]:
    """Return the names of the arguments that a method of a class requires."""
    if not inspect.isroutine(method):
        return []
    own = list(inspect.signature(method).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in own if each.default is each.empty and each.kind in kinds]


def _wrapper(module: torch.nn.Module) -> str | None:
    """Return the class of torch that shares this module between processes, or None."""
    for base in type(module).__mro__:
        if base.__module__.startswith(_WRAPPERS.get(base.__name__, "no package")):
            return base.__name__
    if any(hasattr(each, "full_tensor") for each in module.parameters(recurse=False)):
        return "DTensor"
    return None


def _spans(scheduler: Any, steps: int | None) -> Iterator[tuple[Any, int | None]]:
    """Yield a scheduler and those inside it, each with the steps that it has in the training."""
    inside: list[Any] = getattr(scheduler, "_schedulers", [])
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        starts = [0, *scheduler._milestones]
        for each, start, end in zip(inside, starts, [*starts[1:], steps], strict=True):
            yield from _spans(each, None if end is None else max(0, end - start))
    elif isinstance(scheduler, lr_scheduler.ChainedScheduler):
        for each in inside:
            yield from _spans(each, steps)
    elif hasattr(scheduler, "steps_in"):  # another library's, which is not stepped in every step
        yield from _spans(scheduler.scheduler, scheduler.steps_in(steps))
    else:
        yield scheduler, steps


def _length(scheduler: Any) -> tuple[str, int | None, str]:
    """Return the argument with the number of steps, that number, and what happens after them."""
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        return "total_steps", scheduler.total_steps, ""
    if isinstance(scheduler, lr_scheduler.PolynomialLR):
        return "total_iters", scheduler.total_iters, "the rate is 0"
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return "T_max", scheduler.T_max, "the rate rises again"
    return "", None, ""
