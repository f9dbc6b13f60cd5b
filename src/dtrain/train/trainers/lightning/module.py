"""A LightningModule as a task: its data, steps and optimizer, without a line changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler
from torch.utils.data.dataloader import default_collate

from dtrain.errors import DtrainError, UsageError
from dtrain.ranks import RankInfo
from dtrain.task import Loss, Task
from dtrain.train import collectives
from dtrain.train.data.permutation import Ids
from dtrain.train.trainers.lightning.library import is_overridden, pl
from dtrain.train.trainers.lightning.logged import Logged

_OWN_STEP = (
    "optimizer_step",
    "backward",
    "configure_gradient_clipping",
    "optimizer_zero_grad",
)


class ModuleTask(Task):
    """Stands for a LightningModule, which is made when its model is asked for, already seeded.

    Args:
        make: makes it.
        name: its class, for errors.
    """

    def __init__(self, make: Callable[[], pl.LightningModule], name: str) -> None:
        self._make = make
        self._name = name
        self.module: pl.LightningModule | None = None
        self.data_module: pl.LightningDataModule | None = None
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
                f"{self._name} has automatic_optimization = False: it makes its own steps, which "
                "nobody else can then see to; run it as a script with a Trainer of its own"
            )
        for name in _OWN_STEP:
            if is_overridden(name, module, pl.LightningModule):
                raise UsageError(
                    f"{self._name} overrides {name}(), but the step is dtrain's here "
                    "(train.clip_grad_norm, train.precision); run it as a script with a Trainer of "
                    "its own"
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
            raise UsageError(f"{self._name} has no train_dataloader(), and there is no data module")
        sampler = getattr(loader, "sampler", None)
        known = (RandomSampler, SequentialSampler, WeightedRandomSampler)
        stream = isinstance(loader.dataset, torch.utils.data.IterableDataset)
        if not stream and not isinstance(sampler, known):
            raise UsageError(
                f"train_dataloader() of {self._name} has a {type(sampler).__name__}; the order of "
                "samples is dtrain's: leave the sampler out, or write a task with sample_order()"
            )
        self._weights = sampler.weights if isinstance(sampler, WeightedRandomSampler) else None
        return self._dataset_of(loader)

    def sample_weights(self) -> Any:
        """Those of a WeightedRandomSampler."""
        return self._weights

    def eval_dataset(self) -> Any:
        """The data set of the validation loader; None without one."""
        assert self.module is not None
        if not is_overridden("validation_step", self.module, pl.LightningModule):
            return None
        loader = self._loader("val_dataloader")
        if isinstance(loader, list | tuple):
            if len(loader) > 1:
                raise UsageError(
                    f"val_dataloader() of {self._name} returned {len(loader)} loaders; one is "
                    "evaluated here: join their data sets"
                )
            loader = loader[0] if loader else None
        return None if loader is None else self._dataset_of(loader)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """What `training_step` returned: a mean over the batch's samples."""
        assert self._logged is not None
        self._logged.samples = self._samples
        batch = self._on_device(batch)
        returned = _called(self._training_step, batch, self._logged.batch_index)
        loss = returned.get("loss") if isinstance(returned, dict) else returned
        if not isinstance(loss, torch.Tensor):
            raise DtrainError(
                f"training_step() of {self._name} returned {type(returned).__name__}; it must "
                "return the loss, a mean over its batch, or a dict with it"
            )
        return loss

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, Loss | torch.Tensor]:
        """What `validation_step` logs, as weighted means."""
        assert self._logged is not None
        assert self.module is not None
        with self._logged.batch() as logged:
            _called(self.module.validation_step, self._on_device(batch), 0)
        return dict(logged)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The one that `configure_optimizers` returns.

        Raises:
            UsageError: it returns several.
        """
        optimizers, self._schedulers = _configured(self._configure_optimizers())
        if len(optimizers) != 1 or len(self._schedulers) > 1:
            raise UsageError(
                f"configure_optimizers() of {self._name} returned {len(optimizers)} optimizers and "
                f"{len(self._schedulers)} schedulers; one of each is trained here: run it as a "
                "script with a Trainer of its own"
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
        return EveryFew(wish["scheduler"], self, wish)

    # -- the trainer -------------------------------------------------------------------------

    def attach(self, trainer: pl.Trainer, logged: Logged, steps_per_epoch: int | None) -> None:
        """Before the fit."""
        self._logged = logged
        self._steps_per_epoch = steps_per_epoch
        if self.data_module is not None:
            trainer.datamodule = self.data_module
            self.data_module.trainer = trainer

    def reads(self, ids: Ids) -> None:
        """Take note of how many samples the next loss is of."""
        self._samples = len(ids)

    def steps_between(self, wish: dict[str, Any]) -> int | None:
        """Optimizer steps between two of a scheduler's; None: nobody knows."""
        every = int(wish.get("frequency", 1))
        if wish.get("interval", "epoch") == "step":
            return every
        return None if self._steps_per_epoch is None else every * self._steps_per_epoch

    def _on_device(self, batch: Any) -> Any:
        assert self.module is not None
        batch = self.module.on_before_batch_transfer(batch, 0)
        return self.module.on_after_batch_transfer(batch, 0)

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
        """Download on one process of each node, then set up on all."""
        self._prepared = True
        source: Any = self.data_module or self.module
        if RankInfo.from_env().local_rank == 0:
            source.prepare_data()
        collectives.gather_to_all(None)
        source.setup("fit")

    def _dataset_of(self, loader: Any) -> Any:
        if not isinstance(loader, DataLoader):
            raise UsageError(
                f"{self._name}: a loader is a {type(loader).__name__}; the data set is taken out "
                "of a torch DataLoader here"
            )
        vars(self).pop("collate", None)
        if loader.collate_fn is not default_collate:
            self.collate = loader.collate_fn  # type: ignore[method-assign]
        return loader.dataset


