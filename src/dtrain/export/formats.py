"""One function for each format: it writes the file, reads it back, and compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.errors import DtrainError, UsageError, shortened
from dtrain.export.model import Call, Trained, tensors_in

_TOLERANCE = 1e-4
"""The largest difference of outputs, as a fraction of the largest output. Another order of
additions gives about 1e-6.
"""

_LARGE = 1_500_000_000
"""From this many bytes of parameters on, an ONNX file keeps them in a second file. Its limit is
2 GB.
"""

Writer = Callable[[Trained, Path], str]
Runner = Callable[[Call], Sequence[torch.Tensor]]


def of_model(name: str) -> Writer:
    """Return the function of a format that also contains the model's computation."""
    return {"torch-export": torch_export, "onnx": onnx, "keras": keras}[name]


def safetensors(state: Mapping[str, Any], path: Path, about: dict[str, str]) -> str:
    """Write parameters and buffers by name, and compare them with the checkpoint's bytes."""
    from safetensors.torch import load_file, save_file

    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    # copies: safetensors refuses tensors that share memory, for example tied weights
    copies = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    save_file(copies, path, metadata={"format": "pt", **about})
    read = load_file(path)
    for name, value in tensors.items():
        if name not in read or not _same_bits(value, read[name]):
            raise DtrainError(
                f"{name} has other values when it is read back",
                code="export.changed-when-read-back",
            )
    return f"all {len(tensors)} tensors are bit for bit those of the checkpoint"


def torch_export(trained: Trained, path: Path) -> str:
    """Write a `.pt2` file for `torch.export.load`."""
    try:
        program = _program(trained)
        torch.export.save(program, path)
    except Exception as error:  # there are many kinds; the compiler names the cause
        raise _refusal("torch.export", error) from error
    module = torch.export.load(path).module()
    return _compared(trained, lambda call: tensors_in(module(*call.args, **call.kwargs)))


def onnx(trained: Trained, path: Path) -> str:
    """Write an `.onnx` file, checked with onnxruntime."""
    import onnxruntime

    size = sum(p.numel() * p.element_size() for p in trained.model.parameters())
    try:
        made: Any = torch.onnx.export(_program(trained), dynamo=True, verbose=False)
        made.save(path, external_data=size > _LARGE)
    except Exception as error:
        raise _refusal("torch.onnx", error) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(call: Call) -> list[torch.Tensor]:
        given = tensors_in([*call.args, *call.kwargs.values()])
        outputs = session.run(None, dict(zip(names, [t.numpy() for t in given], strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return _compared(trained, run)


def keras(trained: Trained, path: Path) -> str:
    """Write a `.keras` file for `keras.saving.load_model`."""
    import keras as library

    if not isinstance(trained.model, library.Model):
        raise UsageError(
            f"the model is a {type(trained.model).__name__}, not a keras.Model; "
            "--to torch-export writes any that torch can export",
            code="export.not-keras",
        )
    trained.model.save(path)
    loaded: Any = library.saving.load_model(path, compile=False)

    def run(call: Call) -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors_in(loaded(*call.args, **{**call.kwargs, "training": False}))

    return _compared(trained, run)


def _program(trained: Trained) -> torch.export.ExportedProgram:
    """Return the model's forward, for any number of samples if the model allows that."""
    call = trained.calls[0]
    dynamic: Any = torch.utils._pytree.tree_map(
        lambda value: _any_batch(value, call.num_samples), (call.args, call.kwargs)
    )
    names = list(_names(trained.model, call))
    shapes = {**dict(zip(names, dynamic[0], strict=True)), **dynamic[1]}
    with torch.no_grad():
        return torch.export.export(
            trained.model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False
        )


def _names(model: torch.nn.Module, call: Call) -> list[str]:
    import inspect

    bound = inspect.signature(model.forward).bind(*call.args)
    return list(bound.arguments)


def _any_batch(value: Any, num_samples: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == num_samples > 1:
        return {0: torch.export.Dim.AUTO}
    return None


def _compared(trained: Trained, run: Runner) -> str:
    """Return the largest difference over the calls.

    The first call must work. The others have other numbers of samples.

    Raises:
        DtrainError: the outputs differ from the model's.
    """
    worst, sizes = 0.0, []
    for index, call in enumerate(trained.calls):
        try:
            outputs = run(call)
        except Exception:
            if index == 0:
                raise
            break  # the exported model takes one number of samples only
        worst = max(worst, _difference(call, outputs))
        sizes.append(str(call.num_samples))
    only = "" if len(sizes) == len(trained.calls) else f"; for {sizes[0]} samples at once only"
    return (
        f"outputs on {' and '.join(sizes)} samples of {trained.source}() differ by at most "
        f"{worst:.1e}{only}"
    )


def _difference(call: Call, outputs: Sequence[torch.Tensor]) -> float:
    if [tuple(t.shape) for t in outputs] != [tuple(t.shape) for t in call.outputs]:
        raise DtrainError(
            "the outputs of the exported model have other shapes than the model's",
            code="export.outputs-differ",
        )
    worst = 0.0
    for expected, found in zip(call.outputs, outputs, strict=True):
        gap = (expected.double() - found.double()).abs().max().item() if expected.numel() else 0.0
        largest = expected.double().abs().max().item() if expected.numel() else 0.0
        if not gap <= _TOLERANCE * max(largest, 1.0) or math.isnan(gap):
            raise DtrainError(
                f"the exported model computes other outputs: they differ by {gap:.1e}, and the "
                f"largest is {largest:.1e}; no file was kept",
                code="export.outputs-differ",
            )
        worst = max(worst, gap)
    return worst


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return bool(torch.equal(*flat))


def _refusal(what: str, error: Exception) -> UsageError:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UsageError(
        f"{what} cannot export this model: {shortened(first.strip(), 300)}; --to safetensors writes"
        " its parameters",
        code="export.model-unsupported",
    )
