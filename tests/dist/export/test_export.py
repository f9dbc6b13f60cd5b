"""A trained model for other programs, compared with the one that was trained."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from dtrain.errors import UsageError
from dtrain.export.formats import torch_export
from dtrain.export.model import Call, Trained, called
from dtrain.export.run import export
from dtrain.run.rundir import RunDir
from dtrain.task import Task
from dtrain.train.checkpoint.content import read_checkpoint
from support import EXAMPLES
from support.checkpoints import TENSORS
from support.errors import raises
from support.launch import dtrain

DIGITS = EXAMPLES / "digits" / "job.yaml"

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters' own deprecations


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of the digits example with checkpoints of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("export")
    sets = ["train.steps=20", "train.epochs=null", "checkpoint.every_epochs=null"]
    sets += ["checkpoint.every_steps=10", "eval.every_epochs=null"]
    flags = [part for each in sets for part in ("--set", each)]
    size = ["--strategy", "single", "--procs", "1", "--run-id", "digits-abc234"]
    done = dtrain("launch", DIGITS, *size, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return RunDir(folder / "runs" / "digits-abc234")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets these for good
    monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", "TRUE")
    monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")


def test_safetensors_holds_the_checkpoint_bit_for_bit(trained: RunDir) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    done = export(trained, "safetensors", step=10)
    assert done.path.name == "digits-abc234-10.safetensors"
    state = read_checkpoint(trained.checkpoint(10))[0]["model"]
    read = load_file(done.path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert done.proof == "all 6 tensors are bit for bit those of the checkpoint"


def test_torch_export_gives_the_same_outputs(trained: RunDir) -> None:
    done = export(trained, "torch-export")
    assert done.checkpoint == "step-00000020"
    assert re.fullmatch(
        r"outputs on 32 and 16 samples of eval_dataset\(\) differ by at most \S+e[-+]\d+",
        done.proof,
    )
    module = torch.export.load(done.path).module()
    assert module(torch.zeros(5, 1, 8, 8)).shape == (5, 10)


def test_onnx_by_the_command(trained: RunDir) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    done = dtrain(
        "export",
        "digits",
        "--to",
        "onnx",
        "--output",
        Path.cwd() / "m.onnx",
        cwd=trained.path.parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    wrote, checked = done.stdout.splitlines()
    assert wrote.startswith(f"wrote {Path.cwd() / 'm.onnx'} from step-00000020")
    assert checked.startswith("checked: outputs on 32 and 16 samples of eval_dataset() differ by")
    assert [path.name for path in Path.cwd().iterdir()] == ["m.onnx"]


def test_a_damaged_checkpoint_is_passed_over(trained: RunDir, tmp_path: Path) -> None:
    copy = RunDir(shutil.copytree(trained.path, tmp_path / "copy"))
    weights = copy.checkpoint(20) / TENSORS
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    pytest.importorskip("safetensors")
    done = export(copy, "safetensors")
    assert done.checkpoint == "step-00000010"
    assert "step-00000020 is not used: rank-00000.safetensors is damaged" in done.lines()[0]
    with raises("export.no-usable-checkpoint", str(copy.checkpoints)):
        export(copy, "safetensors", step=20)


def test_what_cannot_be_exported(trained: RunDir, tmp_path: Path) -> None:
    with raises("export.no-such-step", "--step 15", "digits-abc234"):
        export(trained, "torch-export", step=15)
    empty = RunDir(tmp_path / "empty")
    empty.create()
    with raises("export.no-checkpoint", "run empty"):
        export(empty, "torch-export")
    with raises("export.no-directory", "nowhere"):
        export(trained, "torch-export", output=Path("nowhere/model.pt2"))


class Branches(torch.nn.Module):
    """What it computes depends on the data, which no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.line(x)
        return -y if float(x.sum()) > 0 else y


def test_a_model_that_cannot_be_traced(tmp_path: Path) -> None:
    x = torch.ones(4, 2)
    model = Branches().eval()
    trained = Trained(model, "eval_dataset", (Call((x,), {}, [model(x).detach()], 4),))
    with raises("export.model-unsupported", "torch.export", "--to safetensors") as caught:
        torch_export(trained, tmp_path / "model.pt2")
    assert "\n" not in str(caught.value)


def test_a_model_of_which_methods_are_called() -> None:
    class Methods(Task):
        def model(self) -> torch.nn.Module:
            return Branches()

        def eval_dataset(self) -> TensorDataset:
            return TensorDataset(torch.ones(9, 2))

        def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
            return {"sum": float(model.line(batch[0]).sum())}

    with raises("export.no-single-call", "--to safetensors"):
        called(Methods(), Branches())


def test_a_missing_package_is_one_line_with_its_pip_command(
    trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain import catalog

    fact = catalog.ExportFact(".none", catalog.Needs(("no_such_package",), "export"))
    monkeypatch.setattr(catalog, "EXPORTS", {"none": fact})
    names = ("--to none ", "no_such_package", "pip install 'dtrain[export]'")
    with raises("plan.missing-package", *names, kind=UsageError) as caught:
        export(trained, "none")
    assert "\n" not in str(caught.value)


AVERAGED = """
import torch
from torch.utils.data import TensorDataset

import dtrain


class Averaged(dtrain.Task):
    def model(self):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.ema = dtrain.EMA(model, 0.9)
        return model

    def train_dataset(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(dim=1, keepdim=True))

    eval_dataset = train_dataset

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def evaluate(self, model, batch):
        return {"loss": self.loss(self.ema.model, batch)}

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)
"""


def test_averaged_weights(trained: RunDir, tmp_path: Path) -> None:
    with raises("export.no-average", "--averaged"):
        export(trained, "torch-export", averaged=True)
    (tmp_path / "task.py").write_text(AVERAGED)
    job = "name: a\ntask: task.py:Averaged\ntrain: {steps: 8, global_batch_size: 16}\n"
    (tmp_path / "job.yaml").write_text(job)
    size = ["--strategy", "single", "--procs", "1", "--run-id", "averaged"]
    done = dtrain("launch", "job.yaml", *size, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = dtrain("export", "averaged", "--to", "torch-export", "--averaged", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = read_checkpoint(RunDir(tmp_path / "runs" / "averaged").checkpoint(8))[0]
    average = kept["kept"]["states"]["EMA.0"]["weights"]
    assert not torch.equal(average["0.weight"], kept["model"]["0.weight"])
    module = torch.export.load(tmp_path / "averaged-8.pt2").module()
    assert all(torch.equal(each, average[name]) for name, each in module.state_dict().items())