class EveryFew:
    """A scheduler that is stepped after every so many steps: Lightning counts epochs too."""

    def __init__(self, scheduler: Any, task: ModuleTask, wish: dict[str, Any]) -> None:
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UsageError(
                "configure_optimizers() returned ReduceLROnPlateau, which is stepped with a "
                "metric; take a scheduler that counts steps or epochs"
            )
        self.scheduler = scheduler
        self._task, self._wish = task, wish
        self._count = 0

    @property
    def last_epoch(self) -> Any:
        """See the scheduler."""
        return self.scheduler.last_epoch

    def step(self) -> None:
        """After an optimizer step."""
        between = self._task.steps_between(self._wish)
        if between is None:
            raise UsageError(
                "a scheduler by epochs needs data of a known length; use interval step"
            )
        self._count += 1
        if self._count % between == 0:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Of the scheduler, and the count."""
        return {"scheduler": self.scheduler.state_dict(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.scheduler.load_state_dict(state["scheduler"])
        self._count = state["count"]


def _called(step: Any, batch: Any, batch_index: int) -> Any:
    """A step, which may leave out the index."""
    takes_index = len(inspect.signature(step).parameters) > 1
    return step(batch, batch_index) if takes_index else step(batch)


def _configured(given: Any) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers, of the many things that `configure_optimizers` may return."""
    if isinstance(given, torch.optim.Optimizer):
        return [given], []
    if isinstance(given, dict):
        scheduler = given.get("lr_scheduler")
        return [given["optimizer"]], [] if scheduler is None else [scheduler]
    if not isinstance(given, list | tuple):
        raise UsageError(f"configure_optimizers() returned {type(given).__name__}")
    if len(given) == 2 and isinstance(given[0], list | tuple):
        return list(given[0]), list(given[1])
    pairs = [_configured(each) for each in given]
    return [o for optimizers, _ in pairs for o in optimizers], [s for _, ss in pairs for s in ss]
