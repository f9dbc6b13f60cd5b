"""A compiled Keras model is trained as `model.fit` would have, on any number of ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import dtrain
from torch.utils.data import TensorDataset

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.keras import KerasTask
from dtrain.ranks import RankInfo
from dtrain.rundir import RunDir
from dtrain.train.context import TrainContext, TrainResult
from dtrain.train.load import load_task
from dtrain.train.trainers.native import NativeTrainer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "keras"
STEPS = 30  # one epoch of 23 steps, whose last has 29 samples, and 7 more

pytestmark = [
    pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Keras's own
]

FIT = """
import os, sys, numpy as np
os.environ["KERAS_BACKEND"] = "torch"
from dtrain.train.load import load_task
from dtrain.train.seeding import derive_seed, seed_everything
task = load_task("task.py:Digits", {}, sys.argv[1])
seed_everything(derive_seed("model", 0))
model, (x, y) = task.compiled(), task.train_data()
for part in (slice(None), slice(7 * 64)):
    model.fit(x[part], y[part], batch_size=64, epochs=1, shuffle=False, verbose=0)
loss, accuracy = model.evaluate(*task.eval_data(), verbose=0)
np.savez(sys.argv[2], *model.get_weights(), loss=loss, accuracy=accuracy)
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and metrics after `model.fit`, in a process that knows nothing of ranks."""
    path = tmp_path_factory.mktemp("fit") / "weights.npz"
    subprocess.run([sys.executable, "-c", FIT, str(EXAMPLE), str(path)], check=True, timeout=180)
    return path


def train(folder: Path, strategy: str, steps: int = STEPS) -> tuple[TrainResult, list[Any]]:
    """The example under a strategy, in the fit's order; its result and weights."""
    torch.set_num_threads(1)
    os.environ["KERAS_BACKEND"] = "torch"  # as a worker does
    spec = JobSpec.model_validate(
        {
            "name": "k",
            "task": "task.py:Digits",
            "strategy": strategy,
            "train": {"steps": steps, "global_batch_size": 64, "micro_batch_size": 20},
            "data": {"shuffle": False},
            "checks": {"every": 10},
        }
    )
    task = load_task(spec.task, {}, EXAMPLE)
    run = RunDir(folder)
    run.create()
    kept: list[Any] = []
    build = task.model
    task.model = lambda: kept.append(build()) or kept[-1]  # type: ignore[func-returns-value, method-assign]
    cpu = torch.device("cpu")
    result = NativeTrainer(TrainContext(spec, run, RankInfo.from_env(), 0, task, cpu, 2)).run()
    return result, kept[-1].get_weights()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("strategy", ["ddp", "exact"])
def test_it_is_what_fit_would_have_trained(strategy: str, fitted: Path, tmp_path: Path) -> None:
    """Through a resume after 12 steps, with micro-batches and a short last batch."""
    train(tmp_path, strategy, steps=12)
    result, weights = train(tmp_path, strategy)
    assert result.steps == STEPS
    with np.load(fitted) as reference:
        gaps = [np.abs(w - reference[f"arr_{i}"]).max() for i, w in enumerate(weights)]
        assert max(gaps) < 2e-6
        assert result.metrics["accuracy"] == pytest.approx(float(reference["accuracy"]), abs=1e-6)
        assert result.metrics["loss"] == pytest.approx(float(reference["loss"]), abs=2e-6)


def test_one_process_and_the_keras_file(fitted: Path, tmp_path: Path) -> None:
    """By the commands: the same as fit, and `dtrain export --to keras` of it."""
    sets = ["train.epochs=null", f"train.steps={STEPS}", "data.shuffle=false"]
    flags = [part for each in sets for part in ("--set", each)]
    job = EXAMPLE / "job.yaml"
    done = dtrain("launch", job, "--strategy", "single", "--procs", "1", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = dtrain("export", "last", "--to", "keras", "-o", tmp_path / "m.keras", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"outputs on 32 and 16 samples of eval_dataset\(\) differ by", done.stdout)
    code = (
        "import sys, keras, numpy as np; m = keras.saving.load_model(sys.argv[1]);"
        "r = np.load(sys.argv[2]);"
        "print(max(np.abs(w - r[f'arr_{i}']).max() for i, w in enumerate(m.get_weights())))"
    )
    read = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.keras"), str(fitted)],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert float(read.stdout) < 2e-6


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
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    def not_compiled() -> Any:
        return keras.Sequential([keras.layers.Dense(1)])

    with pytest.raises(DtrainError, match=r"it must return a keras.Model after model.compile"):
        Odd(not_compiled).model()
    with pytest.raises(DtrainError, match="reduction='sum', whose size depends on how"):
        Odd(lambda: small(loss=keras.losses.MeanSquaredError(reduction="sum"))).model()
    with pytest.raises(DtrainError, match="use GroupNormalization or LayerNormalization"):
        Odd(lambda: small(keras.layers.BatchNormalization())).model()
    task = Odd(lambda: small(metrics=[keras.metrics.AUC()]))
    model = task.model()
    with pytest.raises(DtrainError, match=r"metric 'auc' \(AUC\) is not a mean over samples"):
        task.evaluate(model, [torch.ones(8, 3), torch.ones(8, 1)])


@pytest.mark.ranks(1, timeout=240)
def test_dp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=r"strategy 'dp' copies the model .*; use 'ddp'"):
        train(tmp_path, "dp", steps=1)


@pytest.mark.ranks(2, timeout=240)
def test_fsdp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=r"strategy 'fsdp' cannot cut .*; use 'ddp'"):
        train(tmp_path, "fsdp", steps=1)


@pytest.mark.ranks(1, timeout=240)
def test_another_backend_is_refused() -> None:
    """Keras can say so only where the other framework is installed, so it is made to say so."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.config.backend = lambda: "jax"
    with pytest.raises(
        DtrainError, match=r"Keras runs on backend 'jax'.*--env KERAS_BACKEND=torch"
    ):
        Odd(small).model()
