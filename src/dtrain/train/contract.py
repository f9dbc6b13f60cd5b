"""What a task's methods must return, looked at before the first step.

A mistake here would otherwise be told by torch, many steps later and somewhere else, or by nobody.
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

_OUR_OWN = str(Path(__file__).resolve().parent.parent) + os.sep
_OPTIMIZER = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
_SCHEDULER = ("step", "state_dict", "load_state_dict")
_WRAPPERS = {
    "DistributedDataParallel": "torch.nn.parallel",
    "DataParallel": "torch.nn.parallel",
    "FullyShardedDataParallel": "torch.distributed",
    "FSDPModule": "torch.distributed",
}
"""Classes that share a model between processes, and in which package of torch they are."""


def named(task: Task, method: str) -> str:
    """`task.py:41: optimizer()`: how an error about what a method returned begins.

    Args:
        task: its `written_as`, if it has one, tells what the user wrote in place of a method.
        method: of a task. One that is dtrain's own has no place.
    """
    written = getattr(task, "written_as", {}).get(method)
    name = f"{getattr(written, '__name__', method)}()"
    for function in (written, getattr(task, method, None), getattr(type(task), method, None)):
        place = _place(function)
        if place:
            return f"{place}: {name}"
    return name


def _place(function: Any) -> str:
    """`task.py:41`, where a function of the user's begins; empty for dtrain's own."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None or code.co_filename.startswith(_OUR_OWN):
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


def refuse_wrapped(model: torch.nn.Module, told: str) -> None:
    """Make sure that nothing of a model is shared over processes yet, whoever `told` made it."""
    for name, module in model.named_modules():
        wrapper = _wrapper(module)
        if wrapper is not None:
            what = "a model" if not name else f"a model whose {name} is"
            raise DtrainError(
                f"{told} made {what} wrapped in {wrapper} already; make the bare model, and set "
                "strategy: ddp, fsdp or dp in the job",
                code="task.model-wrapped",
            )


