"""The formats in which weights are stored, each opened as named tensors that are read in place.

Nothing is unpickled without `weights_only`, and no tensor is read before its turn.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from dtrain import catalog
from dtrain.errors import CheckpointError, UsageError, first_line, quoted
from dtrain.train.checkpoint.content import read_model
from dtrain.train.checkpoint.files import OpenCheckpoint
from dtrain.train.checkpoint.headers import DTYPES
from dtrain.words import few

TORCH = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS, INDEX = ".safetensors", ".index.json"
HUGGING_FACE = tuple(
    f"{stem}{suffix}"
    for stem in (f"model{SAFETENSORS}", "pytorch_model.bin")
    for suffix in ("", INDEX)
)
"""The files in a directory of Hugging Face's, the preferred one first, as transformers reads it."""
_INSIDE = ("state_dict", "model_state_dict", "model")
"""The names of a state_dict among other things: Lightning's, of torch's tutorials, and others'."""


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read_into(self, target: torch.Tensor) -> Any:
        """Copy it into a tensor of its shape, with that one's type."""


Tensors = dict[str, Stored]


def of_file(path: Path, files: contextlib.ExitStack) -> Tensors:
    """Return the tensors of a file by name.

    Args:
        path: a regular file.
        files: closes what is opened.

    Raises:
        CheckpointError: it has another format, or is damaged. The message does not contain the
            path.
        UsageError: the package that reads it is missing.
    """
    if path.name.endswith(INDEX):
        return _of_index(path, files)
    if path.suffix == SAFETENSORS:
        return _of_safetensors(path, files)
    if path.suffix in TORCH:
        return _of_torch(path)
    raise CheckpointError(
        f"its name has none of the suffixes {', '.join((SAFETENSORS, *TORCH))}, which show the "
        "format",
        code="checkpoint.init-other-format",
    )


def of_checkpoint(opened: OpenCheckpoint) -> Tensors:
    """Return the tensors of the model in a checkpoint of dtrain."""
    return dict(read_model(opened))


# -- safetensors -----------------------------------------------------------------------------


class _OfSafetensors:
    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self._slice = file.get_slice(name)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._slice.get_shape())

    @property
    def dtype(self) -> torch.dtype:
        name = self._slice.get_dtype()
        if name not in DTYPES:
            raise CheckpointError(
                f"{self._name} has type {name}, which torch does not have",
                code="checkpoint.init-unreadable",
            )
        found: torch.dtype = getattr(torch, DTYPES[name])
        return found

    def read_into(self, target: torch.Tensor) -> None:
        target.copy_(self._file.get_tensor(self._name))


def _of_safetensors(path: Path, files: contextlib.ExitStack) -> Tensors:
    problem = catalog.EXPORTS["safetensors"].needs.problem("checkpoint.init_from with safetensors")
    if problem is not None:
        raise UsageError(problem, code="plan.missing-package")
    import safetensors

    try:
        file = files.enter_context(safetensors.safe_open(path, framework="pt"))
        return {name: _OfSafetensors(file, name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, "safetensors", error) from error


# -- torch.save ------------------------------------------------------------------------------


class _OfTorch:
    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name, self._tensor = name, tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def read_into(self, target: torch.Tensor) -> None:
        tensor = self._tensor
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{self._name} is not a plain dense tensor", code="checkpoint.init-other-format"
            )
        target.copy_(tensor)


def _of_torch(path: Path) -> Tensors:
    try:
        # files of torch before 1.6 are not zip files, and cannot be mapped into memory
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises errors of any type for bytes that are not its own
        classes = _foreign_classes(path, error)
        if not classes:
            raise _unreadable(path, "torch.save", error) from error
        raise CheckpointError(
            f"it holds objects of {few(classes)}, and loading them can run any code, so that is "
            "not done\nIf you trust the file, write one with the weights alone: "
            "torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)",
            code="checkpoint.init-unsafe",
        ) from error
    return {name: _OfTorch(name, each) for name, each in _state_dict(content).items()}


def _foreign_classes(path: Path, error: Exception) -> list[str]:
    """Return the classes for which `weights_only` refuses a file."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    with contextlib.suppress(Exception):  # it is for zip files, and these may be damaged
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return re.findall(r"GLOBAL (\S+) was not an allowed", str(error))


def _state_dict(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"it holds a {type(content).__name__} instead of a state_dict; write one with "
            "torch.save(model.state_dict(), …)",
            code="checkpoint.init-other-format",
        )
    inside = next((name for name in _INSIDE if isinstance(content.get(name), Mapping)), None)
    given = content if inside is None else content[inside]
    found = {
        name: each
        for name, each in given.items()
        if isinstance(name, str) and isinstance(each, torch.Tensor)
    }
    if not found:
        raise CheckpointError(
            f"it holds no state_dict: it has no tensors, and nothing under {', '.join(_INSIDE)}; "
            f"it has {few(map(quoted, map(str, content))) or 'nothing'}. Write a file with the "
            "weights alone: torch.save(model.state_dict(), …)",
            code="checkpoint.init-other-format",
        )
    return found


def _unreadable(path: Path, kind: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name} cannot be read as a file of {kind}: {first_line(error)}",
        code="checkpoint.init-unreadable",
    )


# -- an index of several files ---------------------------------------------------------------


def _of_index(path: Path, files: contextlib.ExitStack) -> Tensors:
    """Return the tensors of an index, which says which file has which tensor."""
    listed = _weight_map(path)
    shards: dict[str, Tensors] = {}
    for name in dict.fromkeys(listed.values()):
        shard = path.parent / name
        if Path(name).name != name or not name.endswith((SAFETENSORS, *TORCH)):
            raise _bad_index(path, f"it names {quoted(name)}, which is no file beside it")
        if not shard.is_file():
            raise _bad_index(path, f"{name} is missing")
        shards[name] = of_file(shard, files)
    for name, shard_name in listed.items():
        if name not in shards[shard_name]:
            raise _bad_index(path, f"{shard_name} does not contain {quoted(name)}")
    return {name: shards[shard][name] for name, shard in listed.items()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
        texts = [text for pair in listed.items() for text in pair]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _bad_index(path, f"it is no JSON with a weight_map ({error!r:.200})") from None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _bad_index(path, "its weight_map does not give the name of a file for each tensor")
    return dict(listed)


def _bad_index(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {why}", code="checkpoint.init-bad-index")
