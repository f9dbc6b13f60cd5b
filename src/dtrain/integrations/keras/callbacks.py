"""Keras's own callbacks, called at dtrain's steps, evaluations and epochs."""

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
    "ProgbarLogger": "nothing: the console shows the progress",
    "History": "metrics.jsonl in the run directory",
}
_FILES = {"CSVLogger": "filename", "ModelCheckpoint": "filepath"}
"""Callbacks that write a file, and the attribute with its name."""
_NEVER_CALLED = tuple(
    f"on_{what}_{rest}"
    for what in ("test", "predict")
    for rest in ("begin", "end", "batch_begin", "batch_end")
)
_DERIVED = {"min_delta"}
"""Attributes that a callback computes again itself: Keras changes the sign by the mode."""


class KerasCallbacks(Callback):
    """Calls Keras's callbacks in turn, in the way that `fit` calls them.

    Losses and metrics are those of all processes together, so the callbacks decide the same on
    all processes. Callbacks that write files are called on rank 0 alone. Checkpoints contain the
    attributes (numbers and strings) that a callback has changed.

    Args:
        given: callbacks of Keras.

    Raises:
        DtrainError: one of them cannot work here as in `fit`; the message names a replacement.
    """

    def __init__(self, given: list[Any]) -> None:
        for each in given:
            _refuse(each)
        self._all = given
        self._called = given
        self._epoch: int | None = None
        """The epoch whose begin was reported to the callbacks, but not its end."""
        self._evaluation_pending = False
        """True if an epoch is over and its evaluation has not come yet."""
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
            self._called = [each for each in self._all if _file_attribute(each) is None]
        self._initial = [_plain(each) for each in self._all]
        self._call(session, "on_train_begin")
        self._restore()
        if not session.over and self._epoch is None:
            self._begin_epoch(session)

    def on_step(self, session: Session, loss: float) -> None:
        self._sum += loss * session.batch_size
        self._weight += session.batch_size
        self._call(session, "on_train_batch_end", self._batch, self._mean())
        self._batch += 1
        if session.epoch == self._epoch and not session.over:
            self._call(session, "on_train_batch_begin", self._batch, {})

    def on_epoch(self, session: Session) -> None:
        self._evaluation_pending = session.evaluation_follows
        if not self._evaluation_pending:
            self._end_epoch(session, {})

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        if self._evaluation_pending:
            self._end_epoch(session, {f"val_{name}": value for name, value in metrics.items()})

    def on_end(self, session: Session) -> None:
        self._call(session, "on_train_end", self._mean())

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self._all, self._initial, strict=True)
        return {
            "begun": self._epoch,
            "waits": self._evaluation_pending,
            "batch": [self._batch, self._sum, self._weight],
            "kinds": [type(each).__name__ for each in self._all],
            "changed": [_changed(each, initial) for each, initial in pairs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def _restore(self) -> None:
        """Continue from a checkpoint; callbacks that are not in it start from their beginning."""
        state = self._loaded
        if not state:
            return
        self._epoch, self._evaluation_pending = state["begun"], state["waits"]
        self._batch, self._sum, self._weight = state["batch"]
        pairs = zip(self._all, state["kinds"], state["changed"], strict=False)
        for each, kind, changed in pairs:
            if type(each).__name__ == kind:
                vars(each).update(changed)

    def _begin_epoch(self, session: Session) -> None:
        self._epoch = session.epoch
        self._batch, self._sum, self._weight = 0, 0.0, 0
        self._call(session, "on_epoch_begin", session.epoch, {})
        self._call(session, "on_train_batch_begin", 0, {})

    def _end_epoch(self, session: Session, metrics: dict[str, float]) -> None:
        self._evaluation_pending = False
        logs = {**self._mean(), **metrics}
        epoch, self._epoch = session.epoch - 1, None
        _check_monitors(self._all, logs, epoch)
        self._call(session, "on_epoch_end", epoch, logs)
        if not session.over and not session.model.stop_training:
            self._begin_epoch(session)

    def _mean(self) -> dict[str, float]:
        """Return the mean loss over the samples of the epoch so far, in the form of Keras's logs.

        It is empty before the first sample.
        """
        return {"loss": self._sum / self._weight} if self._weight else {}

    def _call(self, session: Session, method: str, *args: Any) -> None:
        """Call a method of each callback; apply its learning rate and its request to stop."""
        random, model = RandomState.capture(), session.model
        for each in self._called:
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
    """Return a task's callbacks, with those of Keras combined into one dtrain callback."""
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


def _file_attribute(each: Any) -> str | None:
    """Return the attribute with the name of a callback's file; None if it writes no file."""
    kinds = [kind.__name__ for kind in type(each).__mro__]
    return next((_FILES[kind] for kind in kinds if kind in _FILES), None)


def _place_file(each: Any, session: Session) -> None:
    """Put a callback's file into the run directory; after a resume, append to a CSV file."""
    attribute = _file_attribute(each)
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
                f"{type(each).__name__} monitors {monitor!r}, but after epoch {epoch + 1} there "
                f"are only: {', '.join(sorted(logs))}. Values that begin with val_ need data for "
                "evaluation, and eval.every_epochs: 1 in the job. Of the training data only the "
                "loss is computed, no other metric",
                code="keras.no-such-monitor",
            )


def _plain(each: Any) -> dict[str, Any]:
    """Return a callback's attributes that are numbers or strings."""
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
