"""Keras's own callbacks, told of dtrain's steps, evaluations and epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from dtrain.callback import Callback, Session
from dtrain.errors import DtrainError
from dtrain.train.seeding import RandomState

_INSTEAD = {
    "BackupAndRestore": "the job's checkpoint: section and dtrain resume",
    "OrbaxCheckpoint": "the job's checkpoint: section",
    "TensorBoard": "log.loggers: [tensorboard] of the job",
    "RemoteMonitor": "log.loggers of the job",
    "SwapEMAWeights": "nothing yet: dtrain evaluates the weights that it trains",
    "ProgbarLogger": "nothing: the console shows how far it has come",
    "History": "metrics.jsonl in the run's folder",
}
_FILES = {"CSVLogger": "filename", "ModelCheckpoint": "filepath"}
"""Callbacks that write a file, and where they keep its name."""
_NEVER_CALLED = tuple(
    f"on_{what}_{rest}"
    for what in ("test", "predict")
    for rest in ("begin", "end", "batch_begin", "batch_end")
)
_DERIVED = {"min_delta"}
"""What a callback changes of itself and makes anew: Keras turns its sign by the mode."""


class KerasCallbacks(Callback):
    """Tells all of them, in order, what `fit` would have told them.

    Losses and metrics are those of all processes together, so that each process's callbacks come
    to the same decisions; those that write files are told on rank 0 alone. What they change of
    themselves (numbers and texts) is kept in checkpoints.

    Args:
        given: callbacks of Keras.

    Raises:
        DtrainError: one of them cannot do here what it does in `fit`; says what can.
    """

    def __init__(self, given: list[Any]) -> None:
        for each in given:
            _refuse(each)
        self._all = given
        self._told = given
        self._begun: int | None = None
        """The epoch that callbacks know to be running."""
        self._waits = False
        """Whether an epoch is over whose evaluation is still to come."""
        self._batch, self._sum, self._weight = 0, 0.0, 0
        self._loaded: dict[str, Any] = {}
        self._initial: list[dict[str, Any]] = []

    def on_start(self, session: Session) -> None:
        session.model.stop_training = False
        for each in self._all:
            each.set_params({"verbose": 0})
            each.set_model(session.model)
            _place_file(each, session)
        if session.rank != 0:
            self._told = [each for each in self._all if _writes(each) is None]
        self._initial = [_plain(each) for each in self._all]
        self._tell(session, "on_train_begin")
        self._restore()
        if not session.over and self._begun is None:
            self._begin(session)

    def on_step(self, session: Session, loss: float) -> None:
        self._sum += loss * session.batch_size
        self._weight += session.batch_size
        self._tell(session, "on_train_batch_end", self._batch, self._mean())
        self._batch += 1
        if session.epoch == self._begun and not session.over:
            self._tell(session, "on_train_batch_begin", self._batch, {})

    def on_epoch(self, session: Session) -> None:
        self._waits = session.evaluation_follows
        if not self._waits:
            self._end_epoch(session, {})

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        if self._waits:
            self._end_epoch(session, {f"val_{name}": value for name, value in metrics.items()})

    def on_end(self, session: Session) -> None:
        self._tell(session, "on_train_end", self._mean())

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self._all, self._initial, strict=True)
        return {
            "begun": self._begun,
            "waits": self._waits,
            "batch": [self._batch, self._sum, self._weight],
            "kinds": [type(each).__name__ for each in self._all],
            "changed": [_changed(each, initial) for each, initial in pairs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def _restore(self) -> None:
        """Go on where a checkpoint was; callbacks that it does not know begin afresh."""
        state = self._loaded
        if not state:
            return
        self._begun, self._waits = state["begun"], state["waits"]
        self._batch, self._sum, self._weight = state["batch"]
        pairs = zip(self._all, state["kinds"], state["changed"], strict=False)
        for each, kind, changed in pairs:
            if type(each).__name__ == kind:
                vars(each).update(changed)

    def _begin(self, session: Session) -> None:
        self._begun = session.epoch
        self._batch, self._sum, self._weight = 0, 0.0, 0
        self._tell(session, "on_epoch_begin", session.epoch, {})
        self._tell(session, "on_train_batch_begin", 0, {})

    def _end_epoch(self, session: Session, measured: dict[str, float]) -> None:
        self._waits = False
        logs = {**self._mean(), **measured}
        epoch, self._begun = session.epoch - 1, None
        _check_monitors(self._all, logs, epoch)
        self._tell(session, "on_epoch_end", epoch, logs)
        if not session.over and not session.model.stop_training:
            self._begin(session)

    def _mean(self) -> dict[str, float]:
        """The loss over the samples of the epoch so far, as Keras gives it."""
        return {"loss": self._sum / self._weight} if self._weight else {}

    def _tell(self, session: Session, method: str, *args: Any) -> None:
        """Call a method of each, and take over what it did to the rate or asked for."""
        random, model = RandomState.capture(), session.model
        for each in self._told:
            try:
                getattr(each, method)(*args)
            except Exception as error:
                error.add_note(f"in {method}() of Keras's callback {type(each).__name__}")
                raise
            if model.stop_training:
                session.stop(f"{type(each).__name__} set the model's stop_training")
        random.restore()
        session.optimizer.note()


def adapted(given: list[Any]) -> list[Any]:
    """A task's callbacks, with those of Keras as one of dtrain's."""
    of_keras = [each for each in given if isinstance(each, keras.callbacks.Callback)]
    others = [each for each in given if not isinstance(each, keras.callbacks.Callback)]
    return [*others, KerasCallbacks(of_keras)] if of_keras else others


def _refuse(each: Any) -> None:
    names = [kind.__name__ for kind in type(each).__mro__]
    for name in names:
        if name in _INSTEAD:
            raise DtrainError(
                f"Keras's callback {name} is not used here; instead: {_INSTEAD[name]}",
                code="keras.callback-unsupported",
            )
    if getattr(each, "restore_best_weights", False):
        raise DtrainError(
            "EarlyStopping(restore_best_weights=True) would change the weights after the last "
            "checkpoint; use checkpoint.best of the job, which keeps the best as a checkpoint",
            code="keras.callback-unsupported",
        )
    base = keras.callbacks.Callback
    own = [
        method
        for method in _NEVER_CALLED
        if getattr(getattr(each, method), "__func__", None) is not getattr(base, method)
    ]
    if own:
        raise DtrainError(
            f"callback {type(each).__name__} has {own[0]}(), which is never called here: dtrain "
            "evaluates; use on_epoch_end, or on_eval of a dtrain.Callback",
            code="keras.callback-unsupported",
        )


def _writes(each: Any) -> str | None:
    """The attribute with the name of the file that a callback writes; None if it writes none."""
    kinds = [kind.__name__ for kind in type(each).__mro__]
    return next((_FILES[kind] for kind in kinds if kind in _FILES), None)


def _place_file(each: Any, session: Session) -> None:
    """Files go to the run's folder, and those that grow go on after a resume."""
    attribute = _writes(each)
    if attribute is not None:
        setattr(each, attribute, os.path.join(session.run_dir, getattr(each, attribute)))
    if isinstance(each, keras.callbacks.CSVLogger) and session.step > 0:
        each.append = True


def _check_monitors(callbacks: list[Any], logs: Mapping[str, float], epoch: int) -> None:
    known = {*logs, "learning_rate"}
    for each in callbacks:
        monitor = getattr(each, "monitor", None)
        if not isinstance(monitor, str) or getattr(each, "save_best_only", True) is False:
            continue
        if monitor not in known:
            raise DtrainError(
                f"{type(each).__name__} watches {monitor!r}, and after epoch {epoch + 1} there "
                f"is: {', '.join(sorted(logs))}. Values that begin with val_ need data for "
                "evaluation, and eval.every_epochs: 1 in the job. Of the training data only the "
                "loss is computed, no other metric",
                code="keras.no-such-monitor",
            )


def _plain(each: Any) -> dict[str, Any]:
    """The numbers and texts that a callback has."""
    found = {}
    for name, value in vars(each).items():
        value = value.item() if isinstance(value, np.generic) else value
        if name not in _DERIVED and isinstance(value, bool | int | float | str | type(None)):
            found[name] = value
    return found


def _changed(each: Any, initial: dict[str, Any]) -> dict[str, Any]:
    missing = object()
    now = _plain(each)
    return {name: value for name, value in now.items() if initial.get(name, missing) != value}
