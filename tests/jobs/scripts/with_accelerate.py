"""The shape of Hugging Face's own examples, with what dtrain lends beside `accelerator.prepare`."""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import dtrain


def main() -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    sampler = dtrain.sampler(data, 8)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    saved = dtrain.checkpoint(model, optimizer, schedule=schedule, sampler=sampler)
    step = saved.load()
    accelerator.print(f"begins after step {step}")
    while sampler.epoch < 2:
        for inputs, targets in DataLoader(data, batch_sampler=sampler):
            loss = torch.nn.functional.mse_loss(model(inputs), targets) * sampler.scale
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            sampler.step()
            step += 1
            dtrain.check(model, optimizer)
            if step == 3:
                saved.save(step)
            if step == 4 and accelerator.process_index == 1 and not _restarted():
                sys.exit("as asked")
    weights = accelerator.gather(accelerator.unwrap_model(model).weight.detach())
    accelerator.print(
        f"accelerate: {accelerator.num_processes} processes, {accelerator.mixed_precision}, "
        f"{step} steps, one model {torch.equal(weights[0], weights[-1])}"
    )


def _restarted() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


if __name__ == "__main__":
    main()
