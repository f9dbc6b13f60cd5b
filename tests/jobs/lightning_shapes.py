"""LightningModules in the shapes that public repositories have, one feature each, and some of two.

None draws random numbers in training, so that Lightning's own Trainer can be asked for the same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchmetrics import MeanAbsoluteError, MeanMetric


class Points(Dataset[Any]):
    def __init__(self, n: int, seed: int = 1) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 6, generator=draw)
        self.y = torch.sin(self.x.sum(dim=1, keepdim=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


class Plain(pl.LightningModule):
    """What the others change a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def train_dataloader(self) -> Any:
        return DataLoader(Points(50), batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Points(21, 2), batch_size=4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.mse(batch)

    def mse(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.mse(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Zeros(Plain):
    """Trains like `Plain` only if it is given those weights."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.net[0].weight)


class Manual(Plain):
    """One optimizer, stepped by hand, with a scheduler by hand and clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.mse(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]


class Gan(Plain):
    """Two optimizers over two networks in turn; nothing is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()  # type: ignore[attr-defined]
        self.toggle_optimizer(first)
        made = nn.functional.softplus(-self.discriminator(self(x))).mean()
        self.log("made", made, prog_bar=True)
        self.manual_backward(made)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        judged = nn.functional.softplus(-self.discriminator(y)).mean()
        judged = judged + nn.functional.softplus(self.discriminator(self(x).detach())).mean()
        self.log("judged", judged, on_step=False, on_epoch=True)
        self.manual_backward(judged)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> Any:
        return (
            {"optimizer": torch.optim.Adam(self.net.parameters(), lr=0.01)},
            {"optimizer": torch.optim.SGD(self.discriminator.parameters(), lr=0.1, momentum=0.9)},
        )


class Plateau(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


class WarmUp(Plain):
    """Overrides `optimizer_step` to set the rate, and the scheduler's step."""

    def optimizer_step(
        self, epoch: Any, batch_idx: Any, optimizer: Any, closure: Any = None
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)


class Wrapped(torch.optim.Optimizer):
    """An optimizer around another one, as LARS and Lookahead are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.calls = 0
        self.defaults, self.state = inner.defaults, inner.state
        self.param_groups = inner.param_groups
        self._optimizer_step_pre_hooks = {}  # type: ignore[assignment]
        self._optimizer_step_post_hooks = {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.state, self.param_groups = self.inner.state, self.inner.param_groups
        self.calls = state["calls"]


class WrappedWarmUp(WarmUp):
    def configure_optimizers(self) -> Any:
        optimizer = Wrapped(super().configure_optimizers())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Clips(Plain):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


class Backwards(Sampler[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n - 1, -1, -1))


class OwnSampler(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(Points(48), batch_size=16, sampler=Backwards(48))


class Halves(Sampler[list[int]]):
    """A batch sampler that draws from torch's global generator where it begins."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.n).tolist()
        return iter([order[i : i + self.n // 4] for i in range(0, self.n, self.n // 4)])


class OwnBatchSampler(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(Points(48), batch_sampler=Halves(48))


class SeveralLoaders(Plain):
    def train_dataloader(self) -> Any:
        return {
            "first": DataLoader(Points(48), batch_size=16),
            "second": DataLoader(Points(32, 3), batch_size=8),
        }

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.mse(batch["first"]) + self.mse(batch["second"])


class StepHooks(Plain):
    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.sign_()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.1)


class Ema(pl.Callback):
    """An average of the weights in a callback, of which all tensors are in its state."""

    average: dict[str, torch.Tensor] | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = pl_module.state_dict()
        if self.average is None:
            self.average = {name: each.clone() for name, each in now.items()}
        for name, each in self.average.items():
            each.mul_(0.5).add_(now[name], alpha=0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


class EmaInCallback(Plain):
    def configure_callbacks(self) -> Any:
        self.ema = Ema()
        return [self.ema]

    @property
    def remembered(self) -> Any:
        return self.ema.average


class EmaInCheckpoint(Plain):
    """An average in the module, added to checkpoints by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Any = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average is None:
            self.average = copy.deepcopy(self.net).requires_grad_(False)
            self._modules.pop("average", None)
        with torch.no_grad():
            for mine, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mine.mul_(0.5).add_(now, alpha=0.5)

    @property
    def remembered(self) -> Any:
        return self.average.state_dict()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "average":  # not one of the module's own layers
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.average.load_state_dict(checkpoint["average"])


class Averaged(Plain):
    """Lightning's own averaging, whose checkpoints hold the averaged weights as the model."""

    def configure_callbacks(self) -> Any:
        return [EMAWeightAveraging(decay=0.5)]


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        points = Points(48)
        return iter([points[i] for i in range(48)])


class Stream(Manual):
    """A stream of no length; and by hand, so that dtrain's step cannot read it."""

    def train_dataloader(self) -> Any:
        return DataLoader(Numbers(), batch_size=16)


class Counted(Plain):
    """Objects of torchmetrics in the training step, logged for the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanAbsoluteError()
        self.mean = MeanMetric()
        self.epochs: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(x)
        self.error(out, y)
        self.mean.update(out.detach().mean(), weight=len(x))
        self.log("error", self.error, on_step=False, on_epoch=True)
        return nn.functional.mse_loss(out, y)

    def on_train_epoch_end(self) -> None:
        self.log("mean", self.mean.compute())
        self.epochs += [float(self.error.compute()), float(self.mean.compute())]
        self.mean.reset()

    @property
    def remembered(self) -> Any:
        """Of the last epoch."""
        return dict(zip(("error", "mean"), map(torch.tensor, self.epochs[-2:]), strict=True))


class CountedByHand(Counted):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Makes the loops Lightning's."""


class Length(Plain):
    """Asks its trainer, early, for what schedules are made of."""

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        assert trainer.datamodule is None
        assert trainer.num_devices >= 1
        assert trainer.strategy is not None
        self.asked = (trainer.max_epochs, trainer.estimated_stepping_batches)
        optimizer = super().configure_optimizers()
        total = int(trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def setup(self, stage: str) -> None:
        assert self.trainer.max_epochs == 2


class Gathers(Plain):
    """A loss over the samples of all processes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.all_gather(self(x), sync_grads=True)
        mean = out.mean() * 0.0
        self.trainer.strategy.barrier()
        return nn.functional.mse_loss(self(x), y) + mean


class Largest(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.mse(batch)
        self.log("largest", batch_idx, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("count", float(len(batch[0])), reduce_fx="sum")


class Short(Plain):
    """Ends its epochs early."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 2 else None


class LateLayers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net: Any = nn.Identity()
        self.more: Any = None

    def setup(self, stage: str) -> None:
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def configure_model(self) -> None:
        if self.more is None:
            torch.manual_seed(6)
            self.more = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x) + self.more(x)


class LateZeros(LateLayers):
    """Trains like `LateLayers` only if it is given those weights."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        nn.init.zeros_(self.net[0].weight)

    def configure_model(self) -> None:
        super().configure_model()
        nn.init.zeros_(self.more.weight)


class Ready(Dataset[Any]):
    """Gives whole batches."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        points = Points(48)
        return points.x[12 * i : 12 * i + 12], points.y[12 * i : 12 * i + 12]


class ReadyBatches(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(Ready(), batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(Ready(), batch_size=None)


class Watching(pl.Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        self.heard.append(f"start {i}")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        self.heard.append(f"end {i} of {len(batch[0])}")


class ValidationHooks(Plain):
    def configure_callbacks(self) -> Any:
        self.watching = Watching()
        return [self.watching]


class Transfers(pl.LightningDataModule):
    """Normalises batches in its hooks of the transfer."""

    def train_dataloader(self) -> Any:
        return Plain.train_dataloader(self)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return Plain.val_dataloader(self)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] - 1, batch[1]]


class WithoutLoaders(Plain):
    train_dataloader = pl.LightningModule.train_dataloader
    val_dataloader = pl.LightningModule.val_dataloader


class WithoutLoadersByHand(WithoutLoaders):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Makes the loops Lightning's."""


class Doubling(DataLoader[Any]):
    def __iter__(self) -> Any:
        batches = super().__iter__()
        return ([x * 2, y] for x, y in batches)


class OwnIterator(Plain):
    def train_dataloader(self) -> Any:
        return Doubling(Points(48), batch_size=16)


class Skips(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            return None
        return {"loss": self.mse(batch), "more": 1}


class NoOptimizer(Plain):
    """Trains nothing; gathers, as an encoder of nearest neighbours does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.total += batch[0].sum(dim=0)
        return self.mse(batch)

    def configure_optimizers(self) -> Any:
        return None


class Asks(Plain):
    """Steps by itself where it is to, and asks which it is in its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.mse(batch)
        if not self.automatic_optimization:
            self.manual_backward(loss)
        return loss


class BareDict(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], {"scheduler": schedule, "interval": "step"}


class EmptyDict(Plain):
    def configure_optimizers(self) -> Any:
        return {"optimizer": super().configure_optimizers(), "lr_scheduler": {}}


class AsksLoader(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert len(self.trainer.train_dataloader.dataset) == 50
        return self.mse(batch)


class AsksLoaderByHand(AsksLoader):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Makes the loops Lightning's."""


class Accumulates(Plain):
    """Accumulates more batches from its second epoch on."""

    def configure_callbacks(self) -> Any:
        return [GradientAccumulationScheduler({0: 1, 1: 2})]


class Tested(Plain):
    """Has a test and predictions, which a callback writes."""

    def test_dataloader(self) -> Any:
        return DataLoader(Points(23, 4), batch_size=4)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.mse(batch))
        self.log("tested", float(len(batch[0])), reduce_fx="sum")

    def predict_dataloader(self) -> Any:
        return DataLoader(Points(10, 5), batch_size=4)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_callbacks(self) -> Any:
        return [Written()]


class Written(pl.callbacks.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        rows = torch.cat(predictions)
        file = Path(trainer.default_root_dir) / f"predictions-{trainer.global_rank}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"rows": rows, "ids": [i for each in batch_indices[0] for i in each]}, file)


class Saves(Plain):
    """With a ModelCheckpoint, which Lightning can read, and its own early stopping."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Makes the loops Lightning's."""

    def configure_callbacks(self) -> Any:
        self.saver = pl.callbacks.ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
        stopping = pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=9.0)
        return [self.saver, stopping]


class Swa(Plain):
    """Averages its weights in the second half, and ends with the average."""

    def configure_callbacks(self) -> Any:
        return [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)]


class FindsRate(Plain):
    def configure_callbacks(self) -> Any:
        return [pl.callbacks.LearningRateFinder()]


class FindsBatchSize(Plain):
    def configure_callbacks(self) -> Any:
        return [pl.callbacks.BatchSizeFinder()]


class Counting(Plain):
    """Counts its batches and validations."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = self.validated = self.sane = 0

    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Makes the loops Lightning's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.sanity_checking:
            self.sane += 1
        else:
            self.validated += 1
        super().validation_step(batch, batch_idx)


class Normed(Counting):
    """Has buffers that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


class StopsInValidation(Counting):
    """Is asked to leave in its second validation."""

    stop: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.stop is not None and self.trainer.current_epoch == 1 and batch_idx == 1:
            self.stop.request("test")


class RankLogs(Counting):
    """Logs what only some ranks have, and a maximum and a sum."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.global_rank == 0:
            self.log("of_one", 3.0)
        self.log("largest", batch[1].max(), reduce_fx="max")
        self.log("count", float(len(batch[0])), reduce_fx="sum")


class LeftOut(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Failing(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise ZeroDivisionError


class Fails(Counting):
    def configure_callbacks(self) -> Any:
        return [Failing()]


class WithObjects(Plain):
    def __init__(self, net: nn.Module, make_optimizer: Any) -> None:
        super().__init__()
        self.net = net  # type: ignore[assignment]
        self._make_optimizer = make_optimizer

    def configure_optimizers(self) -> Any:
        return self._make_optimizer(self.parameters())


def with_objects(lr: float) -> Any:
    """A constructor that takes objects is given them by a function."""
    return WithObjects(nn.Linear(6, 1), lambda parameters: torch.optim.SGD(parameters, lr=lr))


class NaN(Plain):
    """Its loss is NaN for one sample, in the second epoch."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Makes the loops Lightning's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        bad = (x == Points(50).x[7]).all(dim=1).any() and self.current_epoch == 1
        return self.mse(batch) * (float("nan") if bad else 1.0)


class Slow(Plain):
    """Takes its time, so that it can be killed in the middle of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)


class SlowGan(Gan):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.05)
        super().training_step(batch, batch_idx)
