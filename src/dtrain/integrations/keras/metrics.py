"""The states of Keras's metrics: added up over batches and processes.

A metric of Keras is a few variables and a result that is computed of them. Here its variables are
zero before every batch, and what they hold after it is added up. The result is then that of one
process that has seen all batches, for every metric whose variables can be added up.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dtrain.errors import DtrainError
from dtrain.train import collectives
from dtrain.train.loop.evaluation import MetricState
from dtrain.train.sums import Sums


class MetricStates:
    """The variables of all metrics of a model, batch by batch.

    A variable is added up in one of two ways. Most are sums over the samples of a batch. Others
    are means over a batch, for example of a metric that got the mean loss of each batch: they are
    weighted with the number of samples. `update_state` is called on two parts of a batch to find
    out which, until that is known.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._is_mean: dict[int, bool] = {}
        """For each variable (by identity) whether it is a mean over a batch."""
        self._known: set[int] = set()
        """The variables for which that is certain."""
        self._num_samples = threading.local()

    def begin(self, num_samples: int) -> None:
        """Set all states to zero, for a batch of that many samples."""
        self._num_samples.value = num_samples
        self._reset()
        self._watch()
        compiled = self._model._compile_metrics
        if compiled is not None and not compiled.built:
            vars(compiled)["build"] = functools.partial(self._build, compiled)

    def take(self, names: set[str] | None) -> MetricState:
        """Return the states after the batch, and set them to zero.

        Means are multiplied by the number of samples.

        Args:
            names: the names of the values that a step of the user's own returned; None means all
                metrics.
        """
        variables, weight = self._variables(), self._num_samples.value
        parts = [
            variable.value.detach().reshape(-1).double() * (weight if self._mean(variable) else 1)
            for variable in variables.values()
        ]
        sums = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        sizes = {name: part.numel() for name, part in zip(variables, parts, strict=True)}
        self._reset()
        return MetricState(sizes, sums, functools.partial(self.results, names=names))

    def means(self) -> set[str]:
        """Return the names of the variables that are means over a batch."""
        return {name for name, each in self._variables().items() if self._mean(each)}

    def results(
        self, totals: Mapping[str, torch.Tensor], names: set[str] | None = None
    ) -> dict[str, float]:
        """Return the results of all metrics by the names that `fit` logs.

        Args:
            totals: the name of each variable and its value, as a vector.
            names: as for `take`.

        Raises:
            DtrainError: a step of the user's own returned a value that is not in `metrics`.
        """
        for name, variable in self._variables().items():
            if name in totals:
                total = totals[name].reshape(tuple(variable.shape))
                dtype = variable.value.dtype
                variable.assign((total if dtype.is_floating_point else total.round()).to(dtype))
        try:
            with torch.no_grad():
                found = self._model.get_metrics_result()
        finally:
            self._reset()
        if names is not None:
            self._refuse_values(names - found.keys() - {"loss"})
            found = {name: value for name, value in found.items() if name in names}
        return _numbers(found)

    @property
    def tracks_loss(self) -> bool:
        """Whether the metric `loss` is Keras's own."""
        return any(each is self._model._loss_tracker for each in self._model.metrics)

    def _each(self) -> list[Any]:
        return [m for metric in self._model.metrics for m in getattr(metric, "metrics", [metric])]

    def _variables(self) -> dict[str, Any]:
        """Return all variables by a name: number and name of the metric, number of the variable."""
        found: dict[int, tuple[str, Any]] = {}
        for number, metric in enumerate(self._each()):
            for index, variable in enumerate(metric.variables):
                found.setdefault(id(variable), (f"{number} {metric.name} {index}", variable))
        return dict(found.values())

    def _reset(self) -> None:
        for metric in self._each():
            metric.reset_state()

    def _mean(self, variable: Any) -> bool:
        return self._is_mean.get(id(variable), False)

    # -- how a variable is added up ----------------------------------------------------------

    def _watch(self) -> None:
        for metric in self._each():
            if not self._decided(metric):
                vars(metric)["update_state"] = functools.partial(self._update, metric)

    def _build(self, compiled: Any, *args: Any) -> None:
        """Make the compiled metrics, which a `train_step` does with its first batch."""
        vars(compiled).pop("build", None)
        compiled.build(*args)
        self._watch()

    def _decided(self, metric: Any) -> bool:
        variables = metric.variables
        return bool(variables) and all(id(each) in self._known for each in variables)

    def _update(self, metric: Any, *args: Any, **kwargs: Any) -> None:
        """Call the metric's `update_state`, and find out how its variables are added up."""
        type(metric).update_state(metric, *args, **kwargs)
        if not self._decided(metric):
            with torch.no_grad():
                self._decide(metric, args, kwargs)
        if self._decided(metric):
            vars(metric).pop("update_state", None)

    def _decide(self, metric: Any, args: Any, kwargs: Any) -> None:
        import keras

        samples = self._num_samples.value
        rows = _rows(keras.tree.flatten((args, kwargs)), samples)
        own = type(metric).update_state
        if rows is None:
            if own not in (keras.metrics.Mean.update_state, keras.metrics.Sum.update_state):
                raise _not_additive(metric, "update_state() gets no array with a row per sample")
            weights = [*args[1:], kwargs.get("sample_weight")]
            is_mean = all(each is None for each in weights)
            self._note(metric, {each: is_mean for each in range(len(metric.variables))}, sure=True)
            return
        if own.__module__.startswith("keras.") and not isinstance(metric, keras.metrics.Mean):
            # Keras's other classes count or add up samples
            self._note(metric, {each: False for each in range(len(metric.variables))}, sure=True)
            return
        kinds = _kinds(metric, args, kwargs, samples)
        self._note(metric, kinds, sure=samples > 1)

    def _note(self, metric: Any, found: Mapping[int, bool], *, sure: bool) -> None:
        for index, is_mean in found.items():
            key = id(metric.variables[index])
            self._is_mean[key] = is_mean
            if sure:
                self._known.add(key)

    def _refuse_values(self, unknown: set[str]) -> None:
        if unknown:
            name = min(unknown)
            raise DtrainError(
                f"a step of {type(self._model).__name__} returned {name!r}, which is not in its "
                "`metrics`, so it cannot be combined from several processes. Keep it in a "
                f"keras.metrics.Mean(name={name!r}) that is an attribute of the model",
                code="keras.value-not-a-metric",
            )


