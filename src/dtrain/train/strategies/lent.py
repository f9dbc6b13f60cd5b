"""A micro-batch that one rank lends to those without any sample."""

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
"""A batch, and how many samples are in it."""

_CONTAINERS = (tuple, list, dict, UserDict)


def lend(lender: int, given: Given | None, device: torch.device, code: Path) -> Given:
    """Ours; where there is none, the lender's, on our device. Called by all ranks.

    Nothing is built of it but tensors, arrays, plain values and containers, of which the classes
    are the task's own, dataclasses or of the standard kinds.
    """
    file = io.BytesIO()
    if dist.get_rank() == lender:
        torch.save(given, file)
    data = collectives.bytes_from_rank(lender, file.getvalue())
    return taken(data, device, code) if given is None else given


def taken(data: bytes, device: torch.device, code: Path) -> Given:
    """What was lent as these bytes; see `lend`."""
    file = io.BytesIO(data)
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        classes = [found for name in named if (found := _container(name, code)) is not None]
        file.seek(0)
        with torch.serialization.safe_globals([*NUMPY, *classes]):
            borrowed: Given = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DtrainError(
            "this rank has no sample in a step and borrows a batch of another rank, but that holds "
            "more than tensors, arrays, numbers, texts and containers of these"
            f"{_refused_class(error)}: let collate() return a dict, or add its classes with "
            "torch.serialization.add_safe_globals, or make the global batch larger",
            code="strategy.batch-cannot-be-lent",
        ) from error
    return borrowed


def _refused_class(error: pickle.UnpicklingError) -> str:
    """The class that torch does not build, where its error names one."""
    found = re.search(r"global: GLOBAL (\S+)", str(error))
    return "" if found is None else f", for example {found[1]}"


def _container(name: str, code: Path) -> Any:
    """The class of that name, when it may be built; nothing is imported for it."""
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
