"""Rebuilds the trained model, and collects calls of it on real data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dtrain.errors import UsageError
from dtrain.job.spec import JobSpec
from dtrain.task import Task
from dtrain.train.checkpoint.state import load_model_state
from dtrain.train.data.fetch import EVALUATION_EPOCH, Fetcher, Request
from dtrain.train.data.stream import is_stream
from dtrain.train.ema import averages_of
from dtrain.train.load import load_task
from dtrain.train.seeding import derive_seed, seed_everything

_NUM_SAMPLES = 32


@dataclass(frozen=True)
class Call:
    """One call of a model: its inputs and its outputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]
    num_samples: int


@dataclass(frozen=True)
class Trained:
    """A model with the parameters of a checkpoint, in `eval()`, on the CPU."""

    model: torch.nn.Module
    source: str
    """The source of the samples, for example `eval_dataset`."""
    calls: tuple[Call, ...]
    """The task's own calls of the model, on batches of different sizes."""


def trained_model(spec: JobSpec, job_dir: str, state: dict[str, Any]) -> Trained:
    """Build the task's model, load a checkpoint's state into it and call it with real samples.

    Args:
        spec: the run's job.
        job_dir: the directory of the task.
        state: plain parameter and buffer name → tensor.

    Raises:
        UsageError: the task never calls the model itself, so there is nothing to export.
        CheckpointError: the checkpoint does not fit the model.
    """
    task = load_task(spec.task, spec.args, job_dir, seed=spec.seed)
    seed_everything(derive_seed("model", spec.seed))
    model = task.model()
    load_model_state(model, state)
    for average in averages_of(model):
        average.start()  # the task evaluates the average, which must have these weights
    return called(task, model)


def called(task: Task, model: torch.nn.Module) -> Trained:
    """Return a model with the calls that its task makes of it; errors as for `trained_model`."""
    model.eval()
    source, batches = _batches(task)
    calls = tuple(_call(task, model, batch, size) for size, batch in batches)
    return Trained(model, source, calls)


def _batches(task: Task) -> tuple[str, list[tuple[int, Any]]]:
    """Return two batches of different sizes, from the evaluation data if there are any."""
    source, dataset = "eval_dataset", task.eval_dataset()
    if dataset is None:
        source, dataset = "train_dataset", task.train_dataset()
    batch: Callable[[int], Any]
    if is_stream(dataset):
        samples = list(itertools.islice(iter(dataset), _NUM_SAMPLES))
        num, batch = len(samples), lambda size: task.collate(samples[:size])
    else:
        fetcher = Fetcher(dataset, task, seed=0)
        num = min(len(dataset), _NUM_SAMPLES)
        batch = lambda size: fetcher(Request(EVALUATION_EPOCH, np.arange(size)))  # noqa: E731
    return source, [(size, batch(size)) for size in {num: 0, max(1, num // 2): 0}]


def _call(task: Task, model: torch.nn.Module, batch: Any, num_samples: int) -> Call:
    """Return the first call of the model, or of the task's average of it, in `evaluate`."""
    seen: list[Call] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(Call(args, kwargs, tensors_in(output), num_samples))

    averages = [each.model for each in averages_of(model) if each.source is model]
    handles = [each.register_forward_hook(note, with_kwargs=True) for each in (model, *averages)]
    try:
        with torch.no_grad():
            task.evaluate(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen or not seen[0].outputs:
        raise UsageError(
            "the task calls methods of the model, and never model(x) with tensors as the result: "
            "there is no single call to export; --to safetensors writes its parameters",
            code="export.no-single-call",
        )
    return seen[0]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return every tensor of an output, from first to last."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        return []
    return [tensor for part in parts for tensor in tensors_in(part)]
