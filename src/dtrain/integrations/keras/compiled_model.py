"""A function that returns a compiled model and the arguments of `model.fit`, as a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dtrain.errors import DtrainError
from dtrain.integrations.keras.data import weighted
from dtrain.integrations.keras.task import KerasTask
from dtrain.train.importing import job_problem
from dtrain.train.seeding import RandomState

_ACCEPTED = (
    "x",
    "y",
    "sample_weight",
    "class_weight",
    "validation_data",
    "validation_split",
    "callbacks",
    "steps_per_epoch",
)
_DECIDED_BY_JOB = {
    "epochs": "train.epochs of the job",
    "batch_size": "train.global_batch_size of the job: samples of all processes together",
    "validation_batch_size": "eval.batch_size of the job",
    "validation_freq": "eval.every_epochs of the job",
    "validation_steps": "no field: all samples are evaluated, once",
    "shuffle": "data.shuffle of the job",
    "initial_epoch": "the checkpoint's: dtrain resume continues where a run ended",
    "verbose": "log.every_steps of the job",
}


class CompiledModelTask(KerasTask):
    """The task of a function that returns `(model, arguments of fit)`.

    Args:
        make: calls the function once more.
        made: the value that the function returned.
        name: the name of the function, for messages.
        before: the random state before that call, so that `make` gives the same model again.

    Raises:
        JobError: the function returned something else.
    """

    def __init__(self, make: Callable[[], Any], made: Any, name: str, before: RandomState) -> None:
        self._make = make
        self._before = before
        self._model, self._fit = _checked(made, name)
        self.steps_per_epoch = self._fit.get("steps_per_epoch")

    def compiled(self) -> Any:
        """Return the model; a new one if the first is in use, for example after a rollback."""
        if self._model is None:
            after = RandomState.capture()
            self._before.restore()
            try:
                return self._make()[0]
            finally:
                after.restore()
        model, self._model = self._model, None
        return model

    def train_data(self) -> Any:
        """Return `x`, `y` and weights without the part held out by `validation_split`."""
        data, weights = self._split()[0], self._fit.get("class_weight")
        return data if weights is None else weighted(data, weights)

    def eval_data(self) -> Any:
        """Return `validation_data`, or the last part of the arrays, held out by
        `validation_split`.
        """
        given = self._fit.get("validation_data")
        return given if given is not None else self._split()[1]

    def callbacks(self) -> Any:
        given = self._fit.get("callbacks") or []
        return given if isinstance(given, list | tuple) else [given]

    def _split(self) -> tuple[Any, Any]:
        x, y = self._fit["x"], self._fit.get("y")
        fraction = self._fit.get("validation_split")
        if y is None:
            if fraction:
                raise DtrainError(
                    "validation_split needs arrays x and y; give validation_data instead",
                    code="keras.split-needs-arrays",
                )
            return (x, None)
        import keras

        weight = self._fit.get("sample_weight")
        if weight is not None and keras.tree.is_nested(y) and not keras.tree.is_nested(weight):
            weight = keras.tree.map_structure(lambda _: weight, y)  # as in fit
        parts = (x, y) if weight is None else (x, y, weight)
        if not fraction:
            return parts, None
        at = int(len(keras.tree.flatten(x)[0]) * (1 - fraction))
        cut = keras.tree.map_structure
        return cut(lambda part: part[:at], parts), cut(lambda part: part[at:], parts)


def _checked(made: Any, name: str) -> tuple[Any, Mapping[str, Any]]:
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], Mapping):
        raise job_problem(
            "task",
            f"{name} returned a Keras model without its data: return model, {{'x': x, 'y': y}}, "
            "the arguments that model.fit would receive",
            code="keras.no-data",
        )
    model, fit = made
    for argument in fit:
        if argument in _DECIDED_BY_JOB:
            raise job_problem(
                "task",
                f"{name} returned {argument!r} for fit; that is {_DECIDED_BY_JOB[argument]}",
                code="keras.fit-argument",
            )
        if argument not in _ACCEPTED:
            raise job_problem(
                "task",
                f"{name} returned {argument!r} for fit; it may return {', '.join(_ACCEPTED)}",
                code="keras.fit-argument",
            )
    if fit.get("class_weight") is not None and fit.get("sample_weight") is not None:
        raise job_problem(
            "task",
            f"{name} returned both class_weight and sample_weight, which fit does not take either",
            code="keras.fit-argument",
        )
    if fit.get("x") is None:
        raise job_problem("task", f"{name} returned no x for fit", code="keras.no-data")
    return model, fit
