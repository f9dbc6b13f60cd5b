"""Keras's own callbacks, called at dtrain's steps, evaluations and epochs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import torch

from dtrain.callback import Callback, Session
from dtrain.errors import DtrainError
from dtrain.integrations.keras.metrics import EpochMetrics
from dtrain.train.loop.task_state import FinalWeights
from dtrain.train.seeding import RandomState

_INSTEAD = {
    "BackupAndRestore": "the job's checkpoint: section and dtrain resume",
    "OrbaxCheckpoint": "the job's checkpoint: section",
    "TensorBoard": "log.loggers: [tensorboard] of the job",
    "RemoteMonitor": "log.loggers of the job",
    "SwapEMAWeights": "nothing: as in fit without it, the weights that are trained are evaluated, "
    "and with use_ema the averages replace them at the end",
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


class KerasCallbacks(Callback, FinalWeights):
    """Does what `fit` does between steps: it counts metrics, and calls Keras's callbacks in turn.

    Losses and metrics are those of all processes together, so the callbacks decide the same on
    all processes. Callbacks that write files are called on rank 0 alone. Checkpoints contain the
    attributes (numbers and strings) that a callback has changed, and the best weights that
    `EarlyStopping` keeps.

    At the end, `fit` may change the weights: to the averages of `use_ema`, or to the best ones of
    `EarlyStopping`. The weights in a checkpoint are those that a resumed training needs. `kept`
    returns the weights that `fit` would leave if it ended now.

    Args:
        given: callbacks of Keras.
        metrics: the metrics of the training.

    Raises:
        DtrainError: one of them cannot work here as in `fit`; the message names a replacement.
    """

    def __init__(self, given: list[Any], metrics: EpochMetrics) -> None:
        for each in given:
            _refuse(each)
        self._all = given
        self._called = given
        self._metrics = metrics
        self._restoring = _restoring(given)
        self._takes_batches = any(_takes_batches(each) for each in given)
        self._session: Session | None = None
        self._best: dict[str, Any] = {}
        """The best weights by name that a checkpoint had, until training starts."""
        self._epoch: int | None = None
        """The epoch whose begin was reported to the callbacks, but not its end."""
        self._evaluation_pending = False
        """True if an epoch is over and its evaluation has not come yet."""
        self._batch, self._sum, self._weight = 0, 0.0, 0
        self._loaded: dict[str, Any] = {}
        self._initial: list[dict[str, Any]] = []

    def on_start(self, session: Session) -> None:
        self._session = session
        session.model.stop_training = False
        for each in self._all:
            each.set_params({"verbose": 0})
            each.set_model(session.model)
            _place_file(each, session)
        if session.rank != 0:
            self._called = [each for each in self._all if _file_attribute(each) is None]
        self._initial = [_plain(each) for each in self._all]
        self._call(session, "on_train_begin")
        self._restore(session)
        if not session.over and self._epoch is None:
            self._begin_epoch(session)

    def on_step(self, session: Session, loss: float) -> None:
        self._sum += loss * session.batch_size
        self._weight += session.batch_size
        self._metrics.step_done(session.batch_size)
        logs = self._logs() if self._takes_batches else self._mean()
        self._call(session, "on_train_batch_end", self._batch, logs)
        self._batch += 1
        if session.epoch == self._epoch and not session.over:
            self._call(session, "on_train_batch_begin", self._batch, {})

    def on_epoch(self, session: Session) -> None:
        self._metrics.epoch_done()
        self._evaluation_pending = session.evaluation_follows
        if not self._evaluation_pending:
            self._end_epoch(session, {})

    def on_eval(self, session: Session, metrics: Mapping[str, float]) -> None:
        if self._evaluation_pending:
            self._end_epoch(session, {f"val_{name}": value for name, value in metrics.items()})

    def on_end(self, session: Session) -> None:
        session.optimizer.finalize()
        self._call(session, "on_train_end", self._logs())

    def state_dict(self) -> dict[str, Any]:
        pairs = zip(self._all, self._initial, strict=True)
        return {
            "begun": self._epoch,
            "waits": self._evaluation_pending,
            "batch": [self._batch, self._sum, self._weight],
            "kinds": [type(each).__name__ for each in self._all],
            "changed": [_changed(each, initial) for each, initial in pairs],
            "metrics": self._metrics.state_dict(),
        }

    def kept(self) -> dict[str, Any]:
        """Return the weights that `fit` would leave if it ended now, where it changes them."""
        if self._session is None:
            return {"of": "best", "weights": self._best} if self._best else {}
        model, best = self._session.model, getattr(self._restoring, "best_weights", None)
        if best is not None:
            arrays = [torch.from_numpy(each) for each in best]
            return {"of": "best", "weights": _by_name(model, model.weights, arrays)}
        pairs = self._session.optimizer.averages()
        variables, averages = [each for each, _ in pairs], [each.value for _, each in pairs]
        return {"of": "averages", "weights": _by_name(model, variables, averages)} if pairs else {}

    def load_kept(self, state: Mapping[str, Any]) -> None:
        """Load what `kept` returned; the optimizer has the averages."""
        self._best = dict(state["weights"]) if state["of"] == "best" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state

    def _restore(self, session: Session) -> None:
        """Continue from a checkpoint; callbacks that are not in it start from their beginning."""
        state = self._loaded
        if not state:
            return
        self._metrics.load_state_dict(state["metrics"], first=session.rank == 0)
        if self._best and self._restoring is not None:
            names = _names(session.model)
            best = [self._best[names[id(v.value)][0]] for v in session.model.weights]
            self._restoring.best_weights = [each.numpy() for each in best]
        self._best = {}
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
        logs = {**self._logs(), **metrics}
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

    def _logs(self) -> dict[str, float]:
        """Return loss and metrics of the epoch so far. All ranks call it."""
        return {**self._mean(), **self._metrics.results()}

    def _call(self, session: Session, method: str, *args: Any) -> None:
        """Call a method of each callback; apply its learning rate and its request to stop."""
        if not self._called:
            return
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


def adapted(given: list[Any], metrics: EpochMetrics) -> list[Any]:
    """Return a task's callbacks, with those of Keras combined into one dtrain callback."""
    of_keras = [each for each in given if isinstance(each, keras.callbacks.Callback)]
    others = [each for each in given if not isinstance(each, keras.callbacks.Callback)]
    return [*others, KerasCallbacks(of_keras, metrics)]


