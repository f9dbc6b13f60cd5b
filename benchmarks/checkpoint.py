"""What it costs to save a training, and to load it again.

A stack of linear layers with AdamW on the CPU, with DDP and with FSDP2. Several ways of saving take
turns in the same processes: torch.save on rank 0, torch.distributed.checkpoint (DCP), its
async_save with a thread and with a process, Lightning's Trainer.save_checkpoint (on one rank only),
and dtrain. What the machine can do is measured in the same rounds: a copy of what each rank
writes into buffers that are kept, and writing and reading it as plain files. Prints Markdown::

    python benchmarks/checkpoint.py --size 0.5 2 --ranks 1 2 4

All figures are medians over the rounds, of the slowest rank. The first save is shown apart. A ratio
is the median of the rounds' ratios. Each save is to a new directory and ends with fsync.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checkpoint import parts, tree
from dtrain.train.checkpoint.content import contribution
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dtrain.train.checkpoint.store import CheckpointStore, Loaded

WIDTH, BATCH, QUIET = 1024, 16, 3
"""Of the model and of a rank's batch; steps that are timed before each save in the background."""
TIMEOUT = 3600.0
Figures = dict[str, list[float]]
"""One number for each round, by name."""


if __name__ == "__mp_main__":
    logging.disable(logging.INFO)  # DCP's daemon imports this script, and logs each save


# -- the training --------------------------------------------------------------------------------


class Training:
    """A model of which parameters and AdamW's moments have about `size` bytes together."""

    def __init__(self, strategy: str, size: float) -> None:
        torch.manual_seed(0)
        self.ranks = RankInfo.from_env()
        depth = max(1, round(size / 12 / (WIDTH * WIDTH + WIDTH)))
        self.plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))
        self.model: nn.Module = self.plain
        if strategy == "fsdp":
            mesh = init_device_mesh("cpu", (self.ranks.world_size,))
            for layer in self.plain:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.plain, mesh=mesh)
        else:
            self.model = nn.parallel.DistributedDataParallel(
                self.plain, gradient_as_bucket_view=True
            )
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-6)
        self.x = torch.randn(BATCH, WIDTH)
        self.first = next(iter(self.plain.parameters()))
        for _ in range(3):
            self.step()
        held = tree.split(self.state()).tensors.values()
        self.held = sum(parts.local_box(each)[0].nbytes for each in held)
        """The bytes of the state that this rank holds, and has to load."""

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """As dtrain's trainer makes it; the tensors are not copied."""
        return {
            "model": model_state(self.plain, keep_vars=True),
            "optimizer": optimizer_state(self.plain, self.optimizer),
        }

    def spoil(self) -> Callable[[], bool]:
        """Make it a training that has just started, without moments, and with another parameter.

        Return a check that loading has restored them.
        """
        here = parts.local_box(self.first.detach())[0]
        before, states = here.clone(), len(self.optimizer.state)
        here.zero_()
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)  # DCP loads no moments if there are gradients
        return lambda: torch.equal(here, before) and len(self.optimizer.state) == states


class Limits:
    """What each rank writes: copied, written to a plain file, and read from the page cache."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._ranks = training.ranks
        self._folder = folder
        tensors = tree.split(training.state()).tensors
        rank, world_size = self._ranks.rank, self._ranks.world_size
        self._pieces = [each.data for each in parts.share(tensors, rank, world_size)]
        self.share = sum(each.nbytes for each in self._pieces)
        self._reads_all = training.held > self.share
        """Whether a rank has to read the files of all ranks, since its model is a replica."""
        self._kept = torch.empty(self.share + (8 << 20), dtype=torch.uint8)
        self.copy()

    def copy(self) -> None:
        start = 0
        for piece in self._pieces:
            end = start + piece.nbytes
            self._kept[start:end].copy_(piece.reshape(-1).view(torch.uint8))
            start = end

    def write(self) -> None:
        self._folder.mkdir(exist_ok=True)
        with open(self._folder / str(self._ranks.rank), "wb") as file:
            for piece in self._pieces:
                file.write(parts.as_bytes(piece))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> None:
        mine = [self._ranks.rank]
        for rank in range(self._ranks.world_size) if self._reads_all else mine:
            view = memoryview(self._kept.numpy())
            with open(self._folder / str(rank), "rb", buffering=0) as file:
                while count := file.readinto(view):
                    view = view[count:]


# -- the ways to save ----------------------------------------------------------------------------


class Way:
    """One way to save a training. Each save has a number, which is never used again."""

    text = ""
    in_background = False
    loads = False

    def __init__(self, training: Training, folder: Path) -> None:
        self.training = training
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, number: int) -> None:
        """Return when the training may go on."""
        raise NotImplementedError

    def done(self) -> bool:
        """Return whether this rank's part of the last save is on disk."""
        return True

    def wait(self) -> None:
        """Return when the last save is on disk."""

    def load(self) -> None:
        """Load the last save."""
        raise NotImplementedError

    def clear(self) -> None:
        """Remove what was saved. Rank 0 calls it."""
        for each in self.folder.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    def close(self) -> None:
        """Free what is kept between saves."""


