"""Lightning's demos as task definitions, and templates in the shapes of its examples.

Those that would download something read a text that is written here. A stream of random numbers
has a seed, so that Lightning's own Trainer can be given the same one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import (
    BoringDataModuleNoLen,
    BoringModel,
    IterableBoringDataModule,
    Net,
)
from pytorch_lightning.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
from pytorch_lightning.demos.transformer import LightningTransformer, WikiText2
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

# -- boring ------------------------------------------------------------------------------------


class Repeated(IterableDataset[Any]):
    """A stream of random numbers that is the same in every pass, whoever drew before."""

    def __init__(self, stream: Any, seed: int) -> None:
        self.stream, self.seed = stream, seed

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            samples = list(self.stream)
        return iter(samples)


class NoLenRepeated(BoringDataModuleNoLen):
    """Has nothing to validate on."""

    val_dataloader = pl.LightningDataModule.val_dataloader

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.random_train: Any = Repeated(self.random_train, 1)


class SeveralRepeated(IterableBoringDataModule):
    """Trains on a data set and a stream at once, and validates on one of each."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_datasets[1] = Repeated(self.train_datasets[1], 1)
        self.val_datasets[1] = Repeated(self.val_datasets[1], 2)


class BoringOfSeveral(BoringModel):
    """As wide as the samples of `IterableBoringDataModule`, of which a batch has two."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def step(self, batch: Any) -> Any:
        return super().step(torch.cat(batch) if isinstance(batch, list) else batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.step(batch))


# -- language models ---------------------------------------------------------------------------

LINES = [
    f"{who} {how} {what}"
    for who in ("the tide", "a ferry", "this pier")
    for how in ("slowly turns past", "waits for")
    for what in ("one grey gull", "the last lamp", "rain")
]
WORDS = {word for line in LINES for word in line.split()} | {"<eos>"}


class Text:
    """What the two language models read, with the demos' own data set and dictionary."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "wikitext-2.txt").write_text("\n".join(LINES), encoding="utf8")

    def read(self) -> Any:
        return WikiText2(self.folder, block_size=4, download=False)


