"""What `dtrain init --from` reads of command lines, scripts and Lightning scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.initializing.existing import Existing
from dtrain.initializing.reading import read
from support import EXAMPLES
from support.errors import raises

LINE = "torchrun --nproc-per-node 4 train.py --lr 0.1"
SHELL = """\
#!/bin/bash
# don't stop at a quote
set -e
NPROC=3
ARGS=(
  --lr 0.3
  --out "x y"
)
export FOO=bar MASTER_PORT=3
cat > other.txt <<END
torchrun not_this.py
END
cd work
python prepare.py || exit 1
torchrun --standalone --nproc_per_node=$NPROC \\
   --tee 3 train.py "${ARGS[@]}" --id=$RUN 2>&1 | tee log.txt
"""
BATCH = """\
#!/bin/bash
#SBATCH --job-name=big
#SBATCH -N 2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:4
#SBATCH -c 32 --mem=100G
#SBATCH -t 12:30:00
#SBATCH -p gpu
#SBATCH -o out.%j
#SBATCH --mail-user=me@example.org --mail-type=END
#SBATCH --nice=100
module load cuda/12.4
source /opt/venv/bin/activate
export NCCL_DEBUG=INFO
export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
echo hello
srun --kill-on-bad-exit torchrun --nnodes=$SLURM_NNODES --nproc-per-node=$SLURM_GPUS_ON_NODE \\
  --rdzv-endpoint=$MASTER_ADDR:29500 train.py --lr 0.1
#SBATCH --time=1
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN", raising=False)
    (tmp_path / "train.py").write_text("print(1)\n")
    return tmp_path


def script(name: str, text: str) -> Existing:
    Path(name).write_text(text)
    return read(name, Path())


def places(found: Existing) -> list[str]:
    """`FILE:LINE: WHAT` of all that was not carried over, without the reasons."""
    return sorted(": ".join(text.split(": ")[:2]) for text in found.left_out)


@pytest.mark.parametrize(
    ("line", "job", "sizes"),
    [
        (LINE, {"script": "train.py", "script_args": ["--lr", "0.1"]}, (None, 4)),
        ("torchrun --nproc_per_node=gpu ./train.py", {"script": "train.py"}, (None, "gpu")),
        ("A=1 python -u -m torch.distributed.run --nnodes 1:2 -m pkg.mod -x",
         {"module": "pkg.mod", "script_args": ["-x"]}, ("1:2", None)),
        ("torchrun --standalone --no-python ./train.py",
         {"command": ["train.py"]}, (None, None)),
        ("python -W ignore train.py -c 1", {"script": "train.py", "script_args": ["-c", "1"]},
         (None, None)),
        ("srun -N 2 --ntasks-per-node=3 ./train.py", {"script": "train.py"}, ("2", 3)),
    ],
)  # fmt: skip
def test_a_command_line(line: str, job: object, sizes: object) -> None:
    found = read(line, Path())
    assert found.job == job
    assert (found.nodes, found.procs) == sizes
    assert found.left_out == []


def test_a_path_is_seen_from_the_directory_of_the_job() -> None:
    assert read(LINE, Path("below")).job["script"] == "../train.py"


def test_several_hosts_need_the_address_of_one_and_not_the_rank() -> None:
    line = "torchrun --nnodes 2 --node-rank 1 --master-addr a --nproc-per-node 1 train.py"
    found = read(line, Path())
    assert (found.launcher, found.options) == ("torchrun", {"rdzv_endpoint": "a:29500"})
    assert places(found) == ["--from: --node-rank 1"]
    alone = read("torchrun --rdzv-endpoint a:1 --max-restarts 3 train.py", Path())
    assert (alone.launcher, alone.launch) == (None, {"max_restarts": 3})
    assert places(alone) == ["--from: --rdzv-endpoint a:1"]


def test_a_shell_script() -> None:
    found = script("run.sh", SHELL)
    assert found.job == {
        "script": "train.py",
        "script_args": ["--lr", "0.3", "--out", "x y", "--id=$RUN"],
    }
    assert (found.launcher, found.procs) == (None, 3)
    assert found.launch == {"env": {"FOO": "bar"}}
    assert places(found) == [
        "run.sh:10: cat <<END",
        "run.sh:13: cd work",
        "run.sh:14: python prepare.py",
        "run.sh:15: --id=$RUN",
        "run.sh:15: --tee 3",
        "run.sh:15: 2>&1",
        "run.sh:15: tee log.txt",
        "run.sh:9: MASTER_PORT=3",
    ]


def test_a_batch_script() -> None:
    found = script("job.sbatch", BATCH)
    assert found.name == "big"
    assert found.job == {"script": "train.py", "script_args": ["--lr", "0.1"]}
    assert (found.launcher, found.nodes, found.procs, found.gpus) == ("slurm", "2", 4, 4)
    assert found.launch == {"env": {"NCCL_DEBUG": "INFO"}}
    assert found.options == {
        "gres": "gpu:a100:4", "mem": "100G", "time": "12h30m", "partition": "gpu",
        "mail": "me@example.org", "slurm": {"nice": 100}, "modules": ["cuda/12.4"],
        "venv": "/opt/venv", "cpus_per_node": 32,
    }  # fmt: skip
    assert places(found) == [
        "job.sbatch:10: --mail-type=END",
        "job.sbatch:15: MASTER_ADDR=${…}",
        "job.sbatch:16: echo hello",
        "job.sbatch:17: --kill-on-bad-exit",
        "job.sbatch:17: --rdzv-endpoint ${…}:29500",
        "job.sbatch:9: --output=out.%j",
    ]


