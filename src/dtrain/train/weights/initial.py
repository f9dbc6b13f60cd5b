"""Starts a new training with stored weights, and reports which of them fit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dtrain.errors import CheckpointError, first_line
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.state import plain_name
from dtrain.train.checkpoint.store import CheckpointStore
from dtrain.train.context import TrainContext
from dtrain.train.metrics.events import Events
from dtrain.train.weights.formats import Stored, Tensors
from dtrain.train.weights.matching import Names, match, tied
from dtrain.train.weights.source import opened
from dtrain.words import few

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """The stored tensors that were taken, and those that were not."""

    source: str
    tensors: int
    """The number of tensors of the model."""
    checkpoint: str = ""
    rejected: dict[str, str] = field(default_factory=dict)
    matched: int = 0
    """Tensors of the model that have their values from the source, also those that share the
    memory of another."""
    missing: list[str] = field(default_factory=list)
    """Names in the model that the source does not have."""
    unexpected: list[str] = field(default_factory=list)
    """Names in the source that the model does not have."""
    other: list[str] = field(default_factory=list)
    """Names with another shape or kind of number, and both of these."""
    converted: dict[str, int] = field(default_factory=dict)
    """The number of tensors by conversion, for example `bfloat16 to float32`."""
    prefix: str = ""
    """The change of names, for example `model. removed`."""

    @property
    def differences(self) -> str:
        listed = {
            "not in the file": self.missing,
            "only in the file": self.unexpected,
            "other shape or type": self.other,
        }
        return "; ".join(f"{what}: {few(names)}" for what, names in listed.items() if names)

    def __str__(self) -> str:
        where = f"{self.source}{self.checkpoint and f', {self.checkpoint}'}"
        parts = [f"{self.matched} of {self.tensors} tensors match", self.differences]
        parts += [f"converted: {number} from {how}" for how, number in self.converted.items()]
        parts += [f"prefix of the names: {self.prefix}"] if self.prefix else []
        return f"starts with the weights of {where}: {'; '.join(filter(None, parts))}"


class InitialWeights:
    """The weights of `checkpoint.init_from`, for the model of a run that has no checkpoint yet.

    All ranks call its methods.
    """

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._report: Report | None = None

    def load(self, model: torch.nn.Module) -> None:
        """Copy the stored weights into the model's own, before anything else refers to them.

        Raises:
            CheckpointError: they cannot be read, none fits, or with `init_strict` not all do.
        """
        context, spec = self._context, self._context.spec.checkpoint
        recorder, location = context.recorder, spec.init_from
        if location is None:
            return
        if CheckpointStore(context.run, context.ranks, Retention(1)).has_any():
            if recorder is not None:
                recorder.resumes()
            return
        with opened(location, context) as source:
            report = Report(location, 0, source.checkpoint, source.rejected)
            _load(model, source.tensors, report, strict=spec.init_strict)
        self._report = report
        if recorder is not None:
            recorder.loaded(model)

    def tell(self, events: Events) -> None:
        """Report what was loaded, if anything was."""
        report = self._report
        if report is None:
            return
        events.write("initialized", **asdict(report))
        if self._context.ranks.is_rank_zero:
            level = logging.WARNING if report.differences else logging.INFO
            logger.log(level, "%s", report)


def _load(model: torch.nn.Module, stored: Tensors, report: Report, *, strict: bool) -> None:
    state = model.state_dict()
    own = {plain_name(n): each for n, each in state.items() if isinstance(each, torch.Tensor)}
    together = tied(own)
    names = match(together, stored)
    found = {name: stored[names.stored[name]] for name in own if name in names.stored}
    taken = dict(_compared(own, found, report))
    for group in together:
        matched = group if any(name in taken for name in group) else ()
        report.matched += len(matched)
        report.missing += [name for name in group if not matched and name not in found]
    report.tensors = len(own)
    report.unexpected = [each for name, each in names.stored.items() if name not in own]
    if names.prefix:
        report.prefix = f"{names.prefix} {'added' if names.added else 'removed'}"
    _refuse(report, names, own, strict=strict)
    with torch.no_grad():
        for name, each in taken.items():
            _read(name, each, own[name])
    model.load_state_dict(state)  # modules have hooks for this, or return copies


def _compared(
    own: Mapping[str, torch.Tensor], found: Mapping[str, Stored], report: Report
) -> Iterator[tuple[str, Stored]]:
    """Yield what fits; note in the report what does not, and what is converted."""
    converted: Counter[str] = Counter()
    for name, theirs in found.items():
        mine = own[name]
        if torch.nn.parameter.is_lazy(mine):
            report.other.append(f"{name} {tuple(theirs.shape)} instead of no shape yet")
        elif mine.shape != theirs.shape:
            report.other.append(f"{name} {tuple(theirs.shape)} instead of {tuple(mine.shape)}")
        elif _kind(mine.dtype) != _kind(theirs.dtype):
            report.other.append(f"{name} {_named(theirs.dtype)} instead of {_named(mine.dtype)}")
        else:
            if mine.dtype != theirs.dtype:
                converted[f"{_named(theirs.dtype)} to {_named(mine.dtype)}"] += 1
            yield name, theirs
    report.converted = dict(converted)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else "integer"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(report: Report, names: Names, own: Mapping[str, Any], *, strict: bool) -> None:
    if not report.matched:
        more = ""
        if names.ambiguous:
            more = f"\nseveral prefixes of the names would do: {few(names.ambiguous)}"
        raise CheckpointError(
            f"no tensor fits the model, which has {few(own)}; {report.differences}{more}",
            code="checkpoint.init-no-match",
        )
    if strict and report.differences:
        raise CheckpointError(
            f"it does not fit the model; {report.matched} of {report.tensors} tensors match; "
            f"{report.differences}\nwith checkpoint.init_strict: false, those that match are used",
            code="checkpoint.init-differs",
        )


def _read(name: str, stored: Stored, target: torch.Tensor) -> None:
    try:
        stored.read_into(target)
    except CheckpointError:
        raise
    except Exception as error:  # libraries raise errors of any type for damaged files
        raise CheckpointError(
            f"{name} cannot be read: {first_line(error)}", code="checkpoint.init-unreadable"
        ) from error
