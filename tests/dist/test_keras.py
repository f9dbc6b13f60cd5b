"""A compiled Keras model is trained as `model.fit` would have, on any number of ranks."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import dtrain
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dtrain import catalog
from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.keras import KerasTask
from dtrain.ranks import RankInfo
from dtrain.rundir import RunDir
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.load import load_task
from dtrain.train.loss import LossModule
from dtrain.train.seeding import derive_seed, seed_everything

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "keras"
STEPS = 30  # one epoch of 23 steps, whose last has 29 samples, and 7 more

pytestmark = [
    pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Keras's own
]


def use_torch() -> None:
    """As a worker does, before anything imports Keras."""
    os.environ["KERAS_BACKEND"] = "torch"


def fitted() -> tuple[list[Any], dict[str, float]]:
    """Weights and metrics after `model.fit`, which is not told that there are ranks."""
    use_torch()
    task = load_task("task.py:Digits", {}, EXAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        patch.setattr(dist, "is_available", lambda: False)
        seed_everything(derive_seed("model", 0))
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
            "task": "task.py:Digits",
            "trainer": trainer,
            "train": {"steps": steps, "global_batch_size": 64, "micro_batch_size": 20},
            "data": {"shuffle": False},
            "checks": {"every": 10},
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
    assert [type(each) for each in wrapped] == [LossModule] * 4


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
    done = dtrain("export", "last", "--to", "keras", "-o", tmp_path / "m.keras", cwd=tmp_path)
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


def small(*layers: Any, loss: Any = "mse", metrics: Any = ()) -> Any:
    import keras

    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile("sgd", loss, metrics=list(metrics))
    return model


@pytest.mark.ranks(2, timeout=240)
def test_what_cannot_be_trained_is_told() -> None:
    use_torch()
    import keras

    def not_compiled() -> Any:
        return keras.Sequential([keras.layers.Dense(1)])

    with pytest.raises(DtrainError, match=r"it must return a keras.Model after model.compile"):
        Odd(not_compiled).model()
    with pytest.raises(DtrainError, match="reduction='sum', whose size depends on how"):
        Odd(lambda: small(loss=keras.losses.MeanSquaredError(reduction="sum"))).model()
    task = Odd(lambda: small(metrics=[keras.metrics.AUC()]))
    model = task.model()
    with pytest.raises(DtrainError, match=r"metric 'auc' \(AUC\) is not a mean over samples"):
        task.evaluate(model, [torch.ones(8, 3), torch.ones(8, 1)])


@pytest.mark.ranks(2, timeout=240)
def test_fsdp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=r"strategy 'fsdp' cannot cut .*; use 'ddp'"):
        train(tmp_path, steps=1, strategy="fsdp")


@pytest.mark.ranks(1, timeout=240)
def test_another_backend_is_refused() -> None:
    """Keras can say so only where the other framework is installed, so it is made to say so."""
    use_torch()
    import keras

    keras.config.backend = lambda: "jax"
    with pytest.raises(
        DtrainError, match=r"Keras runs on backend 'jax'.*--env KERAS_BACKEND=torch"
    ):
        Odd(small).model()