def _refuse(each: Any) -> None:
    names = [kind.__name__ for kind in type(each).__mro__]
    for name in names:
        if name in _INSTEAD:
            raise DtrainError(
                f"Keras's callback {name} is not used here; instead: {_INSTEAD[name]}",
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


def _restoring(given: list[Any]) -> Any:
    """Return the callback that restores the best weights at the end; None without one."""
    found = [each for each in given if getattr(each, "restore_best_weights", False)]
    if len(found) > 1:
        raise DtrainError(
            f"{len(found)} callbacks have restore_best_weights=True, but only the last one would "
            "have an effect; leave it out of the others",
            code="keras.callback-unsupported",
        )
    return found[0] if found else None


def _takes_batches(each: Any) -> bool:
    """Return whether a callback may read metrics after a step, which all ranks must add up."""
    if isinstance(each, keras.callbacks.TerminateOnNaN):
        return False  # it reads the loss
    if isinstance(each, keras.callbacks.ModelCheckpoint) and each.save_freq == "epoch":
        return False
    base = keras.callbacks.Callback
    return any(
        getattr(getattr(each, method), "__func__", None) is not getattr(base, method)
        for method in ("on_train_batch_end", "on_batch_end")
    )


def _names(model: Any) -> dict[int, list[str]]:
    """Return the names in checkpoints of each tensor of a model, by identity."""
    names: dict[int, list[str]] = {}
    for name, each in model.state_dict(keep_vars=True).items():
        names.setdefault(id(each), []).append(name)
    return names


def _by_name(model: Any, variables: list[Any], values: list[torch.Tensor]) -> dict[str, Any]:
    """Return values for some variables of a model by the names of these in checkpoints."""
    names, pairs = _names(model), zip(variables, values, strict=True)
    return {name: each for variable, each in pairs for name in names[id(variable.value)]}


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
                "evaluation, and eval.every_epochs: 1 in the job",
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
