"""Modules whose forward is compiled, or computed again in backward instead of kept.

Such a module gets a subclass of its own class, with the same name. So the names of parameters, the
results of `isinstance` and copies of the model are as without. `torch.compile(model)` and torch's
`checkpoint_wrapper` put another module around it, with other names.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.train.strategies.fsdp_wrapping import contains, of_classes, outermost, units
from dtrain.train.tracing.perturb import is_of_keras


def change_forwards(model: Module, spec: JobSpec, device: torch.device) -> None:
    """Change the modules of a model as `train.activation_checkpointing` and `train.compile` say.

    It is called before the strategy wraps the model or cuts its parameters.

    Raises:
        DtrainError: the model has no such modules, or nothing can be compiled here.
    """
    asked = spec.train.activation_checkpointing
    if (asked or spec.train.compile) and is_of_keras(model):
        name = "activation_checkpointing" if asked else "compile"
        raise DtrainError(
            f"train.{name} changes the forward of torch modules, which Keras does not call: leave "
            "it out, or write the model with torch",
            code="keras.calls-no-forward",
        )
    blocks = units(model, spec.fsdp.wrap)
    if asked:
        field = "train.activation_checkpointing"
        chosen = blocks if asked is True else of_classes(model, asked, field)
        if not chosen:
            raise DtrainError(
                "train.activation_checkpointing: true means the members of ModuleLists and "
                f"Sequentials, but {type(model).__name__} has none; name the classes of modules "
                "instead, for example [Block]",
                code="strategy.no-blocks",
            )
        for module in chosen:
            _become(module, _checkpointed_eager if _counts_batches(module) else _checkpointed)
    if spec.train.compile:
        _require_compiler(device)
        # DDP's optimizer of graphs raises an error for one with a checkpoint
        torch._dynamo.config.optimize_ddp = not asked
        for module in _compiled_modules(model, blocks if spec.strategy == "fsdp" else []):
            _become(module, _compiled)


def graphs() -> int:
    """Return how many graphs torch.compile has made in this process, also those from its cache."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _become(module: Module, subclass: Callable[[Any], type[Module]]) -> None:
    module.__class__ = subclass(type(module))


def _compiled_modules(model: Module, blocks: list[Module]) -> Iterator[Module]:
    """Yield the modules that a loss may call. What a compiled module calls is compiled with it.

    A module that contains a block of FSDP is left out: to gather the block ends a graph.
    """
    if not contains(model, blocks):
        yield model
    yield from outermost(model, blocks)


@functools.cache
def _compiled(kind: type[Module]) -> type[Module]:
    """Return a subclass with a compiled forward. Modules of one class share the compiled code."""

    def run(self: Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    # torch keeps compiled code, at most 8 versions of it, with a code object: one for each class
    code = run.__code__.replace(co_name=kind.__name__)
    own = types.FunctionType(code, run.__globals__, kind.__name__, None, run.__closure__)
    # as without compiling: dropout draws from torch's generators
    compiled = torch.compile(own, options={"fallback_random": True})

    def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
        return compiled(self, *args, **kwargs)

    return _subclass(kind, forward)


@functools.cache
def _checkpointed(kind: type[Module]) -> type[Module]:
    def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        compute = functools.partial(kind.forward, self)
        if torch.compiler.is_compiling():  # torch refuses any context_fn
            return checkpoint(compute, *args, use_reentrant=False, **kwargs)
        contexts = functools.partial(_contexts, self)
        return checkpoint(compute, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return _subclass(kind, forward)


@functools.cache
def _checkpointed_eager(kind: Any) -> type[Module]:
    """Return a checkpointed class that is never compiled.

    torch cannot compile a checkpoint whose forward writes a buffer.
    """
    return _subclass(kind, torch._dynamo.disable(_checkpointed(kind).forward))


def _counts_batches(module: Module) -> bool:
    """Return whether a forward of a module may change running statistics."""
    norms = (each for each in module.modules() if isinstance(each, _NormBase))
    return any(each.track_running_stats for each in norms)


def _subclass(kind: type[Module], forward: Callable[..., Any]) -> type[Module]:
    same = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**same, "__doc__": kind.__doc__, "forward": forward})


def _contexts(module: Module) -> tuple[contextlib.AbstractContextManager[None], ...]:
    return contextlib.nullcontext(), _keeping_buffers(module)


@contextlib.contextmanager
def _keeping_buffers(module: Module) -> Iterator[None]:
    """Undo changes to buffers: a BatchNorm would count a batch that is computed twice."""
    before = [
        (owner._buffers, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owned, name, buffer, value in before:
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(buffer):
                buffer.copy_(value)
            owned[name] = buffer


def _require_compiler(device: torch.device) -> None:
    """Raise if torch.compile has no compiler for a device, before it fails within the first step.

    Raises:
        DtrainError: that is so.
    """
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        headers = sysconfig.get_path("include")
        try:
            cpp_builder.get_cpp_compiler()
            if os.path.isfile(f"{headers}/Python.h"):
                return
            lacks = f"Python.h in {headers}: install the headers of Python, for example python3-dev"
        except exc.InvalidCxxCompiler:
            lacks = "a C++ compiler, and finds none: install g++, or set CXX to another one"
    else:
        from torch.utils._triton import has_triton

        if has_triton():
            return
        lacks = "triton, which is not installed or does not support this device: pip install triton"
    raise DtrainError(
        f"train.compile: torch.compile needs {lacks}; or leave train.compile out",
        code="strategy.no-compiler",
    )
