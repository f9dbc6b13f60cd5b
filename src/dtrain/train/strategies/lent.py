"""A micro-batch that one rank lends to the ranks without samples."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dtrain.errors import DtrainError
from dtrain.train import collectives
from dtrain.train.checkpoint.leaves import NUMPY

Given = tuple[Any, int]
"""A batch, and the number of samples in it."""

_CONTAINERS = (tuple, list, dict, UserDict)


def lend(lender: int, given: Given | None, device: torch.device, code: Path) -> Given:
    """Return this rank's batch, or a copy of the lender's if it has none. All ranks call it.

    The copy is built from tensors, arrays, plain values and containers only. Classes of containers
    are the task's own, dataclasses, or standard types.
    """
    file = io.BytesIO()
    if dist.get_rank() == lender:
        torch.save(given, file)
    data = collectives.bytes_from_rank(lender, file.getvalue())
    return taken(data, device, code) if given is None else given


def taken(data: bytes, device: torch.device, code: Path) -> Given:
    """Return the batch that was sent as these bytes; see `lend`."""
    file = io.BytesIO(data)
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        classes = [found for name in named if (found := _container(name, code)) is not None]
        file.seek(0)
        with torch.serialization.safe_globals([*NUMPY, *classes]):
            borrowed: Given = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DtrainError(
            "this rank has no samples in a step and borrows a batch of another rank. That batch "
            "holds more than tensors, arrays, numbers, strings and containers of these"
            f"{_refused_class(error)}. Let collate() return a dict, or add its classes with "
            "torch.serialization.add_safe_globals, or make the global batch larger",
            code="strategy.batch-cannot-be-lent",
        ) from error
    return borrowed


def _refused_class(error: pickle.UnpicklingError) -> str:
    """Return the class that torch refused to build, if its error names one."""
    found = re.search(r"global: GLOBAL (\S+)", str(error))
    return "" if found is None else f", for example {found[1]}"


def _container(name: str, code: Path) -> Any:
    """Return the class of this name, or None if it must not be built. Nothing is imported."""
    module_name, _, attribute = name.rpartition(".")
    module = sys.modules.get(module_name)
    found = getattr(module, attribute, None)
    if not isinstance(found, type) or found.__module__ != module_name:
        return None
    if dataclasses.is_dataclass(found) or issubclass(found, _CONTAINERS):
        return found
    file = Path(getattr(module, "__file__", None) or "/")
    is_of_task = file.is_relative_to(code) and "site-packages" not in file.parts
    return found if is_of_task else None
