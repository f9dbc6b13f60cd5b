"""A script of Hugging Face's `Trainer`, with a callback that checks that the ranks agree."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import dtrain


class Line(torch.nn.Module):
    """A model as the Trainer wants one: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.line(x)
        return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}


class Check(TrainerCallback):
    """Compares the ranks after each step."""

    def on_step_end(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        dtrain.check(model, optimizer)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    data = [{"x": row, "labels": row.sum(0, keepdim=True)} for row in x]
    arguments = TrainingArguments(
        "out", per_device_train_batch_size=4, num_train_epochs=2, logging_steps=2,
        save_strategy="no", report_to=[], use_cpu=True, seed=1, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = Trainer(Line(), arguments, train_dataset=data, callbacks=[Check()])
    done = trainer.train()
    if arguments.process_index == 0:
        print(f"trained {done.global_step} steps on {arguments.world_size}, {done.training_loss}")


if __name__ == "__main__":
    main()