class EpochMetrics:
    """The metrics of the training over the epoch so far, over all processes."""

    def __init__(self, states: MetricStates) -> None:
        self._states = states
        self._lock = threading.Lock()  # replicas on several GPUs run in threads
        self._is_over = False
        """Whether the epoch is complete, so that the next step begins another."""
        self._clear()

    def _clear(self) -> None:
        self._step, self._epoch = Sums(), Sums()
        self._results: dict[str, float] | None = None
        self._of: Callable[[Mapping[str, torch.Tensor]], dict[str, float]] = self._states.results
        """Returns the results of the metrics that the steps have updated."""
        self._is_over = False

    def add(self, state: MetricState) -> None:
        """Add the state after one micro-batch of this process."""
        with self._lock:
            if self._is_over:
                self._clear()
            self._step.add(state.sizes, state.sums)
            self._of = state.results

    def step_done(self, num_samples: int) -> None:
        """Note the end of a step of that many samples over all processes. All ranks call it."""
        if self._is_over:
            self._clear()
        self._results = None
        if not self._step:
            return
        means = self._states.means()
        totals = {
            name: total / num_samples if name in means else total
            for name, total in self._step.totals().items()
        }
        sizes = {name: total.numel() for name, total in totals.items()}
        self._epoch.add(sizes, torch.cat(list(totals.values())))
        self._step = Sums()

    def epoch_done(self) -> None:
        self._is_over = True

    def results(self) -> dict[str, float]:
        """Return the metrics by name; empty before the first step. All ranks call it."""
        if self._results is None:
            totals = self._gathered()
            mine = self._of(totals.totals()) if self._epoch else None
            if collectives.in_group():  # a rank without samples may not have the metrics yet
                everyone = collectives.gather_to_all(mine)
                mine = next((each for each in everyone if each is not None), None)
            self._results = mine or {}
        found = dict(self._results)
        if self._states.tracks_loss:
            found.pop("loss", None)  # it is dtrain's
        return found

    def _gathered(self) -> Sums:
        total = Sums()
        for parts in collectives.gather_to_all(self._epoch.parts()):
            total.merge(parts)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over all processes. All ranks call it."""
        return {"over": self._is_over, "sums": self._gathered().parts()}

    def load_state_dict(self, state: Mapping[str, Any], *, first: bool) -> None:
        """Continue from saved sums on the first rank only, because the ranks' sums are added."""
        self._clear()
        self._is_over = state["over"]
        if first:
            self._epoch.merge(state["sums"])


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return results as numbers; a result with several gets a number at the end of its name."""
    found: dict[str, float] = {}
    for name, value in results.items():
        flat = torch.as_tensor(value).detach().reshape(-1).tolist()
        if len(flat) == 1:
            found[name] = float(flat[0])
        else:
            found.update({f"{name}_{index}": float(each) for index, each in enumerate(flat)})
    return found


def _rows(leaves: list[Any], samples: int) -> int | None:
    """Return the number of rows of the first array, if that is a multiple of the samples."""
    shapes = [tuple(each.shape) for each in leaves if hasattr(each, "shape")]
    if not shapes or not shapes[0] or shapes[0][0] % samples:
        return None
    return int(shapes[0][0])


def _kinds(metric: Any, args: Any, kwargs: Any, samples: int) -> dict[int, bool]:
    """Return by index which variables are means over a batch, and not sums.

    Variables that are zero are left out, because zero is added up in either way.

    Raises:
        DtrainError: a variable is neither.
    """
    half = samples // 2
    if samples > 1:
        first, second = (
            _mapped(args, kwargs, samples, lambda leaf, each: leaf[: half * each]),
            _mapped(args, kwargs, samples, lambda leaf, each: leaf[half * each :]),
        )
        cases, share = ((args, kwargs), first, second), half / samples
    else:  # twice the same sample tells sums from means, but not a mean from a maximum
        twice = _mapped(args, kwargs, 1, lambda leaf, each: torch.cat((leaf, leaf)))
        cases, share = (twice, (args, kwargs), (args, kwargs)), 0.5
    found: dict[int, bool] = {}
    states = [_state(metric, *each) for each in cases]
    for index, (whole, left, right) in enumerate(zip(*states, strict=True)):
        if not bool(whole.isfinite().all()) or not bool((whole.abs() + left.abs()).any()):
            continue
        if _close(whole, left + right):
            found[index] = False
        elif _close(whole, left * share + right * (1 - share)):
            found[index] = True
        else:
            name = metric.variables[index].name
            raise _not_additive(
                metric,
                f"its variable {name!r} after a batch is neither the sum nor the mean of its "
                "values after the two halves of the batch",
            )
    return found


def _mapped(
    args: Any, kwargs: Any, samples: int, change: Callable[[torch.Tensor, int], torch.Tensor]
) -> tuple[Any, Any]:
    """Return the arguments of `update_state` with other rows: `change` gets those per sample."""
    import keras
    from keras.src.backend import get_keras_mask, set_keras_mask

    rows = _rows(keras.tree.flatten((args, kwargs)), samples)

    def changed(leaf: Any) -> Any:
        if leaf is None or tuple(getattr(leaf, "shape", ()))[:1] != (rows,):
            return leaf
        tensor, mask = keras.ops.convert_to_tensor(leaf), get_keras_mask(leaf)
        new = change(tensor, tensor.shape[0] // samples)
        if mask is not None:
            set_keras_mask(new, change(mask, mask.shape[0] // samples))
        return new

    mapped: tuple[Any, Any] = keras.tree.map_structure(changed, (args, kwargs))
    return mapped


def _state(metric: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the metric's variables after one update from zero, which does not change them."""
    import keras

    variables = metric.variables
    zeros = [(each, torch.zeros_like(each.value)) for each in variables]
    with keras.StatelessScope(state_mapping=zeros) as scope:
        type(metric).update_state(metric, *args, **kwargs)
    return [scope.get_current_value(each).detach().double() for each in variables]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two states are equal up to the rounding of fp32."""
    return bool(((one - other).abs() <= 1e-4 * one.abs() + 1e-5 * one.abs().max()).all())


def _not_additive(metric: Any, why: str) -> DtrainError:
    return DtrainError(
        f"metric {metric.name!r} ({type(metric).__name__}): {why}, so it cannot be combined from "
        "the parts of several processes. Keep sums over samples in its variables, and divide in "
        "result(); a function must return one value per sample. Or write predict(), and compute "
        "it from predictions.npz",
        code="keras.metric-not-additive",
    )
