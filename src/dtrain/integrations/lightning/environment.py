"""Processes, devices and files, given to Lightning so that it never guesses them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from dtrain.errors import CheckpointError
from dtrain.integrations.lightning.compat import (
    ClusterEnvironment,
    DDPStrategy,
    LRSchedulerConfig,
    TorchCheckpointIO,
    pl,
    rank_zero_only,
)
from dtrain.ranks import RankInfo
from dtrain.run.files import replacing, write_atomic
from dtrain.train.checkpoint.state import model_state, optimizer_state
from dtrain.train.loop.training import Training


class DtrainEnvironment(ClusterEnvironment):
    """A ClusterEnvironment with the ranks that dtrain's agents have decided.

    Without it, Lightning guesses: a batch job, a leftover variable or torchrun misleads it.
    """

    def __init__(self, ranks: RankInfo) -> None:
        super().__init__()
        self._ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", 0))

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks.world_size

    def set_world_size(self, size: int) -> None:
        """The launcher has decided it."""

    def global_rank(self) -> int:
        return self._ranks.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has decided it."""

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.node_rank


class ExternalProcesses:
    """A mixin for Lightning's strategies: the processes and their group exist already."""

    def __init__(self, ranks: RankInfo, **options: Any) -> None:
        super().__init__(  # type: ignore[call-arg]
            cluster_environment=DtrainEnvironment(ranks),
            checkpoint_io=SafeCheckpointIO(),
            **options,
        )

    def _configure_launcher(self) -> None:
        """Launch nothing."""

    def setup_distributed(self: Any) -> None:
        self.set_world_ranks()
        rank_zero_only.rank = self.global_rank

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Take means in floating point: with integers, Lightning computes 3 / 2 = 1."""
        if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
            tensor = tensor.double()
        return super().reduce(tensor, group, reduce_op)  # type: ignore[misc]


def disable_signal_handlers(trainer: pl.Trainer) -> None:
    """Leave signals to dtrain, which acts on them at a step boundary, on all ranks.

    Lightning's own handler broadcasts from inside of the signal, even if the rank is in another
    collective. Its loop broadcasts before every batch to learn of the signal.
    """
    signals: Any = trainer._signal_connector
    loop: Any = trainer.fit_loop.epoch_loop
    signals.register_signal_handlers = loop._broadcast_sigterm_tensor = _nothing


def _nothing() -> None:
    """Replace Lightning's handling of signals."""


class DtrainStrategy(ExternalProcesses, DDPStrategy):
    """A Lightning strategy that wraps nothing: dtrain's own strategy distributes the work."""

    def __init__(self, ranks: RankInfo, step: Callable[[], None]) -> None:
        super().__init__(ranks)
        self._step = step

    def join(self, training: Training) -> None:
        """Set the training that owns the model and the optimizer; call this before the fit."""
        self._training = training

    def setup(self, trainer: pl.Trainer) -> None:
        """Take the optimizer and the scheduler; dtrain has placed the model on its device."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        parts = self._training.parts
        self.optimizers = [parts.optimizer]
        if parts.scheduler is not None:
            own = getattr(parts.scheduler, "scheduler", parts.scheduler)  # of IntervalScheduler
            self.lr_scheduler_configs = [LRSchedulerConfig(own, interval="step")]

    def training_step(self, *args: Any, **kwargs: Any) -> None:
        """Run dtrain's step, which calls the module's."""
        self._step()

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        """Return the batch unchanged; it is on its device already."""
        return batch

    def post_training_step(self) -> None:
        """Do nothing for DDP, which is part of dtrain's strategy if it is used."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole state by plain names, also if each rank holds a part."""
        assert self.lightning_module is not None
        return model_state(self.lightning_module)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer_state(self._training.parts.model, optimizer)

    def teardown(self) -> None:
        """Leave model and optimizer on their device, for use after the training."""
        assert self.accelerator is not None
        self.accelerator.teardown()


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes the files of Lightning's own callbacks atomically, each with a digest next to it.

    Lightning writes to /tmp and moves the file: a kill can leave a part under the final name.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            torch.save(dict(checkpoint), file)
        write_atomic(_digest_of(target), _digest(target))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        """Load a file, and verify it first if it has a digest.

        Raises:
            CheckpointError: the file is not the one that was written.
        """
        target = Path(path)
        kept = _digest_of(target)
        if kept.exists() and kept.read_text(encoding="utf-8") != _digest(target):
            raise CheckpointError(
                f"{target} is damaged: its xxh3 digest is not the one in {kept.name}",
                code="checkpoint.damaged-file",
            )
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        _digest_of(Path(path)).unlink(missing_ok=True)


def _digest_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh3")


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
