"""Predictions: each rank writes its rows into its own files; rank 0 joins them in data set order.

Ranks evaluate contiguous shares, so the concatenated files of all ranks are the whole. No rank
ever holds more rows in memory than those of one batch.
"""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch

from dtrain.errors import DtrainError
from dtrain.run.files import replacing
from dtrain.run.remote.rank_files import RemoteRankFiles
from dtrain.task import Task
from dtrain.train import collectives
from dtrain.train.context import TrainContext
from dtrain.train.packed import exchanged

UNNAMED = "predictions"
"""The name of the array when `predict` returns a tensor."""


@exchanged
@dataclass(frozen=True)
class _Column:
    dtype: str
    row: tuple[int, ...]
    """The shape of one row."""

    def bytes(self, rows: int) -> int:
        return rows * int(np.prod(self.row, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype} rows of shape {self.row}"


Columns = dict[str, _Column]


def predicts(task: Task) -> bool:
    return type(task).predict is not Task.predict or "predict" in vars(task)


class Predictions:
    """Writes one rank's part of predictions.npz, in one pass over the evaluation data."""

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._folder = context.run.predictions_part(context.ranks.rank)
        self._columns: Columns = {}
        self._files: list[BinaryIO] = []
        """The file of each column, sorted by the names of the columns."""
        self._rows = 0

    def add(self, model: torch.nn.Module, batch: Any, num_samples: int) -> None:
        """Predict the next batch of this rank's share.

        Raises:
            DtrainError: the task did not return one row for each sample, or its rows are of
                another kind than those of the batch before.
        """
        arrays = _read(self._context.task.predict(model, batch), num_samples)
        columns = {name: _Column(a.dtype.str, a.shape[1:]) for name, a in arrays.items()}
        if self._rows == 0:
            self._begin(columns)
        elif columns != self._columns:
            raise DtrainError(
                f"predict() returned {_differing(self._columns, columns)} for one batch and "
                f"{_differing(columns, self._columns)} for another; all rows must be of one kind",
                code="predict.rows-differ",
            )
        for file, name in zip(self._files, sorted(arrays), strict=True):
            file.write(arrays[name].tobytes())
        self._rows += num_samples

    def finish(self) -> None:
        """Join the rows of all ranks. All ranks call it.

        Raises:
            DtrainError: ranks returned different kinds of rows, or rank 0 cannot see a rank's
                files.
        """
        self._close()
        shared = RemoteRankFiles.of(self._context.run, "predictions")
        if shared is not None and self._rows:
            shared.upload(self._folder)
        everyone = collectives.gather_to_all((self._rows, self._columns))
        rows = {rank: rows for rank, (rows, _) in enumerate(everyone) if rows > 0}
        columns = [everyone[rank][1] for rank in rows]
        for rank, theirs in zip(rows, columns, strict=True):
            if theirs != columns[0]:
                raise DtrainError(
                    f"predict() returned {_differing(columns[0], theirs)} on rank {min(rows)} and "
                    f"{_differing(theirs, columns[0])} on rank {rank}; all rows must be of one "
                    "kind",
                    code="predict.rows-differ",
                )
        if self._context.ranks.is_rank_zero:
            if shared is not None:
                shared.download([self._context.run.predictions_part(rank) for rank in rows])
            self._join(rows, columns[0])
            shutil.rmtree(self._folder.parent, ignore_errors=True)

    def discard(self) -> None:
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # only the last rank finds it empty
            self._folder.parent.rmdir()

    def _begin(self, columns: Columns) -> None:
        self._columns = columns
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files = [(self._folder / str(i)).open("wb") for i in range(len(columns))]

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def _join(self, rows: dict[int, int], columns: Columns) -> None:
        run = self._context.run
        with replacing(run.predictions) as file, zipfile.ZipFile(file, "w") as archive:
            for index, (name, column) in enumerate(sorted(columns.items())):
                header = {"descr": column.dtype, "fortran_order": False}
                shape = (sum(rows.values()), *column.row)
                # a ZipInfo has a fixed date, so equal predictions give equal files
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    np.lib.format.write_array_header_1_0(entry, {**header, "shape": shape})
                    for rank, count in rows.items():
                        part = run.predictions_part(rank) / str(index)
                        _append(part, column.bytes(count), entry, rank)


def _append(part: Path, size: int, entry: IO[bytes], rank: int) -> None:
    found = part.stat().st_size if part.exists() else None
    if found != size:
        raise DtrainError(
            f"the predictions of rank {rank} should be {size} bytes in {part}, but rank 0 sees "
            f"{'no such file' if found is None else found}; all nodes need the same run directory",
            code="predict.files-not-shared",
        )
    with part.open("rb") as source:
        shutil.copyfileobj(source, entry, 1 << 20)


def _read(value: Any, num_samples: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the task's predictions as arrays by name."""
    named = value if isinstance(value, Mapping) else {UNNAMED: value}
    arrays = {}
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            raise DtrainError(
                f"predict() returned {type(tensor).__name__} under the name {name!r}; return a "
                "tensor with one row for each sample of the batch, or a dict of such tensors by "
                "name",
                code="predict.not-rows",
            )
        if tensor.dim() == 0 or len(tensor) != num_samples:
            raise DtrainError(
                f"predict() returned {name!r} with shape {tuple(tensor.shape)} for a batch of "
                f"{num_samples} samples; the first dimension must be the samples, one row for each",
                code="predict.not-rows",
            )
        if tensor.dtype is torch.bfloat16:  # NumPy has no bfloat16
            tensor = tensor.float()
        arrays[name] = np.ascontiguousarray(tensor.detach().cpu().resolve_conj().numpy())
    return arrays


def _differing(columns: Columns, others: Columns) -> str:
    """Describe, as `columns` has it, the first array that differs between the two."""
    for name in sorted({*columns, *others}):
        if columns.get(name) != others.get(name):
            return f"{name!r} with {columns[name]}" if name in columns else f"no {name!r}"
    return "the same"
