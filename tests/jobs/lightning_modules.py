"""LightningModules as their users write them, on small data that keeps a diary."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler
from torch.utils.data.dataloader import default_collate
from torchmetrics import MeanAbsoluteError


class Points(Dataset[Any]):
    def __init__(self, n: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=draw)
        self.y = torch.sin(self.x.sum(dim=1, keepdim=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.x[i], self.y[i], i


class Lit(pl.LightningModule):
    """A module with its own loaders; the loaders' batch size and order are not the job's."""

    def __init__(self, n: int = 50, held_out: int = 21, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.error = MeanAbsoluteError()
        self.seen: list[list[int]] = [[]]
        self.heard: list[str] = []
        self.epochs: list[float] = []

    def train_dataloader(self) -> Any:
        return DataLoader(Points(self.hparams["n"]), batch_size=3, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Points(self.hparams["held_out"]), batch_size=4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, ids = batch
        self.seen[-1] += ids.tolist()
        loss = nn.functional.mse_loss(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("one", 1.0, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.heard.append(f"step {self.global_step} epoch {self.current_epoch} batch {batch_idx}")
        self.seen.append([])

    def on_train_epoch_end(self) -> None:
        self.epochs.append(float(self.trainer.callback_metrics["train_loss_epoch"]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, ids = batch
        out = self(x)
        self.error(out, y)
        self.log_dict({"val_loss": nn.functional.mse_loss(out, y), "id": ids.float().mean()})
        self.log("one", 1.0, sync_dist=True)
        self.log("error", self.error)

    def on_validation_epoch_end(self) -> None:
        self.log("from_the_end", 2.0)
        self.heard.append("validated")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # by epochs


class Data(pl.LightningDataModule):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.called: list[str] = []

    def prepare_data(self) -> None:
        self.called.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.called.append(f"setup {stage}")
        self.data = Points(self.n)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=7)


class SetUp(Lit):
    """Counts what is called before training."""

    def __init__(self, per_node: bool = True) -> None:
        super().__init__()
        self.prepare_data_per_node = per_node
        self.called: list[str] = []

    def prepare_data(self) -> None:
        self.called.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.called.append(f"setup {stage}")


class Averaged(Lit):
    def configure_callbacks(self) -> Any:
        return EMAWeightAveraging(decay=0.5, device=None)


class Swaps(Lit):
    def configure_callbacks(self) -> Any:
        return pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1)


class TwoSets(Lit):
    """Two validation loaders that make their batches in different ways."""

    def __init__(self, by_name: bool = False) -> None:
        super().__init__()
        self.by_name = by_name
        self.errors = nn.ModuleList([MeanAbsoluteError(), MeanAbsoluteError()])

    def val_dataloader(self) -> Any:
        doubled = lambda samples: [2 * column for column in default_collate(samples)]  # noqa: E731
        other = DataLoader(Points(5), batch_size=2, collate_fn=doubled)
        loaders = {"a": super().val_dataloader(), "b": other}
        return loaders if self.by_name else list(loaders.values())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        x, y, ids = batch
        out = self(x)
        self.heard.append(f"set {dataloader_idx} batch {batch_idx}")
        self.errors[dataloader_idx](out, y)
        self.log("error", self.errors[dataloader_idx])
        self.log("val_loss", nn.functional.mse_loss(out, y), on_step=True, on_epoch=True)
        self.log(f"id_{dataloader_idx}", ids.double().mean(), add_dataloader_idx=False)


class OneName(TwoSets):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.log("loss", 1.0, add_dataloader_idx=False)


class OneMetric(TwoSets):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.log("error", self.error)


class NoIndex(TwoSets):
    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        raise AssertionError


class Several(Lit):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(2)]


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnSampler(Lit):
    def train_dataloader(self) -> Any:
        class Backwards(torch.utils.data.Sampler[int]):
            def __iter__(self) -> Any:
                return iter(range(49, -1, -1))

        return DataLoader(Points(50), batch_size=3, sampler=Backwards())


class OwnBatches(Lit):
    def train_dataloader(self) -> Any:
        return DataLoader(Points(50), batch_sampler=[[0, 1], [2]])


class PartByASampler(Lit):
    def val_dataloader(self) -> Any:
        return DataLoader(Points(50), sampler=SubsetRandomSampler(range(5)))


class Drawn(Lit):
    def train_dataloader(self) -> Any:
        return DataLoader(Points(50), sampler=RandomSampler(Points(50), True, num_samples=20))


class DrawnEvaluation(Lit):
    def val_dataloader(self) -> Any:
        return DataLoader(Points(21), sampler=RandomSampler(Points(21), num_samples=9))


class Batched(Lit):
    def train_dataloader(self) -> Any:
        return DataLoader(Points(50), batch_size=None)


class Sums(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("count", 1.0, on_epoch=True, reduce_fx="sum")
        return super().training_step(batch, batch_idx)


class OwnSchedule(Lit):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class Hooked(Lit):
    def on_after_backward(self) -> None:
        raise AssertionError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise AssertionError


class NoLoss(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class WithCallbacks(Lit):
    """Lightning's own callbacks, as a module brings them."""

    def configure_callbacks(self) -> Any:
        best = pl.callbacks.ModelCheckpoint(monitor="val_loss", filename="best-{epoch}")
        self.stopper = pl.callbacks.EarlyStopping(monitor="one", patience=2)  # always 1.0
        return [best, self.stopper, pl.callbacks.LearningRateMonitor()]