def check_model(model: Any, task: Task) -> None:
    """Make sure that it is a bare module with something to train."""
    told = named(task, "model")
    if not isinstance(model, torch.nn.Module):
        raise DtrainError(
            f"{told} returned {described(model)}, not a torch.nn.Module", code="task.not-a-model"
        )
    refuse_wrapped(model, told)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, each in tensors.items() if torch.nn.parameter.is_lazy(each)]
    if lazy:
        raise DtrainError(
            f"{told} returned a model whose {lazy[0]} has no shape yet. Its layer is a lazy one, "
            "which takes its size from the first batch, but the optimizer and the ranks need it "
            "before. Call the model once in model(), on zeros of a sample's shape, or write the "
            "size",
            code="task.lazy-layer",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DtrainError(
            f"{told} returned a model without trainable parameters", code="task.nothing-to-train"
        )


def check_optimizer(optimizer: Any, model: torch.nn.Module, task: Task) -> None:
    """Make sure that it is one optimizer, over parameters of the model, that steps by itself."""
    told = named(task, "optimizer")
    if isinstance(optimizer, list | tuple):
        raise DtrainError(
            f"{told} returned {len(optimizer)} optimizers, but a task has one. Give that one "
            "several groups of parameters, each with its own options",
            code="task.several-optimizers",
        )
    if not _has_all(optimizer, _OPTIMIZER):
        raise DtrainError(
            f"{told} returned {described(optimizer)}, not a torch.optim.Optimizer",
            code="task.not-an-optimizer",
        )
    needed = _needed(getattr(type(optimizer), "step", None))  # a scheduler replaces the object's
    if needed:
        raise DtrainError(
            f"{told} returned {type(optimizer).__name__}, whose step({', '.join(needed)}) computes "
            "the loss several times. In dtrain a step has one gradient, that of its global batch. "
            "Use an optimizer whose step() needs no argument, for example AdamW or SGD",
            code="task.optimizer-needs-closure",
        )
    known = {id(each) for each in model.parameters()}
    held = [each for group in optimizer.param_groups for each in group["params"]]
    strangers = [each for each in held if id(each) not in known]
    if strangers:
        raise DtrainError(
            f"{told} returned an optimizer with {len(strangers)} of {len(held)} parameters that "
            f"are not the model's, the first of shape {tuple(strangers[0].shape)}. Take them from "
            "the model that optimizer(model) receives. If something else is trained, for example a "
            "layer of the loss, make it a part of that model in model()",
            code="task.optimizer-foreign-parameters",
        )


def left_out(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """Names of the trainable parameters that an optimizer does not hold."""
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    named = model.named_parameters()
    return [plain_name(name) for name, p in named if p.requires_grad and id(p) not in held]


def check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, task: Task) -> None:
    """Make sure that it counts steps of this optimizer."""
    if scheduler is None:
        return
    told = named(task, "scheduler")
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise DtrainError(
            f"{told} returned ReduceLROnPlateau, which is stepped with a metric. dtrain steps the "
            "scheduler after every optimizer step, so use one that counts steps",
            code="task.plateau-scheduler",
        )
    if not _has_all(scheduler, _SCHEDULER):
        raise DtrainError(
            f"{told} returned {described(scheduler)}, not a scheduler of torch.optim.lr_scheduler",
            code="task.not-a-scheduler",
        )
    for each, _ in _spans(scheduler, None):
        its = getattr(each, "optimizer", optimizer)
        if its is not optimizer and isinstance(its, torch.optim.Optimizer):
            raise DtrainError(
                f"{told} returned {type(each).__name__} of another optimizer, so it would not "
                "change the learning rate of this training. Make it for the optimizer that "
                "scheduler(optimizer) receives",
                code="task.scheduler-of-other-optimizer",
            )


def remarks_on_length(scheduler: Any, steps: int | None, task: Task) -> Iterator[str]:
    """Where a scheduler that is made for a number of steps has not those of the training.

    Raises:
        DtrainError: torch would raise in the middle of the training.
    """
    if scheduler is None:
        return
    told = named(task, "scheduler")
    for each, span in _spans(scheduler, steps):
        name, length, end = _length(each)
        if span is None or length is None or length == span:
            continue
        what = (
            f"{told} returned {type(each).__name__} of {name}={length}, and this training has "
            f"{span} steps"
        )
        counted = "schedulers are stepped once after each optimizer step, of a global batch"
        if length > span and name == "total_steps":
            yield f"{what}: it ends before its rate has come down; {counted}"
        elif length < span and not end:
            raise DtrainError(
                f"{what}: torch would raise after step {length}; {counted}",
                code="task.scheduler-too-short",
            )
        elif length < span:
            yield f"{what}: {end} from step {length} on; {counted}"


def check_data(dataset: Any, told: str) -> None:
    """Make sure that samples can be taken out of what a method returned."""
    anew = "return an object whose __iter__ begins anew each time"
    why = ""
    if dataset is None:
        why = ": is there a return?"
    elif isinstance(dataset, str | bytes):
        why = ": open what it names, and return an object with its samples"
    elif isinstance(dataset, DataLoader):
        why = ", whose batches and order are dtrain's to make: return its data set"
    elif isinstance(dataset, Mapping) and len(dataset) > 0 and 0 not in dataset:
        keys = ", ".join(repr(key) for key in list(dataset)[:3])
        why = f", whose keys ({keys}) are no positions: return one of its values, or a list of them"
    elif inspect.isclass(dataset):
        why = ": make one"
    elif inspect.isroutine(dataset):
        why = f", or, where it yields samples, {anew}"
    elif hasattr(dataset, "__next__") and not hasattr(dataset, "__getitem__"):
        why = f", an iterator, which can be gone through only once; {anew}"
    if why:
        raise DtrainError(f"{told} returned {described(dataset)}{why}", code="data.not-a-data-set")


def check_dataset(dataset: Any, told: str) -> int:
    """The length of a map-style data set."""
    check_data(dataset, told)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DtrainError(
            f"{told} returned {type(dataset).__name__}, which lacks __len__ or __getitem__; "
            "the order and the shares of ranks are computed from the position, so a map-style "
            "data set is needed",
            code="data.no-positions",
        )
    length = len(dataset)
    if length == 0:
        raise DtrainError(f"{told} returned an empty data set", code="data.empty")
    return length


def _has_all(value: Any, names: tuple[str, ...]) -> bool:
    return not inspect.isclass(value) and all(hasattr(value, name) for name in names)


def _needed(method: Any) -> list[str]:
    """The arguments that a method of a class must be given."""
    if not inspect.isroutine(method):
        return []
    own = list(inspect.signature(method).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in own if each.default is each.empty and each.kind in kinds]


def _wrapper(module: torch.nn.Module) -> str | None:
    """The class of torch's that shares this module between processes; None: none does."""
    for base in type(module).__mro__:
        if base.__module__.startswith(_WRAPPERS.get(base.__name__, "no package")):
            return base.__name__
    if any(hasattr(each, "full_tensor") for each in module.parameters(recurse=False)):
        return "DTensor"
    return None


def _spans(scheduler: Any, steps: int | None) -> Iterator[tuple[Any, int | None]]:
    """A scheduler and those inside it, each with the steps that it has in such a training."""
    inside: list[Any] = getattr(scheduler, "_schedulers", [])
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        starts = [0, *scheduler._milestones]
        for each, start, end in zip(inside, starts, [*starts[1:], steps], strict=True):
            yield from _spans(each, None if end is None else max(0, end - start))
    elif isinstance(scheduler, lr_scheduler.ChainedScheduler):
        for each in inside:
            yield from _spans(each, steps)
    elif hasattr(scheduler, "steps_in"):  # one of another library's, stepped now and then
        yield from _spans(scheduler.scheduler, scheduler.steps_in(steps))
    else:
        yield scheduler, steps


def _length(scheduler: Any) -> tuple[str, int | None, str]:
    """How many steps a schedule is made for, in which argument, and what comes after them."""
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        return "total_steps", scheduler.total_steps, ""
    if isinstance(scheduler, lr_scheduler.PolynomialLR):
        return "total_iters", scheduler.total_iters, "the rate is 0"
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return "T_max", scheduler.T_max, "the rate rises again"
    return "", None, ""