class LocalLSTM(LightningLSTM):
    """Keeps its state from batch to batch, whose sampler gives neighbouring blocks.

    The network is the demo's in small: a step of that one takes a third of a second.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(vocab_size=len(WORDS))
        self.model = SimpleLSTM(len(WORDS), ninp=16, nhid=16, nlayers=2)
        self.text = Text(folder)

    def prepare_data(self) -> None:
        self.text.write()

    def train_dataloader(self) -> Any:
        dataset = self.text.read()
        return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=8))


class LocalTransformer(LightningTransformer):
    def __init__(self, folder: str) -> None:
        super().__init__(vocab_size=len(WORDS))
        self.text = Text(folder)

    def prepare_data(self) -> None:
        self.text.write()

    def train_dataloader(self) -> Any:
        return DataLoader(self.text.read())


# -- a GAN -------------------------------------------------------------------------------------


class Ring(Dataset[Any]):
    """Points on a circle."""

    def __init__(self, n: int, seed: int) -> None:
        angle = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 6.28
        self.points = torch.stack([angle.cos(), angle.sin()], dim=1)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.points[i]


class GAN(pl.LightningModule):
    """Two networks with an optimizer each, stepped by hand in turn."""

    fixed: torch.Tensor

    def __init__(self, latent: int = 3, width: int = 16, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 2))
        self.discriminator = nn.Sequential(
            nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )
        self.register_buffer("fixed", torch.randn(8, latent))

    def forward(self, z: torch.Tensor) -> Any:
        return self.generator(z)

    def judged(self, points: torch.Tensor, real: bool) -> torch.Tensor:
        logits = self.discriminator(points)
        wish = torch.full_like(logits, float(real))
        return functional.binary_cross_entropy_with_logits(logits, wish)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        z = torch.randn(len(batch), self.hparams["latent"]).type_as(batch)

        self.toggle_optimizer(first)
        g_loss = self.judged(self(z), real=True)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        d_loss = (self.judged(batch, real=True) + self.judged(self(z).detach(), real=False)) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("d_val", self.judged(batch, real=True))

    def on_validation_epoch_end(self) -> None:
        self.log("radius", self(self.fixed).norm(dim=1).mean())

    def configure_optimizers(self) -> Any:
        networks = (self.generator, self.discriminator)
        lr = self.hparams["lr"]
        return [torch.optim.Adam(n.parameters(), lr=lr, betas=(0.5, 0.999)) for n in networks], []

    def train_dataloader(self) -> Any:
        return DataLoader(Ring(56, 1), batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Ring(20, 2), batch_size=8)


# -- reinforcement learning --------------------------------------------------------------------


class Corridor:
    """Walk along a corridor; its far end gives a reward, its near end takes one."""

    length = 6

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> torch.Tensor:
        self.place, self.time = 2, 0
        return self.seen()

    def seen(self) -> torch.Tensor:
        return functional.one_hot(torch.tensor(self.place), self.length).float()

    def step(self, action: int) -> tuple[torch.Tensor, float, bool]:
        self.place += 1 if action else -1
        self.time += 1
        reward = {0: -1.0, self.length - 1: 1.0}.get(self.place, -0.05)
        done = self.place in (0, self.length - 1) or self.time == 20
        return self.seen(), reward, done


class Experience(NamedTuple):
    state: torch.Tensor
    action: int
    reward: float
    done: bool
    after: torch.Tensor


class Replays(IterableDataset[Any]):
    """A pass draws so many of the experiences there are when it begins."""

    def __init__(self, buffer: deque[Experience], number: int, seed: int) -> None:
        self.buffer, self.number = buffer, number
        self.draw = random.Random(seed)

    def __iter__(self) -> Iterator[Any]:
        yield from self.draw.sample(list(self.buffer), self.number)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(Corridor.length, 16), nn.ReLU(), nn.Linear(16, 2))


class DQN(pl.LightningModule):
    """Plays a step of its own in every training step, and learns from what it remembers.

    The target network is not frozen, and no optimizer has it.
    """

    def __init__(self, seed: int = 1, sync_every: int = 3, gamma: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.target = mlp(), mlp()
        self.target.load_state_dict(self.net.state_dict())
        self.world, self.draw = Corridor(), random.Random(seed)
        self.buffer: deque[Experience] = deque(maxlen=100)
        self.state, self.total = self.world.reset(), 0.0
        for _ in range(60):
            self.play(epsilon=1.0)

    def forward(self, state: torch.Tensor) -> Any:
        return self.net(state)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def play(self, epsilon: float) -> None:
        explores, action = self.draw.random() < epsilon, self.draw.randrange(2)
        if not explores:
            action = int(self.net(self.state.to(self.device)).argmax())
        after, reward, done = self.world.step(action)
        self.buffer.append(Experience(self.state, action, reward, done, after))
        self.total += reward
        self.state = self.world.reset() if done else after

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.play(epsilon=max(0.1, 1.0 - self.global_step / 6))
        state, action, reward, done, after = batch
        value = self(state).gather(1, action.long().unsqueeze(1)).squeeze(1)
        with torch.no_grad():
            best = self.target(after).amax(dim=1) * ~done
        loss = functional.mse_loss(value, best * self.hparams["gamma"] + reward.float())
        if self.global_step % self.hparams["sync_every"] == 0:
            self.target.load_state_dict(self.net.state_dict())
        self.log("total_reward", self.total, prog_bar=True)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(Replays(self.buffer, 48, self.hparams["seed"]), batch_size=16)


class Episodes(IterableDataset[Any]):
    """A pass plays some episodes with the policy as it is when it begins; another on each rank."""

    def __init__(self, module: Reinforce) -> None:
        self.module = module
        self.draw = torch.Generator().manual_seed(module.global_rank)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(8):
            yield from self.episode()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def episode(self) -> list[Any]:
        world, steps, done = Corridor(), [], False
        policy = self.module.start
        state = world.reset()
        while not done:
            chances = functional.softmax(policy(state), dim=0)
            action = int(torch.multinomial(chances, 1, generator=self.draw))
            after, reward, done = world.step(action)
            steps.append((state, action, reward))
            state = after
        back, samples = 0.0, []
        for state, action, reward in reversed(steps):
            back = reward + 0.9 * back
            samples.append((state, action, back))
        return samples[::-1]


class Reinforce(pl.LightningModule):
    """A policy gradient; what an epoch plays is played by the policy at its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.start = mlp(), mlp().requires_grad_(False)
        self.start.load_state_dict(self.policy.state_dict())

    def on_train_epoch_end(self) -> None:
        self.start.load_state_dict(self.policy.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        state, action, back = batch
        chances = functional.log_softmax(self.policy(state), dim=1)
        taken = chances.gather(1, action.long().unsqueeze(1)).squeeze(1)
        self.log("return", back.float().mean(), on_step=False, on_epoch=True)
        return {"loss": -(taken * back.float()).mean()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.policy.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(Episodes(self), batch_size=8)


# -- an autoencoder ----------------------------------------------------------------------------


class Curves(pl.LightningDataModule):
    """Of two numbers each; split at random when it is set up."""

    def setup(self, stage: str) -> None:
        made = torch.rand(70, 2, generator=torch.Generator().manual_seed(4))
        x = torch.linspace(0, 3, 12)
        curves = made[:, :1] * torch.sin(x) + made[:, 1:] * torch.cos(2 * x)
        self.train, self.val = random_split(TensorDataset(curves), [50, 20])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=8)

    def predict_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=20)


