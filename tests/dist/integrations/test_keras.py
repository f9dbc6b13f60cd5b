"""A compiled Keras model is trained as `model.fit` would have, on any number of ranks."""

from __future__ import annotations

import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dtrain import catalog
from dtrain.errors import JobError
from dtrain.job.spec import JobSpec
from dtrain.keras import KerasTask
from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.load import load_task
from dtrain.train.loss import LossModule
from support import EXAMPLES
from support.errors import raises
from support.keras_backend import use_torch
from support.launch import dtrain

EXAMPLE = EXAMPLES / "keras"
STEPS = 30  # one epoch of 23 steps, whose last has 29 samples, and 7 more

pytestmark = [
    pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Keras's own
]


def fitted() -> tuple[list[Any], dict[str, float]]:
    """Weights and metrics after `model.fit`, which is not told that there are ranks."""
    use_torch()
    task = load_task("task.py:digits", {}, EXAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(dist, "is_available", lambda: False)
        model, (x, y) = task.compiled(), task.train_data()
        for part in (slice(None), slice(7 * 64)):
            model.fit(x[part], y[part], batch_size=64, epochs=1, shuffle=False, verbose=0)
        loss, accuracy = model.evaluate(*task.eval_data(), verbose=0)
    return model.get_weights(), {"loss": loss, "accuracy": accuracy}


def gap(one: list[Any], other: list[Any]) -> float:
    """The largest difference between two models' weights."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def train(
    folder: Path,
    task: Any = None,
    steps: int = STEPS,
    trainer: str = "native",
    replicas: int = 1,
    **sections: Any,
) -> tuple[TrainResult, Any]:
    """A task, else the example, in the order of fit; its result and model."""
    use_torch()
    torch.set_num_threads(1)
    spec = JobSpec.model_validate(
        {
            "name": "k",
            "task": "task.py:digits",
            "trainer": trainer,
            "train": {"steps": steps, "global_batch_size": 64, "micro_batch_size": 20},
            "data": {"shuffle": False},
            "checks": {"every_steps": 10},
            **sections,
        }
    )
    task = task or load_task(spec.task, {}, EXAMPLE)
    run = RunDir(folder)
    run.create()
    kept: list[Any] = []
    build = task.model
    task.model = lambda: kept.append(build()) or kept[-1]
    context = TrainContext(spec, run, RankInfo.from_env(), 0, task, torch.device("cpu"), replicas)
    result = catalog.load("trainer", trainer)(context).run()
    return result, kept[-1]


@pytest.mark.ranks(2, timeout=240)
def test_it_is_what_fit_would_have_trained(tmp_path: Path) -> None:
    """Through a resume after 12 steps, with micro-batches and a short last batch.

    What is wrapped is dtrain's loss, once a training, and never the model.
    """
    wrapped: list[Any] = []
    init = DistributedDataParallel.__init__

    def counting(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        wrapped.append(module)
        init(self, module, *args, **kwargs)

    DistributedDataParallel.__init__ = counting  # type: ignore[method-assign]
    weights, metrics = fitted()
    assert not wrapped
    for strategy, trainer in (("ddp", "native"), ("ddp", "lightning"), ("exact", "native")):
        folder = tmp_path / f"{strategy}-{trainer}"
        train(folder, steps=12, trainer=trainer, strategy=strategy)
        result, model = train(folder, trainer=trainer, strategy=strategy)
        assert result.steps == STEPS
        assert gap(model.get_weights(), weights) < 2e-6, folder
        assert result.metrics["accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-6)
        assert result.metrics["loss"] == pytest.approx(metrics["loss"], abs=2e-6)
    assert [type(each.loss) for each in wrapped] == [LossModule] * 4


@pytest.mark.ranks(1, timeout=240)
def test_dp_and_one_process_and_the_keras_file(tmp_path: Path) -> None:
    """By the commands in one process, with `dtrain export` of it; dp with two replicas."""
    weights, _ = fitted()
    _, model = train(tmp_path / "dp", strategy="dp", replicas=2)
    assert gap(model.get_weights(), weights) < 2e-6
    sets = ["train.epochs=null", f"train.steps={STEPS}", "data.shuffle=false"]
    flags = [part for each in sets for part in ("--set", each)]
    job = EXAMPLE / "job.yaml"
    done = dtrain("launch", job, "--strategy", "single", "--procs", "1", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = dtrain("export", "last", "--to", "keras", "--output", tmp_path / "m.keras", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"outputs on 32 and 16 samples of eval_dataset\(\) differ by", done.stdout)
    import keras

    assert gap(keras.saving.load_model(tmp_path / "m.keras").get_weights(), weights) < 2e-6


class Odd(KerasTask):
    """What `compiled` gives is the test's business."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def compiled(self) -> Any:
        return self.made()

    def train_data(self) -> Any:
        return TensorDataset(torch.ones(8, 3), torch.ones(8, 1))


def small(*layers: Any, optimizer: Any = "sgd", loss: Any = "mse", **how: Any) -> Any:
    import keras

    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(optimizer, loss, **how)
    return model


@pytest.mark.ranks(1, timeout=240)
def test_another_rate_of_a_resume_is_used(tmp_path: Path) -> None:
    use_torch()
    import keras

    def trained(steps: int, rate: float) -> float:
        made = functools.partial(small, keras.Input((3,)), optimizer=keras.optimizers.Adam(rate))
        model = train(tmp_path, Odd(made), steps, strategy="single", args={"rate": rate})[1]
        assert int(model.optimizer.iterations) == steps
        return float(model.optimizer.learning_rate)

    assert trained(2, 0.5) == 0.5
    assert trained(4, 0.25) == 0.25


@pytest.mark.ranks(2, timeout=240)
def test_what_cannot_be_trained_is_told(tmp_path: Path) -> None:
    """Other backends only Keras itself can name where they are installed, so it is made to."""
    use_torch()
    import keras

    with raises("plan.unsupported-combination", "'fsdp'", "'ddp'"):
        train(tmp_path, steps=1, strategy="fsdp")

    def not_compiled() -> Any:
        return keras.Sequential([keras.layers.Dense(1)])

    with raises("keras.not-compiled", "Sequential"):
        Odd(not_compiled).model()
    with raises("keras.loss-reduction", "reduction='sum',"):
        Odd(lambda: small(loss=keras.losses.MeanSquaredError(reduction="sum"))).model()
    adam = keras.optimizers.Adam
    for optimizer, said in (
        (adam(gradient_accumulation_steps=2), "train.micro_batch_size"),
        (adam(loss_scale_factor=2.0), "train.precision: fp16"),
        (keras.optimizers.LossScaleOptimizer(adam()), "train.precision: fp16"),
    ):
        with raises("keras.optimizer-option", said):
            Odd(lambda made=optimizer: small(optimizer=made)).model()
    with raises("keras.compile-argument", "compile(jit_compile=True)"):
        Odd(lambda: small(jit_compile=True)).model()
    keras.config.backend = lambda: "jax"
    with raises("keras.other-backend", "'jax'", "--env KERAS_BACKEND=torch"):
        Odd(small).model()


BUILD = """
import keras
import numpy as np

MASKS = []

class Seen(keras.layers.Dropout):
    def call(self, inputs, training=False):
        outputs = super().call(inputs, training=training)
        if training:
            MASKS.append((outputs == 0).detach().numpy())
        return outputs

def build(epochs_seen=None):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 8)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    layers = [keras.layers.Dense(16), Seen(0.5), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((8,)), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    told = [
        keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=1e9, factor=0.5, min_lr=1e-3),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * (0.9 if epoch else 1.0)),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.CSVLogger("epochs.csv"),
        keras.callbacks.ModelCheckpoint("best.keras", save_best_only=True),
    ]
    return model, {"x": x, "y": y, "validation_split": 0.1, "callbacks": told}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a task in `built.py`, written before there are ranks: they import it at once."""
    (tmp_path / "built.py").write_text(BUILD)
    return tmp_path


@pytest.mark.ranks(2, timeout=240)
def test_a_function_its_callbacks_and_its_dropout(folder: Path) -> None:
    """Whole, and resumed in the middle of an epoch: the same bits, learning rate and files."""
    use_torch()

    def trained(name: str, steps: int) -> tuple[TrainResult, Any]:
        task = load_task("built.py:build", {}, folder)
        sections = {"eval": {"every_epochs": 1}, "data": {"shuffle": True}}
        return train(folder / name, task, steps, **sections)

    result, whole = trained("whole", 9)  # three epochs of 180 samples
    import built  # type: ignore[import-not-found]

    shape = [mask.shape for mask in built.MASKS]
    masks: list[Any] = [None, None]
    dist.all_gather_object(masks, built.MASKS)
    assert [mask.shape for mask in masks[0]] == shape
    assert not any(np.array_equal(a, b) for a, b in zip(*masks, strict=True))
    rates = [0.01, 0.01 * 0.9 * 0.5, 0.01 * 0.9 * 0.5 * 0.9 * 0.5]  # as each epoch left it
    assert float(whole.optimizer.learning_rate) == pytest.approx(rates[2])

    trained("parts", 4)
    again, model = trained("parts", 9)
    assert again.parameters_sha256 == result.parameters_sha256
    assert gap(model.get_weights(), whole.get_weights()) == 0.0
    assert float(model.optimizer.learning_rate) == float(whole.optimizer.learning_rate)
    assert again.metrics == result.metrics
    dist.barrier()
    one, other = (folder / name / "epochs.csv" for name in ("whole", "parts"))
    assert one.read_text() == other.read_text()
    lines = one.read_text().splitlines()
    assert lines[0] == "epoch,learning_rate,loss,mae,val_loss,val_mae"
    assert len(lines) == 4
    assert [float(line.split(",")[1]) for line in lines[1:]] == pytest.approx(rates)
    assert (folder / "whole" / "best.keras").is_file()


@pytest.mark.ranks(2, timeout=240)
def test_exact_is_the_same_on_one_process(folder: Path) -> None:
    """With dropout and BatchNormalization: the parameters, and the statistics of the forward."""
    use_torch()

    def trained(run: Path) -> Any:
        task = load_task("built.py:build", {}, folder)
        return train(run, task, 5, strategy="exact", eval={"every_epochs": 1})[1]

    two = trained(folder / "two").get_weights()
    with pytest.MonkeyPatch.context() as patch:  # each rank by itself, as if there were no other
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(RankInfo, "from_env", staticmethod(RankInfo))
        one = trained(folder / f"one-{os.environ['RANK']}").get_weights()
    assert gap(one, two) == 0.0


@pytest.mark.ranks(1, timeout=240)
def test_what_fit_takes_as_data(tmp_path: Path) -> None:
    use_torch()
    import keras

    from dtrain.integrations.keras.data import as_dataset

    x, y = np.arange(20.0).reshape(10, 2), np.arange(10)

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            part = slice(4 * index, 4 * index + 4)
            return {"a": x[part]}, y[part]

    rows = as_dataset(Batches())
    assert len(rows) == 10
    assert [int(row[1]) for row in rows.__getitems__([9, 0, 5, 4])] == [9, 0, 5, 4]
    assert rows[7][0]["a"].tolist() == [14.0, 15.0]

    def batches() -> Any:
        while True:
            yield from ((x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8))

    stream = as_dataset(batches, steps_per_epoch=3)
    assert [[int(row[1]) for row in stream] for _ in range(2)] == [[*range(10)]] * 2
    with raises("keras.one-pass-data", "generator"):
        as_dataset(batches())
    nested = as_dataset(({"a": x, "b": y}, y))
    assert len(nested) == 10
    assert int(nested[3][0]["b"]) == 3
    with raises("keras.unequal-arrays", "[9, 10]"):
        as_dataset(({"a": x, "b": y[1:]}, y))
    loader = torch.utils.data.DataLoader(TensorDataset(torch.tensor(y)), shuffle=True)
    assert as_dataset(loader) is loader.dataset
    loader = torch.utils.data.DataLoader(loader.dataset, collate_fn=list)
    with raises("keras.own-loader"):
        as_dataset(loader)

    def trained(name: str, data: Any, steps_per_epoch: int | None = None) -> list[Any]:
        task = Odd(lambda: small(keras.Input((3,))))
        task.train_data, task.steps_per_epoch = lambda: data, steps_per_epoch  # type: ignore[method-assign]
        seen = {"train": {"epochs": 2, "global_batch_size": 4}, "strategy": "single"}
        weights: list[Any] = train(tmp_path / name, task, **seen)[1].get_weights()
        return weights

    inputs, targets = torch.arange(30.0).reshape(10, 3) / 30, torch.ones(10, 1)

    def pairs() -> Any:
        yield from zip(inputs.split(5), targets.split(5), strict=True)

    plain = trained("arrays", (inputs, targets))
    assert gap(trained("generator", pairs, 2), plain) == 0.0
    loader = torch.utils.data.DataLoader(TensorDataset(inputs, targets), batch_size=3)
    assert gap(trained("loader", loader), plain) == 0.0


@pytest.mark.ranks(1, timeout=240)
def test_what_a_function_or_a_callback_cannot_ask_for(tmp_path: Path) -> None:
    use_torch()
    (tmp_path / "made.py").write_text(
        "import keras\n"
        "def made(**fit):\n"
        "    model = keras.Sequential([keras.layers.Dense(1)])\n"
        "    model.compile('sgd', 'mse')\n"
        "    return (model, {'x': [1.0], **fit}) if fit.pop('data', True) else model\n"
    )
    for args, code, *names in (
        ({"data": False}, "keras.no-data", "return model, {'x': x"),
        ({"epochs": 3}, "keras.fit-argument", "made ", "'epochs'", "train.epochs"),
        ({"z": 3}, "keras.fit-argument", "made ", "'z'", "x, y, sample_weight"),
    ):
        with raises(code, *names, kind=JobError):
            load_task("made.py:made", args, tmp_path)
    import keras

    from dtrain.integrations.keras.callbacks import KerasCallbacks
    from dtrain.integrations.keras.metrics import EpochMetrics, MetricStates

    class Tests(keras.callbacks.Callback):  # type: ignore[misc]
        def on_test_end(self, logs: Any = None) -> None: ...

    calls = keras.callbacks
    for each, *names in (
        (calls.BackupAndRestore(tmp_path), "BackupAndRestore"),
        (Tests(), "Tests", "on_test_end()"),
    ):
        with raises("keras.callback-unsupported", *names):
            KerasCallbacks([each], EpochMetrics(MetricStates(small())))
    task = Odd(small)
    task.callbacks = lambda: [calls.EarlyStopping("accuracy")]  # type: ignore[method-assign]
    with raises("keras.no-such-monitor", "EarlyStopping", "'accuracy'", "epoch 1"):
        train(tmp_path / "a", task, steps=2, strategy="single")
    task = Odd(small)
    task.callbacks = lambda: [calls.EarlyStopping("loss", patience=1, min_delta=9.0)]  # type: ignore[method-assign]
    result, _ = train(tmp_path / "b", task, steps=9, strategy="single")
    assert result.steps == 2
    assert result.stopped_early
