"""What `fit` computes of a model, a Keras job computes on two processes: with the same numbers.

One training for each way to write a model: with several outputs, with `compute_loss`, and with
`train_step`. Each has many of the options of `compile` and `fit`.
"""

from __future__ import annotations

import csv
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dtrain.export.run import _final, _newest
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.run.files import read_lines
from dtrain.run.rundir import RunDir
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.load import load_task
from dtrain.train.loop.native import NativeTrainer
from support.errors import raises
from support.keras_backend import use_torch

EPOCHS = 4
STEPS_PER_EPOCH = 3  # of 64, 64 and 52 samples

pytestmark = [
    pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Keras's own
]

MODELS = '''
import keras
import numpy as np
import torch
from keras import layers, losses, metrics, ops

draw = np.random.default_rng(0)
X = draw.normal(size=(240, 8)).astype("float32")
SUM = X.sum(axis=1) + draw.normal(size=240)
Y = (SUM > 0).astype("int64")
Z = np.stack([SUM, X[:, 0] ** 2], axis=1)
W = draw.uniform(0.5, 2.0, size=180)
TRAIN, TEST = slice(0, 180), slice(180, 240)


def outputs():
    """Two outputs, weights, metrics of many kinds, and averages of the weights."""
    x = layers.Input((8,))
    hidden = layers.Dense(16, "relu", kernel_regularizer="l2")(x)
    a, b = layers.Dense(1, "sigmoid", name="a")(hidden), layers.Dense(2, name="b")(hidden)
    model = keras.Model(x, {"a": a, "b": b})
    model.compile(
        keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5),
        loss={"a": "binary_crossentropy", "b": "mse"},
        loss_weights={"a": 1.0, "b": 0.1},
        metrics={"a": ["accuracy", metrics.AUC(name="auc"), metrics.Precision(name="hits")],
                 "b": [metrics.R2Score(name="r2"), metrics.RootMeanSquaredError(name="rmse")]},
        weighted_metrics={"a": ["accuracy", metrics.Recall(name="seen")]},
    )
    logged = keras.callbacks.CSVLogger("epochs.csv")
    return model, {
        "x": X[TRAIN], "y": {"a": Y[TRAIN], "b": Z[TRAIN]}, "sample_weight": W,
        "validation_data": (X[TEST], {"a": Y[TEST], "b": Z[TEST]}), "callbacks": [logged],
    }


class Noted(keras.callbacks.Callback):
    """The logs of every step, as text that checkpoints keep."""

    def __init__(self):
        super().__init__()
        self.text = ""

    def on_train_batch_end(self, batch, logs=None):
        self.text += f"{batch} " + " ".join(f"{k}={v:.4f}" for k, v in sorted(logs.items())) + "\\n"


class Own(keras.Model):
    """A sub-classed model with its own loss, and a metric that gets the mean of each batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = layers.Dense(16, "relu"), layers.Dense(2)
        self.gap = metrics.Mean(name="gap")

    def call(self, x):
        return self.last(self.first(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        gap = ops.mean(ops.square(y_pred[:, 0] - y_pred[:, 1]))
        self.gap.update_state(gap)
        return loss + 0.01 * gap


def own_loss():
    model = Own()
    model.compile(
        "adam", losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", metrics.MeanIoU(2, sparse_y_pred=False, name="iou")],
        weighted_metrics=[metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce")],
    )
    stop = keras.callbacks.EarlyStopping(
        "gap", patience=1, min_delta=0.0, mode="max", baseline=9.0, restore_best_weights=True
    )
    return model, {
        "x": X[TRAIN], "y": Y[TRAIN], "class_weight": {0: 0.5, 1: 2.0},
        "validation_data": (X[TEST], Y[TEST]),
        "callbacks": [stop, Noted(), keras.callbacks.CSVLogger("epochs.csv")],
    }


class Encoder(keras.Model):
    """A model with its own steps."""

    def __init__(self):
        super().__init__()
        self.into = keras.Sequential([layers.Input((8,)), layers.Dense(4, "tanh")])
        self.back = keras.Sequential([layers.Input((4,)), layers.Dense(8)])
        self.total, self.size = metrics.Mean(name="loss"), metrics.Mean(name="size")
        self.per = metrics.Mean(name="per")

    @property
    def metrics(self):
        return [self.total, self.size, self.per]

    def call(self, x):
        return self.back(self.into(x))

    def of(self, x):
        inner = self.into(x)
        each = ops.mean(ops.square(self.back(inner) - x), axis=1)
        size = ops.mean(ops.square(inner))
        loss = ops.mean(each) + 0.1 * size
        self.total.update_state(loss)
        self.size.update_state(size)
        self.per.update_state(each)
        return loss

    def train_step(self, x):
        self.zero_grad()
        loss = self.of(x)
        loss.backward()
        weights = [each for each in self.trainable_weights]
        gradients = [each.value.grad for each in weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, weights)
        return {each.name: each.result() for each in self.metrics}

    def test_step(self, x):
        self.of(x)
        return {"loss": self.total.result(), "per": self.per.result()}


def own_step():
    model = Encoder()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9))
    return model, {
        "x": X[TRAIN], "validation_data": X[TEST],
        "callbacks": [keras.callbacks.CSVLogger("epochs.csv")],
    }


def masked():
    """A mean over the tokens that are not masked: some samples have many, others few."""
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 9, size=(180, 1))
    tokens = np.where(np.arange(8) < lengths, draw.integers(1, 5, size=(180, 8)), 0)
    model = keras.Sequential([
        layers.Input((8,)), layers.Embedding(5, 4, mask_zero=True), layers.Dense(5, "softmax")
    ])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    logged = keras.callbacks.CSVLogger("epochs.csv")
    return model, {"x": tokens, "y": (tokens + 1) % 5, "callbacks": [logged]}


class Adversary(Encoder):
    """Steps that dtrain cannot do: `way` says which."""

    def __init__(self, way):
        super().__init__()
        self.way, self.noise = way, layers.Dropout(0.5)

    def train_step(self, x):
        self.zero_grad()
        loss = self.of(self.noise(x, training=True))
        loss.backward()
        weights = self.trainable_weights[:]
        gradients = [each.value.grad for each in weights]
        if self.way == "clips":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        if self.way == "its own":
            gradients = [torch.zeros_like(each.value) for each in weights]
        if self.way == "some":
            gradients, weights = gradients[:2], weights[:2]
        if self.way == "changes":
            weights[0].assign(weights[0] * 2)
        with torch.no_grad():
            self.optimizer.apply(gradients, weights)
        if self.way == "twice":
            self.of(x).backward()
        return {"loss": 0.0, **({"norm": 1.0} if self.way == "value" else {})}


def adversary(way, rest=None):
    model = Adversary(way)
    if way == "optimizers":
        model.other = keras.optimizers.Adam()
    model.compile("sgd", metrics=rest)
    return model, {"x": X[TRAIN]}


class Largest(metrics.Metric):
    def __init__(self):
        super().__init__(name="largest")
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.maximum(self.value, ops.max(y_pred)))

    def result(self):
        return self.value


def spread(y_true, y_pred):
    return ops.std(y_pred)


def measured(metric):
    model = keras.Sequential([layers.Input((8,)), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=[Largest() if metric == "largest" else spread])
    return model, {"x": X[TRAIN], "y": Y[TRAIN]}
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the models in `fits.py`, written before there are ranks: they import it at once."""
    (tmp_path / "fits.py").write_text(MODELS)
    return tmp_path


def fitted(folder: Path, name: str) -> tuple[list[Any], dict[str, list[float]], str]:
    """Weights, history and noted logs of `model.fit`, which is not told that there are ranks."""
    task = load_task(f"fits.py:{name}", {}, folder)
    model, fit = task.compiled(), dict(task._fit)
    fit["callbacks"] = [e for e in fit["callbacks"] if type(e).__name__ != "CSVLogger"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(dist, "is_available", lambda: False)
        history = model.fit(**fit, batch_size=64, epochs=EPOCHS, shuffle=False, verbose=0)
    noted = "".join(getattr(each, "text", "") for each in fit["callbacks"])
    return model.get_weights(), history.history, noted


def train(
    folder: Path,
    run: Path,
    name: str,
    steps: int,
    args: dict[str, Any] | None = None,
    replicas: int = 1,
    **sections: Any,
) -> tuple[TrainResult, Any, str]:
    """The result, the model at its end, and the text of the callbacks."""
    torch.set_num_threads(1)
    spec = JobSpec.model_validate(
        {
            "name": "k",
            "task": f"fits.py:{name}",
            "train": {"steps": steps, "global_batch_size": 64, "micro_batch_size": 20},
            "data": {"shuffle": False},
            "eval": {"every_epochs": 1},
            "checks": {"every_steps": 2},
            "log": {"every_steps": 4},
            **sections,
        }
    )
    task = load_task(spec.task, args or {}, folder)
    made = RunDir(run)
    made.create()
    kept: list[Any] = []
    build = task.model
    task.model = lambda: kept.append(build()) or kept[-1]
    context = TrainContext(spec, made, RankInfo.from_env(), 0, task, torch.device("cpu"), replicas)
    result = NativeTrainer(context).run()
    noted = "".join(getattr(each, "text", "") for each in task._fit.get("callbacks", []))
    return result, kept[-1], noted


def gap(one: list[Any], other: list[Any]) -> float:
    """The largest difference between two models' weights."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def epochs_of(run: Path) -> dict[str, list[float]]:
    dist.barrier()
    with (run / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name, value in rows[0].items() if name != "epoch" and value != "NA"]
    return {name: [float(row[name]) for row in rows] for name in names}


def compare(folder: Path, name: str, run: Path, model: Any, noted: str) -> None:
    """Compare a training with that of fit."""
    weights, history, expected = fitted(folder, name)
    assert gap(model.get_weights(), weights) < 2e-6
    assert noted == expected
    logs = epochs_of(run)
    assert logs.keys() == history.keys()
    for key, values in history.items():
        assert logs[key] == pytest.approx(values, rel=1e-5, abs=2e-6), key


@pytest.mark.ranks(2, timeout=240)
def test_weights_and_logs_are_those_of_fit(folder: Path) -> None:
    """Resumed in the middle of an epoch, with micro-batches and a short last batch.

    The checkpoint of each last step has other weights than those at the end, which are exported.
    """
    use_torch()
    for name in ("outputs", "own_loss", "own_step", "masked"):
        run = folder / name
        train(folder, run, name, 4)
        _, model, noted = train(folder, run, name, EPOCHS * STEPS_PER_EPOCH)
        compare(folder, name, run, model, noted)
        dist.barrier()
        tensors = _newest(RunDir(run), None)[1]
        state = {k: v.detach() for k, v in model.state_dict().items() if v.is_floating_point()}
        same = [torch.equal(tensors["model"][name], each) for name, each in state.items()]
        assert all(same) == (name in ("own_step", "masked"))
        assert all(torch.equal(_final(tensors)[name], each) for name, each in state.items())


@pytest.mark.ranks(2, timeout=240)
def test_exact_has_the_same_metrics_on_one_process(folder: Path) -> None:
    """Also with a step of one sample, in which a rank has none, and a step of its own."""
    use_torch()
    sections = {"strategy": "exact", "train": {"global_batch_size": 179, "steps": 3}}
    lines: dict[str, Any] = {}
    for name in ("outputs", "own_step"):
        train(folder, folder / name, name, 3, **sections)
        dist.barrier()
        lines[name] = metrics_in(folder / name)
        assert [line["split"] for line in lines[name]].count("train") == 3
        assert lines[name][1].keys() >= ({"a_auc"} if name == "outputs" else {"per"})
    with pytest.MonkeyPatch.context() as patch:  # each rank by itself, as if there were no other
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(RankInfo, "from_env", staticmethod(RankInfo))
        for name in lines:
            run = folder / f"{name}-{os.environ['RANK']}"
            train(folder, run, name, 3, **sections)
            assert metrics_in(run) == lines[name]


def metrics_in(run: Path) -> list[dict[str, Any]]:
    lines = list(read_lines(RunDir(run).metrics, split=str))
    timed = ("time", "samples_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.ranks(1, timeout=240)
def test_replicas_and_what_is_refused(folder: Path) -> None:
    use_torch()
    steps = EPOCHS * STEPS_PER_EPOCH
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "barrier", lambda: None)
        run = folder / "dp"
        _, model, noted = train(folder, run, "outputs", steps, replicas=2, strategy="dp")
        compare(folder, "outputs", run, model, noted)

    def refused(code: str, *names: str, task: str = "adversary", **args: Any) -> None:
        with raises(code, *names):
            train(folder, folder / str(args), task, 1, args=args, strategy="single")

    train(folder, folder / "fine", "adversary", 1, args={"way": "fine"}, strategy="single")
    refused("keras.train-step", "Adversary", "'other'", way="optimizers")
    refused("keras.train-step", "clip_grad_norm", "clipnorm", way="clips")
    refused("keras.train-step", "other gradients", way="its own")
    refused("keras.train-step", "2 of 4 trainable", way="some")
    refused("keras.train-step", "changes weights", way="changes")
    refused("keras.train-step", "more than one backward()", way="twice")
    refused("keras.value-not-a-metric", "Adversary", "'norm'", "keras.metrics.Mean", way="value")
    refused("keras.metric-not-additive", "'largest' (Largest)", task="measured", metric="largest")
    refused("keras.metric-not-additive", "'spread'", task="measured", metric="spread")
    with raises("plan.unsupported-combination", "'dp'", "'ddp'"):
        train(folder, folder / "own-dp", "own_step", 1, replicas=2, strategy="dp")


@pytest.mark.ranks(1, timeout=240)
def test_class_weights_of_batches() -> None:
    use_torch()
    import keras

    from dtrain.integrations.keras.data import as_dataset, weighted

    x, y = np.arange(10.0).reshape(5, 2), np.array([0, 1, 2, 1, 0])

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            part = slice(3 * index, 3 * index + 3)
            return x[part], y[part]

    for data in ((x, y), Batches(), (x, np.eye(3)[y])):
        rows = as_dataset(weighted(data, {0: 2.0, 1: 0.5}))
        assert [float(rows[index][2]) for index in range(5)] == [2.0, 0.5, 1.0, 0.5, 2.0]
    with raises("keras.class-weight", "one output"):
        weighted((x, {"a": y, "b": y}), {0: 2.0})
    with raises("keras.class-weight", "PyDataset"):
        weighted(torch.utils.data.TensorDataset(torch.ones(3)), {0: 2.0})