class Dtrain(Way):
    text = "dtrain"
    in_background = True
    loads = True

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self._run = RunDir(folder)
        self._run.create()
        self._store = CheckpointStore(self._run, training.ranks, Retention(1000), staging=0.5)
        # a training does this after its first step, so that the first save need not
        tensors = tree.split(training.state()).tensors
        pieces = parts.share(tensors, training.ranks.rank, training.ranks.world_size)
        self._store.prepare(sum(each.bytes for each in pieces) + (1 << 20))

    def save(self, number: int) -> None:
        ranks = self.training.ranks
        state, progress = self.training.state(), {"step": number}
        content = contribution(state, {"extras": {}}, progress, ranks.rank, ranks.world_size)
        self._store.save(number, content, {}, wait=False)

    def done(self) -> bool:
        """Do what a training does at a step boundary, where this number is one of several."""
        busy = torch.tensor(float(self._store.state()[0]))
        dist.all_reduce(busy)
        if self._store.saving and not busy:
            self._store.proceed()
        return not self._store.saving

    def wait(self) -> None:
        self._store.finish()

    def close(self) -> None:
        self._store.close()

    def load(self) -> None:
        assert self._store.load_newest(self._apply) is not None

    def clear(self) -> None:
        for each in self._run.checkpoints.iterdir():
            shutil.rmtree(each)

    def _apply(self, loaded: Loaded) -> None:
        load_model_state(self.training.plain, loaded.tensors["model"])
        optimizer = self.training.optimizer
        load_optimizer_state(self.training.plain, optimizer, loaded.tensors["optimizer"])


class TorchSave(Way):
    """The whole state by rank 0. With FSDP it is gathered there first."""

    text = "torch.save on rank 0"

    def save(self, number: int) -> None:
        training = self.training
        if parts.is_part(training.first):
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            model, optimizer = get_state_dict(training.model, training.optimizer, options=whole)
        else:
            model, optimizer = training.plain.state_dict(), training.optimizer.state_dict()
        if training.ranks.is_rank_zero:
            with open(self.folder / f"{number}.pt", "wb") as file:
                torch.save({"model": model, "optimizer": optimizer}, file)
                file.flush()
                os.fsync(file.fileno())
        dist.barrier()


class Dcp(Way):
    text = "DCP save"
    loads = True

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.last = folder

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, number: int) -> None:
        self.last = self.folder / str(number)
        dcp.save(self.state(), checkpoint_id=self.last)

    def load(self) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=self.last)
        set_state_dict(
            self.training.model,
            self.training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


class DcpThread(Dcp):
    text = "DCP async_save, thread"
    in_background = True
    loads = False
    kind = AsyncCheckpointerType.THREAD

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self._group = dist.new_group(backend="gloo")
        self._future: Future[Any] = Future()
        self.stager: DefaultStager | None = None

    def save(self, number: int) -> None:
        self.last = self.folder / str(number)
        self._future = dcp.async_save(
            self.state(),
            checkpoint_id=self.last,
            process_group=self._group,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._future.result(timeout=TIMEOUT)
        self._future = Future()  # it holds the copy of the state


class DcpKept(DcpThread):
    """Copies into the same buffers each time, which holds a copy of the state all the time."""

    text = "DCP async_save, thread, own stager"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))

    def close(self) -> None:
        assert self.stager is not None
        self.stager.close()


class DcpProcess(DcpThread):
    """The first save starts a daemon of each rank."""

    text = "DCP async_save, process"
    kind = AsyncCheckpointerType.PROCESS

    def close(self) -> None:
        _async_process_executor._CHECKPOINT_PROCESS = None  # its __del__ ends the daemon
        gc.collect()
        for process in multiprocessing.active_children():
            process.kill()
            process.join()


class Lightning(Way):
    """What ModelCheckpoint calls, and an fsync, which Lightning leaves out. Only on one rank."""

    text = "Lightning save_checkpoint"

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        import pytorch_lightning as pl

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = training.plain

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self.net(batch).square().mean()

            def configure_optimizers(self) -> Any:
                return training.optimizer

        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        self._trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            **dict.fromkeys(quiet, False),
        )
        self._trainer.fit(Module(), torch.utils.data.DataLoader([training.x[0]] * 2))
        self._last = folder

    def save(self, number: int) -> None:
        self._last = self.folder / f"{number}.ckpt"
        self._trainer.save_checkpoint(self._last)

    def wait(self) -> None:
        with open(self._last, "rb") as file:
            os.fsync(file.fileno())


