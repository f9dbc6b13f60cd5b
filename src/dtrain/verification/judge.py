"""Judges from the recordings whether each layout is the same training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dtrain.errors import DtrainError
from dtrain.trace import Recording, TraceOptions
from dtrain.verification import causes, losses
from dtrain.verification.case import Case
from dtrain.verification.compare import L1, L2, Comparison, Excess, compare
from dtrain.verification.findings import exact_findings
from dtrain.verification.layouts import REFERENCE, Layout
from dtrain.verification.rules import (
    BATCH_NORM,
    BITWISE,
    COMPILED,
    ENDED_EARLY,
    GENERATORS,
    OTHER_GENERATORS,
    SCALER,
    Finding,
)
from dtrain.verification.runner import RunFailed, Runner, Stopped
from dtrain.verification.samples import other_contents

Verdict = Literal["same", "rounding", "different", "failed"]

_BEYOND_ROUNDING = 0.5
"""Missing digits in bf16 or fp16 never change a first gradient by half of its size."""


@dataclass(frozen=True)
class Result:
    layout: Layout
    verdict: Verdict
    level: str | None
    """The highest of L0 … L3 that it reached. None means that even the samples differ."""
    largest: Excess | None = None
    """The largest difference of gradients or parameters. None means that nothing was measured."""
    first: Excess | None = None
    """The first difference of any size."""
    finding: Finding | None = None
    """The error that was found; only with `different`."""
    failure: str = ""
    """The verdict of the run, if it failed."""
    reason: str = ""
    """The error of a failed run, in one line."""
    error_code: str = ""
    """The code of a failed run's error."""
    shrinks: float | None = None
    """The factor by which the difference shrinks in fp64. None means that fp64 was not needed."""
    fixed_noise: bool = False
    """True if it was compared without dropout and with random numbers that belong to the samples.
    Otherwise several ranks would draw other numbers than one process.
    """
    draws: tuple[str, ...] = ()
    """Lines that draw random numbers in `loss`; only with `fixed_noise`."""
    bits_of: str = ""
    """Another layout with the same bits, if that is promised."""
    comparison: Comparison | None = field(default=None, repr=False)
    recording: Recording | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        return self.verdict in ("same", "rounding")

    @property
    def code(self) -> str:
        """The code of the error; empty if there is none."""
        return self.error_code if self.finding is None else self.finding.code


