"""The shape of Hugging Face's own examples: everything goes through `accelerator.prepare`."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=4))
    for inputs, targets in loader:
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = accelerator.gather(model.module.weight.detach())
    accelerator.print(
        f"accelerate {accelerator.num_processes} processes, {len(loader)} batches each, "
        f"one model {torch.equal(weights[0], weights[-1])}"
    )


if __name__ == "__main__":
    main()