WAYS: dict[str, type[Way]] = {
    "dtrain": Dtrain,
    "torch": TorchSave,
    "dcp": Dcp,
    "thread": DcpThread,
    "kept": DcpKept,
    "process": DcpProcess,
    "lightning": Lightning,
}

COPIES = {
    "dtrain": 0, "torch": 0, "dcp": 0, "thread": 1, "kept": 1, "process": 4, "lightning": 2,
}  # fmt: skip
"""How often all ranks hold the state once more while they save or load. That of `kept` stays."""
PROCESS = 0.5e9
"""The memory of a process that has imported torch."""


# -- in each rank --------------------------------------------------------------------------------


def memory(field: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def forget_peak(*, trim: bool) -> int:
    """Let VmHWM start again. Return what is resident now; trim: after unused memory is given up."""
    if trim:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def together(action: Callable[[], object]) -> float:
    """Begin on all ranks at once; return this rank's seconds."""
    dist.barrier()
    return timed(action)


class Measuring:
    """Measures one way, round by round."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.found: Figures = {}
        self._number = 0
        self._add("load", [])
        self._add("quiet", [])
        self._add("during", [])

    def _add(self, name: str, values: Iterable[float]) -> None:
        self.found.setdefault(name, []).extend(values)

    def round(self, *, is_first: bool) -> None:
        self._save_alone("first " if is_first else "", trim=is_first)
        if self.way.loads:
            is_restored = self.way.training.spoil()
            seconds = together(self.way.load)
            assert is_restored(), self.way.text
            self._add("load", [] if is_first else [seconds])
        self._clear()
        if self.way.in_background and not is_first:
            self._save_while_training()
            self._clear()

    def _save_alone(self, prefix: str, *, trim: bool) -> None:
        before = forget_peak(trim=trim)
        dist.barrier()
        self._number += 1
        start = time.perf_counter()
        self.way.save(self._number)
        stop = time.perf_counter() - start
        self.way.wait()
        self._add(f"{prefix}stop", [stop])
        self._add(f"{prefix}disk", [time.perf_counter() - start])
        self._add("memory", [memory("VmHWM") - before])

    def _save_while_training(self) -> None:
        step = self.way.training.step
        dist.barrier()
        self._add("quiet", [timed(step) for _ in range(QUIET)])
        dist.barrier()
        self._number += 1
        self.way.save(self._number)
        during = []
        while not self._all_done():
            during.append(timed(step))
        # during the last step the save came to its end
        self._add("during", during[:-1] if len(during) > 1 else during)
        self.way.wait()

    def _all_done(self) -> bool:
        done = torch.tensor(float(self.way.done()))
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done)

    def _clear(self) -> None:
        dist.barrier()
        if self.way.training.ranks.is_rank_zero:
            self.way.clear()
        dist.barrier()


def measure(
    strategy: str, size: float, rounds: int, folder: Path, names: list[str]
) -> dict[str, Figures]:
    """Return this rank's figures, by way. The first round is apart."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    training = Training(strategy, size)
    limits = Limits(training, folder / "plain")
    ways = {name: WAYS[name](training, folder / name) for name in names}
    measurings = {name: Measuring(way) for name, way in ways.items()}
    machine: Figures = {"share": [limits.share], "held": [training.held]}
    try:
        for number in range(rounds + 1):
            for name in ("copy", "write", "read"):
                seconds = together(getattr(limits, name))
                machine.setdefault(name, []).extend([seconds] if number else [])
            dist.barrier()
            if training.ranks.is_rank_zero:
                shutil.rmtree(folder / "plain")
            dist.barrier()
            for measuring in measurings.values():
                measuring.round(is_first=number == 0)
    finally:
        for way in ways.values():
            way.close()
    return {"machine": machine, **{name: each.found for name, each in measurings.items()}}


# -- the tables ----------------------------------------------------------------------------------


def slowest(ranks: list[dict[str, Figures]]) -> dict[str, Figures]:
    """Return the largest number of all ranks, for each round."""
    return {
        way: {
            name: [max(each) for each in zip(*(rank[way][name] for rank in ranks), strict=True)]
            for name in ranks[0][way]
        }
        for way in ranks[0]
    }


def seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} s" if values else ""


def ratio(mine: list[float], theirs: list[float]) -> str:
    each = [one / other for one, other in zip(mine, theirs, strict=True)]
    return f"{statistics.median(each):.2f} ×"


def rates(size: float, times: list[float]) -> str:
    return f"{size / statistics.median(times) / 1e9:.2f} GB/s" if times else ""


