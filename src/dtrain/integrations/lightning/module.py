"""A LightningModule as a task: its data, steps and optimizer, without a line changed."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from dtrain.errors import DtrainError, UsageError
from dtrain.integrations.lightning.compat import is_overridden, pl
from dtrain.integrations.lightning.logging import Logged
from dtrain.integrations.lightning.optimizers import EveryFew, configured
from dtrain.integrations.lightning.user_loaders import (
    dataset_of,
    described,
    flat,
    sampler_of,
    takes_all,
    weights_of,
)
from dtrain.ranks import RankInfo
from dtrain.task import Loss, Task
from dtrain.train import collectives
from dtrain.train.data.fetch import Fetched
from dtrain.train.loop.evaluation import Sections

_OWN_STEP = (
    "optimizer_step",
    "backward",
    "configure_gradient_clipping",
    "optimizer_zero_grad",
    "lr_scheduler_step",
)

_NOT_CALLED = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "transfer_batch_to_device",
    "on_save_checkpoint",
    "on_load_checkpoint",
)
"""Hooks of a LightningModule that Lightning's own loop would call."""

logger = logging.getLogger(__name__)


class ModuleTask(Task):
    """Stands for a LightningModule, which is made when its model is asked for, already seeded.

    Args:
        make: makes it.
        name: its class, for errors.
    """

    def __init__(self, make: Callable[[], pl.LightningModule], name: str) -> None:
        self._make = make
        self.name = name
        self.module: pl.LightningModule | None = None
        self.data_module: pl.LightningDataModule | None = None
        self.loader: int | None = None
        """Which of several validation loaders is looked at."""
        self._logged: Logged | None = None
        self._samples: Any = None
        self._prepared = False
        self._steps_per_epoch: int | None = None
        self._schedulers: list[Any] = []

    # -- the task ----------------------------------------------------------------------------

    def model(self) -> torch.nn.Module:
        """The module.

        Raises:
            UsageError: it steps its optimizers by itself.
        """
        module = self._make()
        if not module.automatic_optimization:
            raise UsageError(
                f"{self.name} has automatic_optimization = False: it makes its own steps, and "
                "here the step is dtrain's. Run it with a Trainer of its own, as script: train.py"
            )
        for name in _OWN_STEP:
            if is_overridden(name, module, pl.LightningModule):
                raise UsageError(
                    f"{self.name} overrides {name}(), but the step is dtrain's here "
                    "(train.clip_grad_norm, train.precision). Run it with a Trainer of its own, as "
                    "script: train.py"
                )
        unheard = [name for name in _NOT_CALLED if is_overridden(name, module, pl.LightningModule)]
        if unheard and RankInfo.from_env().is_rank_zero:
            logger.warning(
                "%s has %s, which dtrain does not call: the step, the device and the checkpoints "
                "are its own",
                self.name,
                ", ".join(f"{name}()" for name in unheard),
            )
        self.module = module
        self._training_step = module.training_step
        self._configure_optimizers = module.configure_optimizers
        return module

    def train_dataset(self) -> Any:
        """The data set of the training loader; the order and the batches are the job's.

        Raises:
            UsageError: its order cannot be kept: a sampler of the user's own.
        """
        loader = self._loader("train_dataloader")
        if loader is None:
            raise UsageError(f"{self.name} has no train_dataloader(), and there is no data module")
        dataset = dataset_of(self, self.name, loader)
        sampler = sampler_of(loader)
        self._weights = weights_of(sampler)
        if self._weights is None and not takes_all(sampler):
            raise UsageError(
                f"train_dataloader() of {self.name} has a {described(sampler)}; the order of "
                "samples is dtrain's: leave the sampler out, or write a task with sample_order()"
            )
        return dataset

    def sample_weights(self) -> Any:
        return self._weights

    def eval_dataset(self) -> Any:
        """The data set of the validation loader, or those of several; None without one.

        Raises:
            UsageError: there are several, and the module does not tell them apart.
        """
        assert self.module is not None
        if not is_overridden("validation_step", self.module, pl.LightningModule):
            return None
        loaders = flat(self._loader("val_dataloader"))
        if len(loaders) < 2:
            return _evaluated(self, self.name, loaders[0]) if loaders else None
        if not _takes(self.module.validation_step, "dataloader_idx"):
            raise UsageError(
                f"val_dataloader() of {self.name} returned {len(loaders)} loaders, but "
                "validation_step() has no argument dataloader_idx"
            )
        return Sections([_LoaderTask(self, index, each) for index, each in enumerate(loaders)])

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """What `training_step` returned: a mean over the batch's samples."""
        assert self._logged is not None
        self._logged.samples = self._samples
        batch = self._on_device(batch)
        returned = _called(self._training_step, batch, self._logged.batch_index)
        loss = returned.get("loss") if isinstance(returned, dict) else returned
        if not isinstance(loss, torch.Tensor):
            raise DtrainError(
                f"training_step() of {self.name} returned {type(returned).__name__}; it must "
                "return the loss, a mean over its batch, or a dict with it"
            )
        return loss

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, Loss | torch.Tensor]:
        """What `validation_step` logs, as weighted means."""
        assert self._logged is not None
        assert self.module is not None
        step = self.module.validation_step
        with self._logged.batch(self.loader) as (number, logged):
            given: tuple[Any, ...] = (self._on_device(batch, self.loader or 0), number)
            if _takes(step, "dataloader_idx"):
                given = (*given, self.loader or 0)
            _called(step, *given)
        return dict(logged)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The one that `configure_optimizers` returns.

        Raises:
            UsageError: it returns several.
        """
        optimizers, self._schedulers = configured(self._configure_optimizers())
        if len(optimizers) != 1 or len(self._schedulers) > 1:
            raise UsageError(
                f"configure_optimizers() of {self.name} returned {len(optimizers)} optimizers and "
                f"{len(self._schedulers)} schedulers; one of each is trained here. Run it with a "
                "Trainer of its own, as script: train.py"
            )
        return optimizers[0]

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Its scheduler, which here counts in optimizer steps or in epochs as it asks."""
        if not self._schedulers:
            return None
        wish = self._schedulers[0]
        wish = wish if isinstance(wish, dict) else {"scheduler": wish}
        if wish.get("interval", "epoch") == "step" and wish.get("frequency", 1) == 1:
            return wish["scheduler"]
        return EveryFew(wish, self.steps_between)

    # -- the trainer -------------------------------------------------------------------------

    @property
    def written_as(self) -> dict[str, Any]:
        """The module's own methods by those of a task, for errors."""
        if self.module is None:
            return {}
        return {
            "loss": self._training_step,
            "evaluate": self.module.validation_step,
            "optimizer": self._configure_optimizers,
            "scheduler": self._configure_optimizers,
        }

    def attach(self, trainer: pl.Trainer, logged: Logged, steps_per_epoch: int | None) -> None:
        """Before the fit, in which Lightning is to prepare and set up nothing a second time."""
        self._logged = logged
        self._steps_per_epoch = steps_per_epoch
        if self.data_module is not None:
            trainer.datamodule = self.data_module
            self.data_module.trainer = trainer
        if self._prepared:
            for source in self._sources():
                vars(source).update(prepare_data=_is_done, setup=_is_done)

    def set_up_is_over(self) -> None:
        """Give module and data module their `prepare_data` and `setup` back, see `attach`."""
        for source in self._sources():
            for name in ("prepare_data", "setup"):
                vars(source).pop(name, None)

    def reads(self, fetched: Fetched) -> None:
        """Take note of how many samples the next loss is of."""
        self._samples = len(fetched.samples)

    def steps_between(self, wish: dict[str, Any]) -> int | None:
        """Optimizer steps between two of a scheduler's; None: nobody knows."""
        every = int(wish.get("frequency", 1))
        if wish.get("interval", "epoch") == "step":
            return every
        return None if self._steps_per_epoch is None else every * self._steps_per_epoch

    def _on_device(self, batch: Any, loader: int = 0) -> Any:
        assert self.module is not None
        batch = self.module.on_before_batch_transfer(batch, loader)
        return self.module.on_after_batch_transfer(batch, loader)

    def _loader(self, method: str) -> Any:
        source = self.data_module or self.module
        if not self._prepared:
            self._prepare()
        if not is_overridden(method, source):
            source = self.module
        if not is_overridden(method, source):
            return None
        return getattr(source, method)()

    def _prepare(self) -> None:
        """Download on one process of each node, or of all, then set up on all."""
        self._prepared = True
        ranks = RankInfo.from_env()
        for source in self._sources():
            if (ranks.local_rank if source.prepare_data_per_node else ranks.rank) == 0:
                source.prepare_data()
        collectives.gather_to_all(None)
        for source in self._sources():
            source.setup("fit")

    def _sources(self) -> list[Any]:
        return [each for each in (self.data_module, self.module) if each is not None]


def _is_done(stage: str = "") -> None:
    """Instead of a hook that was called before the fit."""


class _LoaderTask(Task):
    def __init__(self, owner: ModuleTask, index: int, loader: Any) -> None:
        self._owner = owner
        self._index = index
        self._dataset = _evaluated(self, owner.name, loader)

    def eval_dataset(self) -> Any:
        return self._dataset

    def evaluate(self, model: torch.nn.Module, batch: Any) -> Any:
        self._owner.loader = self._index
        return self._owner.evaluate(model, batch)


def _evaluated(task: Task, name: str, loader: Any) -> Any:
    dataset, sampler = dataset_of(task, name, loader), sampler_of(loader)
    if not takes_all(sampler):
        raise UsageError(
            f"val_dataloader() of {name} has a {described(sampler)}; all samples of its data set "
            "are evaluated here, once: give it a Subset of the data instead"
        )
    return dataset


def _takes(step: Any, name: str) -> bool:
    """Whether a step has an argument of this name, or takes any."""
    parameters = inspect.signature(step).parameters
    return name in parameters or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())


def _called(step: Any, *given: Any) -> Any:
    """A step, which may leave out the batch's index."""
    parameters = inspect.signature(step).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return step(*given)
    return step(*given[: len(parameters)])
