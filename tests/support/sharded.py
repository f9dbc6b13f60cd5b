"""A model that is cut over the ranks, with Adam's moments, saved and loaded without a training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.content import contribution
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dtrain.train.checkpoint.store import CheckpointStore, Loaded


class Sharded:
    """Square layers of a model, of which a rank never holds more than its shards.

    Args:
        layers: their number.
        width: of each.
        seed: for the values, which differ between ranks.
    """

    def __init__(self, layers: int, width: int, seed: int) -> None:
        torch.set_num_threads(1)
        self.ranks = RankInfo.from_env()
        torch.manual_seed(seed * 100 + self.ranks.rank)
        mesh = init_device_mesh("cpu", (self.ranks.world_size,))
        with torch.device("meta"):
            self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device="cpu")
        for parameter in self.model.parameters():
            local(parameter).normal_()
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self) -> None:
        """Fill the moments."""
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach() * 0.1
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of what this rank holds, by name."""
        found = {name: local(each).clone() for name, each in self.model.named_parameters()}
        for name, values in optimizer_state(self.model, self.optimizer)["state"].items():
            found |= {f"{name} {key}": local(each).clone() for key, each in values.items()}
        return found

    def save(self, folder: Path, staging: float = 0.0) -> Path:
        run = RunDir(folder)
        run.create()
        state = {
            "model": model_state(self.model),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }
        rank, world_size = self.ranks.rank, self.ranks.world_size
        content = contribution(state, {}, {"step": 1}, rank, world_size)
        store = CheckpointStore(run, self.ranks, Retention(5), staging)
        saved = store.save(1, content, {}, wait=staging == 0) or store.finish()
        store.close()
        assert saved is not None
        return saved.folder

    def load(self, folder: Path) -> None:
        found = CheckpointStore(RunDir(folder), self.ranks, Retention(5)).load_newest(self.apply)
        assert found is not None

    def apply(self, loaded: Loaded) -> None:
        load_model_state(self.model, loaded.tensors["model"])
        load_optimizer_state(self.model, self.optimizer, loaded.tensors["optimizer"])


def local(tensor: torch.Tensor) -> torch.Tensor:
    here = tensor.detach()
    return here.to_local() if hasattr(here, "to_local") else here