def table(found: dict[str, Figures]) -> str:
    machine = found["machine"]
    share, held = machine["share"][0], machine["held"][0]
    lines = [
        f"A rank writes {share / 1e6:,.1f} MB and loads {held / 1e6:,.1f} MB. Limits: copy "
        f"{seconds(machine['copy'])} ({rates(share, machine['copy'])} per rank), write and fsync "
        f"{seconds(machine['write'])} ({rates(share, machine['write'])} per rank), read from the "
        f"page cache {seconds(machine['read'])} ({rates(held, machine['read'])} per rank).\n",
        "| way | stop | on disk | first: stop | first: on disk | step without → during a save "
        "| peak memory | of state/W | load, per rank |",
        "| --- " * 9 + "|",
    ]
    for name, each in found.items():
        if name == "machine":
            continue
        steps = ""
        if each["during"]:
            quiet, during = statistics.median(each["quiet"]), statistics.median(each["during"])
            steps = f"{1e3 * quiet:.0f} → {1e3 * during:.0f} ms ({during / quiet:.2f} ×)"
        peak = max(each["memory"])
        cells = [
            WAYS[name].text, seconds(each["stop"]), seconds(each["disk"]),
            seconds(each["first stop"]), seconds(each["first disk"]), steps,
            f"{peak / 1e6:,.0f} MB", f"{peak / share:.2f} ×", rates(held, each["load"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


RATIOS = (
    "stop / copy", "stop / DCP async, thread",
    "stop / DCP async, thread, own stager", "stop / DCP async, process",
    "on disk / DCP save", "on disk / torch.save", "on disk / plain write",
    "peak memory / (state/W)", "load, per rank", "time to load / DCP load",
)  # fmt: skip


def ratios(found: dict[str, Figures]) -> list[str]:
    """Return dtrain's figures beside those of others, as `RATIOS` names them."""
    ours, machine = found["dtrain"], found["machine"]

    def beside(name: str, figure: str) -> str:
        return ratio(ours[figure], found[name][figure]) if name in found else ""

    return [
        ratio(ours["stop"], machine["copy"]),
        *(beside(name, "stop") for name in ("thread", "kept", "process")),
        beside("dcp", "disk"),
        beside("torch", "disk"),
        ratio(ours["disk"], machine["write"]),
        f"{max(ours['memory']) / machine['share'][0]:.2f} ×",
        rates(machine["held"][0], ours["load"]),
        beside("dcp", "load"),
    ]


def choose(strategy: str, size: float, ranks: int) -> list[str]:
    """Return the ways for which this machine has the memory; none if it has too little."""
    free = 0.95 * psutil.virtual_memory().available - PROCESS * ranks
    state = size * (ranks if strategy == "ddp" else 1)
    free -= state * 4 / 3 + 2 * size  # parameters, moments, gradients; the copies that are kept
    if strategy == "fsdp":
        free -= 1.1 * size * ranks  # malloc keeps the memory of layers that were gathered
    if free < size:  # with FSDP, torch.save gathers the state on rank 0
        return []
    needed = {name: copies * state for name, copies in COPIES.items()}
    needed["process"] += PROCESS * ranks
    names = [name for name, each in needed.items() if each <= free]
    if "kept" in names and max(needed[name] for name in names) + state > free:
        names.remove("kept")
    if strategy != "ddp" or ranks > 1:
        names = [name for name in names if name != "lightning"]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, nargs="+", default=[0.5], help="of the state, in GB")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategy", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp"))
    others = [name for name in WAYS if name != "dtrain"]
    parser.add_argument("--beside", nargs="+", default=others, choices=others, help="other ways")
    parser.add_argument("--rounds", type=int, default=5, help="after a first one")
    parser.add_argument("--directory", type=Path, default=Path(), help="where files are written")
    options = parser.parse_args()
    rows = []
    for size in options.size:
        for strategy in options.strategy:
            for ranks in options.ranks:
                title = f"{size:g} GB, {strategy}, {ranks} rank{'s' * (ranks > 1)}"
                print(f"\n### {title}, load {os.getloadavg()[0]:.1f}\n", flush=True)
                possible = choose(strategy, 1e9 * size, ranks)
                names = [name for name in possible if name in ("dtrain", *options.beside)]
                if not names:
                    print("Not measured: this machine has too little memory.", flush=True)
                    continue
                with scratch(options.directory) as folder:
                    each = run_ranks(
                        measure,
                        ranks,
                        strategy,
                        1e9 * size,
                        options.rounds,
                        folder,
                        names,
                        timeout=TIMEOUT,
                    )
                found = slowest(each)
                print(table(found), flush=True)
                rows.append([title, *ratios(found)])
    print(f"\n### dtrain beside the others, {options.rounds} rounds\n")
    print(f"| | {' | '.join(RATIOS)} |\n{'| --- ' * (1 + len(RATIOS))}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Make a directory that is removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=parent.absolute()) as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
