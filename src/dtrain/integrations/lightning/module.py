"""An unchanged LightningModule as a task: its data, steps and optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from dtrain.errors import DtrainError, UsageError
from dtrain.integrations.lightning.callbacks import refuse_callbacks, why_callback_needs_loops
from dtrain.integrations.lightning.compat import CombinedLoader, call, is_overridden, pl, quietly
from dtrain.integrations.lightning.logging import Logged
from dtrain.integrations.lightning.needs_loops import NeedsLoopsError, why_module_needs_loops
from dtrain.integrations.lightning.optimizers import (
    IntervalScheduler,
    as_config,
    by_steps,
    configured,
    follows_metric,
)
from dtrain.integrations.lightning.user_loaders import (
    dataset_of,
    described,
    evaluated_samples,
    flat,
    order_of_loader,
    sampler_of,
    seeded_by_job,
)
from dtrain.ranks import RankInfo
from dtrain.task import Loss, Task
from dtrain.train import collectives
from dtrain.train.data.fetch import Fetched
from dtrain.train.data.loader import to_device
from dtrain.train.loop.evaluation import Sections
from dtrain.train.seeding import derive_seed, seed_everything


class ModuleTask(Task):
    """The task of a LightningModule, which is made when its model is requested, after seeding.

    Args:
        make: makes the module.
        name: the name of its class, for errors.
    """

    def __init__(self, make: Callable[[], pl.LightningModule], name: str) -> None:
        self._make = make
        self.name = name
        self.module: pl.LightningModule | None = None
        self.data_module: pl.LightningDataModule | None = None
        self.make_data_module: Callable[[], pl.LightningDataModule] | None = None
        self.loader: int | None = None
        """The current one of several validation loaders."""
        self._logged: Logged | None = None
        self._samples: Any = None
        self._is_ready = False
        self._trainer: pl.Trainer | None = None
        self._seed = self._batch_size = 0
        self._loaders: dict[str, Any] = {}
        self._steps_per_epoch: int | None = None
        self._schedulers: list[Any] = []

    # -- the task ----------------------------------------------------------------------------

    def model(self) -> torch.nn.Module:
        """Return the module, attached to its trainer and set up, so that it has all its layers.

        Raises:
            NeedsLoopsError: dtrain's step cannot train the module unchanged.
        """
        self.module, self.data_module = module, data = self.made()
        why = why_module_needs_loops(module, data)
        if why is not None:
            raise NeedsLoopsError(why)
        self._training_step = module.training_step
        self._configure_optimizers = module.configure_optimizers
        self._loaders = {}
        assert self._trainer is not None
        self._trainer.strategy.connect(module)
        module.trainer = self._trainer
        if data is not None:
            self._trainer.datamodule = data
            data.trainer = self._trainer
        connector = self._trainer._data_connector
        connector.attach_datamodule(module, data)
        self._data_hooks = connector._datahook_selector
        self._trainer._callback_connector._attach_model_callbacks()
        # a callback that copies the model needs Lightning's loops, which check again
        refuse_callbacks(self._trainer.callbacks, sharded=False)
        for callback in self._trainer.callbacks:
            why = why_callback_needs_loops(callback)
            if why is not None:
                raise NeedsLoopsError(why)
        self._prepare()
        return module

    def made(self) -> tuple[pl.LightningModule, pl.LightningDataModule | None]:
        """Return a new module, and a new data module if the job has one."""
        return self._make(), None if self.make_data_module is None else self.make_data_module()

    def train_dataset(self) -> Any:
        """Return the data set of the training loader; the job decides the order and the batches.

        Raises:
            NeedsLoopsError: the loader's sampler makes batches, or it does not load samples.
        """
        loader = self._loader("train_dataloader")
        if loader is None:
            raise UsageError(
                f"{self.name} has no train_dataloader(), and there is no data module; write the "
                "method, or set lightning.data_module",
                code="lightning.no-train-loader",
            )
        dataset = dataset_of(self, self.name, loader)
        self._weights, self._order = order_of_loader(loader, self._seed, f"{self.name} has")
        return dataset

    def sample_weights(self) -> Any:
        return self._weights

    def sample_order(self, seed: int, epoch: int) -> Any:
        return None if self._order is None else self._order(seed, epoch)

    def eval_dataset(self) -> Any:
        """Return the data set of the validation loader, or those of several; None without one.

        Raises:
            UsageError: there are several, and the module does not distinguish them.
        """
        assert self.module is not None
        if not is_overridden("validation_step", self.module, pl.LightningModule):
            return None
        loaders = flat(self._loader("val_dataloader"))
        if not loaders:
            return None
        if len(loaders) < 2:
            return _evaluated(self, self.name, loaders[0])
        if not _takes(self.module.validation_step, "dataloader_idx"):
            raise UsageError(
                f"val_dataloader() of {self.name} returned {len(loaders)} loaders, but "
                "validation_step() has no argument dataloader_idx",
                code="lightning.no-dataloader-idx",
            )
        return Sections([_LoaderTask(self, index, each) for index, each in enumerate(loaders)])

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Call `training_step` and return its loss, a mean over the batch's samples."""
        assert self._logged is not None
        self._logged.samples = self._samples
        self._is_ready, ready = False, self._is_ready
        batch = batch if ready else self.on_device(batch)
        assert self.module is not None
        self.module.automatic_optimization = True  # which is what its author expects
        try:
            returned = _called(self._training_step, batch, self._logged.batch_index)
        finally:
            self.module.automatic_optimization = False
        loss = returned.get("loss") if isinstance(returned, dict) else returned
        if not isinstance(loss, torch.Tensor):
            raise DtrainError(
                f"training_step() of {self.name} returned {type(returned).__name__}; it must "
                "return the loss, a mean over its batch, or a dict with the loss; a module that "
                "skips batches trains with lightning.step: lightning",
                code="lightning.no-loss",
            )
        return loss

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, Loss | torch.Tensor]:
        """Call `validation_step` and return the values it logs, as weighted means."""
        assert self._logged is not None
        assert self.module is not None
        step = self.module.validation_step
        with self._logged.batch(self.loader) as (number, logged):
            batch = self.on_device(batch, self.loader or 0)
            indices = (number,) if self.loader is None else (number, self.loader)
            self._call("on_validation_batch_start", batch, *indices)
            given = (batch, number, self.loader or 0)
            takes = _takes(step, "dataloader_idx")
            output = _called(step, *given) if takes else _called(step, *given[:2])
            self._call("on_validation_batch_end", output, batch, *indices)
        return dict(logged)

    def _call(self, hook: str, *given: Any) -> None:
        """Call a hook of the callbacks, then the module's."""
        assert self._trainer is not None
        call._call_callback_hooks(self._trainer, hook, *given)
        call._call_lightning_module_hook(self._trainer, hook, *given)

    @property
    def train_loader(self) -> Any:
        return self._loaders.get("train_dataloader")

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of `configure_optimizers`.

        Raises:
            NeedsLoopsError: it returns none, several, or a scheduler that follows a metric.
        """
        self._set_length()
        optimizers, self._schedulers = configured(self._configure_optimizers())
        if len(optimizers) != 1 or len(self._schedulers) > 1:
            raise NeedsLoopsError(
                f"configure_optimizers() of {self.name} returned {len(optimizers)} optimizers and "
                f"{len(self._schedulers)} schedulers"
            )
        if any(follows_metric(each) for each in self._schedulers):
            raise NeedsLoopsError(
                f"configure_optimizers() of {self.name} returned a scheduler that follows a metric"
            )
        if self._is_stream() and any(not by_steps(each) for each in self._schedulers):
            raise NeedsLoopsError(
                f"configure_optimizers() of {self.name} returned a scheduler by epochs, but the "
                "data are a stream of unknown length"
            )
        return optimizers[0]

    def _is_stream(self) -> bool:
        loader = self._loader("train_dataloader")
        return isinstance(getattr(loader, "dataset", None), IterableDataset)

    def _set_length(self) -> None:
        """Give Lightning's Trainer the training loader and its length, which schedules read."""
        assert self._trainer is not None
        loader = self._loader("train_dataloader")
        if not isinstance(loader, DataLoader) or self._is_stream():
            return
        fit: Any = self._trainer.fit_loop
        with quietly():
            fit._combined_loader = CombinedLoader(loader)
        fit.max_batches = -(-len(loader.dataset) // self._batch_size)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the module's scheduler, stepped by optimizer steps or epochs as configured."""
        if not self._schedulers:
            return None
        config = as_config(self._schedulers[0])
        if by_steps(config) and config.get("frequency", 1) == 1:
            return config["scheduler"]
        return IntervalScheduler(config, self.steps_between)

    # -- the trainer -------------------------------------------------------------------------

    @property
    def written_as(self) -> dict[str, Any]:
        """The module's methods by the names of a task's methods, for errors."""
        if self.module is None:
            return {}
        return {
            "loss": self._training_step,
            "evaluate": self.module.validation_step,
            "optimizer": self._configure_optimizers,
            "scheduler": self._configure_optimizers,
        }

    def attach(self, trainer: pl.Trainer, seed: int, batch_size: int) -> None:
        """Set the trainer that the module has from the beginning; call this before `model`.

        Args:
            trainer: the trainer.
            seed: the job's seed, so that `setup` draws the same numbers on all processes.
            batch_size: the number of samples of a step.
        """
        self._trainer, self._seed, self._batch_size = trainer, seed, batch_size

    def begin(self, logged: Logged, steps_per_epoch: int | None) -> None:
        """Prepare for the fit, in which Lightning must not prepare and set up a second time."""
        self._logged = logged
        self._steps_per_epoch = steps_per_epoch
        for source in self._sources():
            stubs = {name: _is_done for name in _SET_UP if hasattr(source, name)}
            vars(source).update(stubs)
        # for the batches that Lightning gets; `on_device` has called the hooks
        vars(self.module)["_on_before_batch_transfer"] = _unchanged

    def restore_methods(self) -> None:
        """Restore the methods of module and data module that `begin` has replaced."""
        for source in self._sources():
            for name in _SET_UP:
                vars(source).pop(name, None)

    def note_samples(self, fetched: Fetched) -> None:
        """Record the number of samples of the next loss."""
        self._samples = len(fetched.samples)

    def steps_between(self, config: dict[str, Any]) -> int | None:
        """Return the optimizer steps between two scheduler steps; None if that is unknown."""
        every = int(config.get("frequency", 1))
        if by_steps(config):
            return every
        return None if self._steps_per_epoch is None else every * self._steps_per_epoch

    def ready(self, batch: Any) -> Any:
        """Return the next step's first micro-batch on its device, for the step and callbacks."""
        batch = self.on_device(batch)
        self._is_ready = True
        return batch

    def on_device(self, batch: Any, loader: int = 0) -> Any:
        """Move a batch to the module's device, between the data module's or module's hooks."""
        assert self.module is not None
        before, after = (
            getattr(self._data_hooks.get_instance(name), name)
            for name in ("on_before_batch_transfer", "on_after_batch_transfer")
        )
        return after(to_device(before(batch, loader), self.module.device), loader)

    def _loader(self, method: str) -> Any:
        if method in self._loaders:
            return self._loaders[method]
        source = self.data_module or self.module
        if not is_overridden(method, source):
            source = self.module
        with seeded_by_job(method, self._seed):
            found = getattr(source, method)() if is_overridden(method, source) else None
        self._loaders[method] = found
        return found

    def _prepare(self) -> None:
        """Prepare the data on one process of each node, or on one of all; then set up on all."""
        ranks = RankInfo.from_env()
        for source in self._sources():
            if (ranks.local_rank if source.prepare_data_per_node else ranks.rank) == 0:
                source.prepare_data()
        collectives.gather_to_all(None)
        seed_everything(derive_seed("train_dataset", self._seed))
        for source in self._sources():
            source.setup("fit")
        assert self.module is not None
        self.module.configure_model()

    def _sources(self) -> list[Any]:
        return [each for each in (self.data_module, self.module) if each is not None]


_SET_UP = ("prepare_data", "setup", "configure_model", "configure_callbacks")


def _unchanged(batch: Any, dataloader_idx: int = 0) -> Any:
    return batch


def _is_done(stage: str = "") -> Any:
    """Replace a hook that was called before the fit."""
    return []


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
    if isinstance(dataset_of(task, name, loader), IterableDataset):
        raise NeedsLoopsError(f"val_dataloader() of {name} has a stream, which cannot be split")
    dataset = evaluated_samples(loader)
    if dataset is None:
        raise NeedsLoopsError(f"val_dataloader() of {name} has a {described(sampler_of(loader))}")
    return dataset


def _takes(step: Any, name: str) -> bool:
    """Return whether a step has an argument of this name, or accepts any."""
    parameters = inspect.signature(step).parameters
    return name in parameters or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())


def _called(step: Any, *given: Any) -> Any:
    """Call a step, which may omit the argument for the batch's index."""
    parameters = inspect.signature(step).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return step(*given)
    return step(*given[: len(parameters)])
