"""The task that a user writes: model, data, loss, optimizer, without rank, device or wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


REQUIRED = ("model", "train_dataset", "loss", "optimizer")
"""The methods that every task must have."""


@dataclass(frozen=True)
class Loss:
    """A loss, given as a sum and the weight of that sum.

    The gradient of a step is (sum of all sums) / (sum of all weights). It does not depend on how
    the samples are dealt to ranks and micro-batches. With means it would: the mean of means over
    unequal parts is another number.
    """

    sum: torch.Tensor
    """A scalar with its graph: the sum of the losses of all samples (or tokens)."""
    weight: float | torch.Tensor
    """The number of samples (or tokens, or any weight) in `sum`. It is not part of the graph."""


class Task:
    """The base class of tasks. Subclass it, or write any class with these methods.

    The constructor takes the job's `args:` as keyword arguments. Every process calls the methods.
    The data sets must be the same in all processes, because the trainer relies on it.
    """

    def model(self) -> torch.nn.Module:
        """Build the model on the CPU; the trainer seeds before this and moves the model later."""
        raise NotImplementedError

    def train_dataset(self) -> Any:
        """Return a map-style dataset: `len(dataset)` and `dataset[i]`, any picklable samples."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Any) -> Loss | torch.Tensor:
        """Compute the loss of one micro-batch.

        Args:
            model: the model, not wrapped. Call it, or any of its methods.
            batch: the result of `collate`, on the model's device.

        Returns:
            `Loss(sum, weight)`, or a scalar that means "mean over this batch's samples".
        """
        raise NotImplementedError

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the model's parameters."""
        raise NotImplementedError

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return a learning-rate scheduler, which is stepped after each optimizer step, or None."""
        return None

    def eval_dataset(self) -> Any:
        """Return a map-style dataset for evaluation; None means that there is no evaluation."""
        return None

    def evaluate(
        self, model: torch.nn.Module, batch: Any
    ) -> Mapping[str, Loss | torch.Tensor | float]:
        """Compute the metrics of one evaluation batch, under `no_grad` and `model.eval()`.

        Returns:
            A mapping from name to `Loss(sum, weight)` or to a scalar that means "mean over this
            batch's samples". The default is the training loss under the name `loss`.
        """
        return {"loss": self.loss(model, batch)}

    def predict(
        self, model: torch.nn.Module, batch: Any
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Compute predictions for one evaluation batch, under `no_grad` and `model.eval()`.

        A task that has this method gets `predictions.npz` at the end of training. Row i of each
        array belongs to sample i of `eval_dataset()`, on any number of processes.

        Returns:
            A tensor, or a mapping from name to tensor. The first dimension is the samples of the
            batch. The rows have the same shape in all batches.
        """
        raise NotImplementedError

    def sample_weights(self) -> Any:
        """Return one number per sample, in proportion to how often it is drawn.

        With weights, an epoch draws as many samples as there are, with replacement. None means
        that each sample is used once per epoch.
        """
        return None

    def sample_order(self, seed: int, epoch: int) -> Any:
        """Return the order of an epoch; None means that `data.shuffle` of the job decides.

        Args:
            seed: the job's seed. The order must be a function of the seed and the epoch alone.
            epoch: the number of the epoch, from 0.

        Returns:
            A sequence of sample ids, or an object with `__len__` and `block(start, stop)` that
            returns the ids at these positions. Ids may repeat or be left out. All epochs must
            have the same length.
        """
        return None

    def callbacks(self) -> Any:
        """Return a list of `dtrain.Callback`, called at steps, evaluations and checkpoints."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the task keeps from step to step, such as a counter or a teacher.

        Checkpoints contain it, so a resumed training continues with it. It must be the same on
        all processes: count optimizer steps, not calls of `loss`. A task that has this method
        needs `load_state_dict` too. Averages of `dtrain.EMA` are saved without it.

        Returns:
            Tensors, numbers, str and None, in dicts, lists and tuples.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, before the first step of a resumed training.

        Args:
            state: the saved state. Tensors that were on the model's device are on it again.
        """

    def collate(self, samples: list[Any]) -> Any:
        """Make one batch of a list of samples; the default is torch's default_collate."""
        from torch.utils.data import default_collate

        return default_collate(samples)