class Judge:
    """Compares layouts with the single-process reference of one job."""

    def __init__(self, runner: Runner, reference: Layout = REFERENCE) -> None:
        """Run the reference.

        Raises:
            RunFailed: the job fails even as one process.
        """
        self.runner = runner
        self._reference = reference
        self._tolerance = L1 if runner.trace_options.fp64 else L2
        try:
            self.reference = runner.record(reference)
        except RunFailed as error:
            how = " in fp64" if runner.trace_options.fp64 else ""
            raise RunFailed(
                f"the job fails as one process{how}:\n{error}",
                code="verify.reference-failed",
            ) from None
        if not self.reference.steps:
            raise RunFailed(
                "the job trained, but recorded nothing to compare with",
                code="verify.nothing-recorded",
            )
        self._bits: dict[Layout, tuple[Layout, Recording]] = {}

    def judge(self, layouts: Sequence[Layout]) -> Iterator[Result]:
        """Yield the result of each layout as soon as it is available."""
        for layout in layouts:
            try:
                result = self._judge(layout)
            except Stopped:
                raise
            except RunFailed as error:
                result = self._failed(layout, error)
            except DtrainError as error:
                result = Result(
                    layout,
                    "failed",
                    None,
                    failure=str(error),
                    error_code=error.code,
                    reason=str(error),
                )
            yield self._with_bits(result)

    def _judge(self, layout: Layout) -> Result:
        other = self.runner.record(layout)
        if not other.steps:
            failure = f"trainer {layout.trainer!r} records nothing"
            return Result(
                layout, "failed", None, failure=failure, error_code="verify.nothing-recorded"
            )
        finding = next(exact_findings(self.reference, other, layout), None)
        comparison = compare(self.reference, other)
        result = Result(
            layout,
            "different",
            None,
            largest=comparison.largest if comparison.steps else None,
            first=comparison.first if comparison.steps else None,
            finding=finding,
            comparison=comparison,
            recording=other,
        )
        if finding is not None:
            return replace(result, level=_data_level(self.reference, other))
        level = self._level(comparison)
        if level is not None:
            return replace(result, verdict="same", level=level)
        if _draws(self.reference):
            finding = self._compiled_differs(layout) if layout.compiled else None
            if finding is not None:
                return replace(result, level="L0", finding=finding)
            return self._with_fixed_noise(result)
        return self._in_fp64(result, self.runner.trace_options)

    def _failed(self, layout: Layout, error: RunFailed) -> Result:
        """Return the result of a failed run. Its recording may show another training."""
        result = Result(
            layout,
            "failed",
            None,
            failure=str(error),
            error_code=error.code,
            reason=error.reason,
            recording=error.recording,
        )
        if error.recording is None:
            return result
        found = exact_findings(self.reference, error.recording, layout)
        finding = next((each for each in found if each.observation != ENDED_EARLY), None)
        if finding is None:
            return result
        return replace(result, verdict="different", finding=finding)

    def _with_fixed_noise(self, result: Result) -> Result:
        """Compare again with random numbers that do not depend on the layout."""
        options = replace(self.runner.trace_options, own_noise=False)
        draws = self.runner.record(self._reference, options).draws()
        if any(place.startswith(OTHER_GENERATORS) for place in draws):
            # their numbers cannot be assigned to the samples of a call, so each call has one sample
            options = replace(options, by_sample=True)
        reference, other = self._both(result.layout, options)
        comparison = compare(reference, other)
        result = replace(
            result,
            fixed_noise=True,
            draws=tuple(draws),
            largest=comparison.largest,
            first=comparison.first,
            comparison=comparison,
        )
        level = self._level(comparison)
        if level is not None:
            return replace(result, verdict="same", level=level)
        return self._in_fp64(result, options)

    def _compiled_differs(self, layout: Layout) -> Finding | None:
        """Compare with the same layout, not compiled, which draws the same random numbers.

        While noise is fixed, torch compiles nothing: that comparison alone would prove nothing.
        """
        eager = replace(layout, compiled=False)
        options = self.runner.trace_options
        if self._level(compare(self.runner.record(eager), self.runner.record(layout))):
            return None
        options = replace(options, fp64=True)
        exact = compare(*(self.runner.record(each, options) for each in (eager, layout)))
        excess = exact.excess(L1)
        if excess is None:
            return None
        observation = f"the relative difference from {eager.name} is {excess.value:.1e} in fp64"
        return Finding(COMPILED, observation, "", excess.step, excess.tensor)

    def _level(self, comparison: Comparison) -> str | None:
        """Return the highest level that a comparison shows; None if it needs more runs."""
        if comparison.identical and comparison.excess(L1) is None:
            return "L3"
        within = comparison.excess(self._tolerance) is None and not comparison.suspicious
        return self._tolerance.level if within else None

    def _in_fp64(self, result: Result, options: TraceOptions) -> Result:
        """Distinguish rounding, which shrinks with the machine epsilon, from another training."""
        options = replace(options, fp64=True)
        try:
            reference, other = self._both(result.layout, options)
        except RunFailed as error:
            text = f"the layout differs, but it cannot run in fp64, which would show why:\n{error}"
            code = "verify.fp64-failed"
            return replace(result, verdict="failed", level="L0", failure=text, error_code=code)
        exact = compare(reference, other)
        assert result.largest is not None
        if not self.runner.trace_options.fp64:
            result = replace(result, shrinks=_shrinks(result.largest.value, exact.largest.value))
        excess = exact.excess(L1)
        if excess is None:
            scaler = self._only_in_low_precision(result)
            if scaler is not None:
                return replace(result, level="L0", finding=scaler)
            within = result.comparison is not None and result.comparison.excess(L2) is None
            if within:  # only one suspicious tensor was the reason for this run
                return replace(result, verdict="same", level="L2")
            return replace(result, verdict="rounding", level="L1")
        case = Case(reference, other, result.layout, self.runner.spec, excess)
        finding = (
            (self._compiled_differs(case.layout) if case.layout.compiled else None)
            or self._batch_norm(case, options)
            or losses.sum_for_mean(case)
            or self._state_in_task(case, options)
            or self._by_sample(case, options)
            or causes.explain(case)
        )
        return replace(result, level="L0", finding=finding)

    def _only_in_low_precision(self, result: Result) -> Finding | None:
        """Return a finding for a difference that fp64 lacks, but that is too large for rounding."""
        precision = self.runner.spec.train.precision
        if precision == "fp32" or result.comparison is None:
            return None
        first = result.comparison.steps[0].gradients
        if first.relative <= _BEYOND_ROUNDING:
            return None
        observation = f"the first gradient differs by {first.relative:.1e}, but not in fp64"
        return Finding(SCALER, observation, f"the loss scaling or autocast of {precision}", 1)

    def _batch_norm(self, case: Case, options: TraceOptions) -> Finding | None:
        """Return a finding if BatchNorm is the only cause.

        It is the cause if there is no difference without BatchNorm's batch statistics.
        """
        facts = self.reference.steps[0].facts
        names = facts.get("batch_norm") or []
        if not names:
            return None
        reference, other = self._both(case.layout, replace(options, batch_norm=False))
        of_keras = bool(facts.get("of_keras"))  # Keras takes means in fp32 for any input
        if compare(reference, other).excess(L2 if of_keras else L1) is not None:
            return None
        # torch's SyncBatchNorm works on GPUs only, and that of Keras with TensorFlow only
        synchronized = case.layout.gpus and not of_keras
        instead = "SyncBatchNorm" if synchronized else "strategy 'exact'"
        norms = "LayerNormalization" if of_keras else "GroupNorm, LayerNorm"
        cause = (
            f"BatchNorm ({', '.join(names[:3])}) normalises over each process's own samples: with "
            f"frozen statistics there is no difference. Use a norm over features ({norms}), or "
            f"{instead}"
        )
        return Finding(BATCH_NORM, str(case), cause, case.step, case.shown.tensor)

    def _state_in_task(self, case: Case, options: TraceOptions) -> Finding | None:
        """Return a finding if attributes of the task that change in training are the cause."""
        changing = self.reference.changing_state()
        if not changing:
            return None
        names = tuple(sorted(changing))
        try:
            reference, other = self._both(case.layout, replace(options, frozen=names))
        except RunFailed:
            return None
        if compare(reference, other).excess(L1) is None:
            return losses.state_in_task(case, names)
        generators = [name for name in names if changing[name] in GENERATORS]
        return losses.generator_in_task(case, generators) if generators else None

    def _by_sample(self, case: Case, options: TraceOptions) -> Finding | None:
        """Compare the losses of single samples, if losses differ: they show which rank differs."""
        if not losses.losses_differ(case):
            return None
        try:
            reference, other = self._both(case.layout, replace(options, by_sample=True))
        except RunFailed:  # for example with BatchNorm, which needs two
            return None
        return losses.loss_by_sample(case, reference, other)

    def _both(self, layout: Layout, options: TraceOptions) -> tuple[Recording, Recording]:
        return self.runner.record(self._reference, options), self.runner.record(layout, options)

    def _with_bits(self, result: Result) -> Result:
        """Raise the level to L3 if the same bits are promised and found.

        They are promised for the same processes again, and for `exact` on any number of processes.
        """
        layout, recording = result.layout, result.recording
        if recording is None or not result.passed:
            return result
        key = replace(layout.twin, title=None)
        if layout.is_exact:
            key = replace(key, procs=1)
        if key not in self._bits:
            self._bits[key] = (layout, recording)
            return result
        twin, of_twin = self._bits[key]
        comparison = compare(of_twin, recording)
        if comparison.identical:
            return replace(result, level="L3", bits_of=twin.name)
        if not layout.repeats_bits:
            return result
        observation = f"the bits differ from those of {twin.name}"
        cause = "something depends on the launcher or on timing, or a resume did not restore it"
        first = comparison.first
        step, tensor = (first.step, first.tensor) if first else (1, "")
        finding = Finding(BITWISE, observation, cause, step, tensor)
        return replace(result, verdict="different", finding=finding)


def _draws(reference: Recording) -> bool:
    """Return whether the model draws random numbers.

    The recording must be of one process, which seeds only once.
    """
    return any(line.drew for step in reference.ranks for line in reference.lines(step))


def _data_level(reference: Recording, other: Recording) -> str | None:
    steps = range(1, reference.last_step + 1)
    same = all(
        reference.ids(step) == other.ids(step) and not any(other_contents(reference, other, step))
        for step in steps
    )
    return "L0" if same else None


def _shrinks(native: float, fp64: float) -> float:
    return native / fp64 if fp64 > 0 else float("inf")
