"""A task of a few microseconds a step that can be told to misbehave."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain import Loss, Task


class Tiny(Task):
    """Linear regression on 64 samples.

    Args:
        pause: seconds that each loss takes longer.
        misbehave: what `rank` does when it computes the loss of its `at`-th micro-batch: `raise`,
            `exit`, `_exit`, `leave` and `_leave` (with status 0), `kill`, `segv`, `term`, `hang`,
            `memory`.
        rank: who misbehaves.
        at: when, counted from 1 in each process.
        once: a path; with it only the first `times` processes that get there misbehave.
        times: see `once`.
        env_to: a directory where every rank writes its environment and a hash as JSON.
        say: a line that every rank prints, logs and warns of at its first loss.
    """

    def __init__(
        self,
        pause: float = 0.0,
        misbehave: str | None = None,
        rank: int = 1,
        at: int = 3,
        once: str | None = None,
        times: int = 1,
        env_to: str | None = None,
        say: str | None = None,
    ) -> None:
        self.pause = pause
        self.misbehave = misbehave
        self.rank = rank
        self.at = at
        self.once = once
        self.times = times
        self.env_to = env_to
        self.say = say
        self.calls = 0

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def train_dataset(self) -> Any:
        generator = torch.Generator().manual_seed(7)
        inputs = torch.randn(64, 4, generator=generator)
        targets = inputs @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
        return torch.utils.data.TensorDataset(inputs, targets)

    eval_dataset = train_dataset

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        self.calls += 1
        if self.say and self.calls == 1:
            self._speak(self.say)
        if self.env_to and self.calls == 1:
            rank = os.environ["RANK"]
            told = {**os.environ, "a hash": hash("text")}
            Path(self.env_to, f"{rank}.json").write_text(json.dumps(told))
        if self.calls == self.at and int(os.environ.get("RANK", 0)) == self.rank:
            self._misbehave()
        time.sleep(self.pause)
        inputs, targets = batch
        return Loss(((model(inputs) - targets) ** 2).sum(), len(inputs))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01)

    def _speak(self, text: str) -> None:
        import logging
        import warnings

        print(text)
        logging.getLogger("tiny").warning("logged: %s", text)
        warnings.warn(f"warned: {text}", stacklevel=1)

    def _misbehave(self) -> None:
        if self.once is not None:
            with Path(self.once).open("a+") as file:
                if file.tell() >= self.times:
                    return
                file.write("x")
        match self.misbehave:
            case "raise":
                raise ValueError(f"rank {self.rank} does not like this batch")
            case "exit":
                sys.exit(3)
            case "_exit":
                os._exit(3)
            case "leave":
                sys.exit()
            case "_leave":
                os._exit(0)
            case "kill" | "segv" | "term":
                os.kill(os.getpid(), getattr(signal, f"SIG{self.misbehave.upper()}"))
            case "hang":
                wait_forever()
            case "memory":
                hoard = []
                while True:
                    hoard.append(bytearray(16 << 20))


def wait_forever() -> None:
    """Wait for something that never comes."""
    import threading

    threading.Event().wait()