class Autoencoder(pl.LightningModule):
    def __init__(self, hidden: int = 8, latent: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, 12))

    def encode(self, x: torch.Tensor) -> Any:
        return self.encoder(x)

    def decode(self, z: torch.Tensor) -> Any:
        return self.decoder(z)

    def forward(self, x: torch.Tensor) -> Any:
        return self.encode(x)

    def _shared(self, batch: Any, name: str) -> torch.Tensor:
        (x,) = batch
        loss = functional.mse_loss(self.decode(self.encode(x)), x)
        self.log(name, loss, on_epoch=True, on_step=name == "train_loss")
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._shared(batch, "train_loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._shared(batch, "val_loss")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }


# -- an image classifier -----------------------------------------------------------------------


class Images(pl.LightningDataModule):
    """Noisy squares in one of four corners."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        self.train, self.val, self.test = self._made(40, 5), self._made(18, 6), self._made(12, 7)

    def _made(self, n: int, seed: int) -> TensorDataset:
        draw, size = torch.Generator().manual_seed(seed), self.hparams["size"]
        images, half = torch.rand(n, 1, size, size, generator=draw), size // 2
        labels = torch.arange(n) % 4
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = half * (label // 2), half * (label % 2)
            image[0, row : row + half, column : column + half] += 0.5
        return TensorDataset(images, labels)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=8)

    def test_dataloader(self) -> Any:
        return DataLoader(self.test, batch_size=8)


class ImageClassifier(pl.LightningModule):
    def __init__(self, net: str = "small", lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        small = (
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 4), nn.LogSoftmax(dim=1),
        )  # fmt: skip
        self.model = Net() if net == "demo" else nn.Sequential(*small)

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = functional.nll_loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluated(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluated(batch, "test")

    def _evaluated(self, batch: Any, stage: str) -> None:
        x, y = batch
        out = self(x)
        right = (out.argmax(dim=1) == y).float().mean()
        self.log_dict({f"{stage}_loss": functional.nll_loss(out, y), f"{stage}_acc": right})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]