@pytest.mark.parametrize(
    ("options", "sizes", "cpus"),
    [
        ("-N 2 --ntasks-per-node=4 --gpus-per-task=1 -c 8", ("2", 4, 4), 32),
        ("--nodes=2 -n 8 -G 8", ("2", 4, 4), None),
        ("-n 3", (None, 3, 0), None),
        ("-N 1-2 --gpus-per-node=2", ("1:2", None, 2), None),
    ],
)
def test_sizes_of_a_batch_script_whose_tasks_are_the_ranks(
    options: str, sizes: object, cpus: int | None
) -> None:
    found = script("a.sh", f"#!/bin/sh\n#SBATCH {options}\nsrun python train.py\n")
    assert (found.nodes, found.procs, found.gpus) == sizes
    assert found.options.get("cpus_per_node") == cpus
    assert found.left_out == []


@pytest.mark.parametrize(
    ("limit", "found"),
    [("30", "30m"), ("90:00", "1h30m"), ("1-12", "1d12h"), ("2-00:30", "2d30m"), ("x", None)],
)
def test_a_time_limit(limit: str, found: str | None) -> None:
    text = f"#SBATCH -t {limit}\nsrun python train.py\n"
    read_ = script("a.sh", text).options
    assert read_.get("time") == (found or limit)


@pytest.mark.parametrize(
    ("given", "code", "named"),
    [
        ("no-such.sh", "init.no-file", "no-such.sh"),
        ("torchrun --frob 1 train.py", "init.unknown-option", "--frob"),
        ("torchrun --nproc-per-node 2", "init.no-command", "--from"),
        ("echo hello", "init.no-command", "--from"),
        ("torchrun gone.py --lr 1", "job.script-not-found", "gone.py"),
        ("a.sh", "init.several-commands", "a.sh:2"),
        (".", "init.no-file", "'.'"),
    ],
)
def test_what_cannot_be_read_is_an_error(given: str, code: str, named: str) -> None:
    Path("a.sh").write_text("torchrun train.py\ntorchrun train.py --more\n")
    with raises(code, named):
        read(given, Path())


# -- Lightning -------------------------------------------------------------------------------------

CLASSES = """\
import argparse
import pytorch_lightning as pl
from torch.utils.data import DataLoader
class Net(pl.LightningModule):
    def __init__(self, width, lr=0.1, extra=None): ...
    def validation_step(self, batch, i): ...
class Data(pl.LightningDataModule):
    def __init__(self, batch_size=16): ...
    def train_dataloader(self): return DataLoader([1], batch_size=self.batch_size)
"""
MAIN = """\
def main():
    a = argparse.ArgumentParser().parse_args()
    pl.seed_everything(7)
    model = Net(16, lr=0.05, extra=a.extra)
    data = Data(batch_size=8)
    trainer = pl.Trainer(
        max_epochs=2, devices=2, accelerator="cpu", strategy="fsdp", precision="bf16-mixed",
        accumulate_grad_batches=2, gradient_clip_val=1, logger=False, val_check_interval=50,
        callbacks=[1], log_every_n_steps=5, default_root_dir=a.out, profiler=a.profiler)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)
"""
GUARD = 'if __name__ == "__main__":\n    main()\n'


def test_a_lightning_script_becomes_a_task() -> None:
    found = script("lit.py", CLASSES + MAIN + GUARD)
    assert found.job == {
        "task": "lit.py:Net",
        "args": {"width": 16, "lr": 0.05},
        "trainer": "lightning",
        "strategy": "fsdp",
        "seed": 7,
        "train": {"epochs": 2, "precision": "bf16", "micro_batch_size": 8, "clip_grad_norm": 1.0},
        "eval": {"every_steps": 50},
        "log": {"every_steps": 5},
        "lightning": {
            "data_module": "lit.py:Data",
            "data_args": {"batch_size": 8},
            "trainer": {"logger": False},
        },
    }
    assert (found.procs, found.gpus, found.batch_per_process) == (2, 0, 16)
    assert places(found) == [
        "lit.py:13: extra=a.extra",
        "lit.py:18: callbacks=[1]",
        "lit.py:18: default_root_dir=a.out",
        "lit.py:18: profiler=a.profiler",
        "lit.py:20: test()",
    ]


def test_the_example_of_lightning_has_no_trainer() -> None:
    module = EXAMPLES / "lightning" / "module.py"
    found = read(str(module), module.parent)
    assert found.job["task"] == "module.py:LitDigits"
    assert found.job["train"] == {"epochs": 1000}
    assert found.batch_per_process == 32


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CLASSES + MAIN + "main()\n", "line 21"),
        (CLASSES + "pl.Trainer(devices=2).fit(Net(1))\n", "line 10"),
        (CLASSES + MAIN.replace("Net(16,", "Net(a.width,") + GUARD, "width=a.width"),
        (CLASSES + MAIN.replace("datamodule=data)", "[1])") + GUARD, "fit"),
        (CLASSES + "class Other(Net): ...\n", "LightningModule"),
    ],
)
def test_a_lightning_script_that_cannot_be_a_task_runs_as_it_is(text: str, reason: str) -> None:
    found = script("lit.py", text)
    assert found.job == {"script": "lit.py"}
    (said,) = [line for line in found.left_out if line.startswith("lit.py: trainer: lightning")]
    assert reason in said
    if "devices" in text:
        assert found.procs == 2


def test_another_trainer_is_a_script() -> None:
    found = script("hf.py", "from transformers import Trainer\nTrainer(devices=3).fit(1)\n")
    assert (found.job, found.procs, found.left_out) == ({"script": "hf.py"}, None, [])
    with raises("job.not-python", "bad.py:1"):
        script("bad.py", "def\n")
