"""What a user writes: model, data, loss, optimizer. No rank, no device, no wrapper in sight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


REQUIRED = ("model", "train_dataset", "loss", "optimizer")
"""Methods that every task has."""


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and the weight it is the sum of.

    The gradient of a step is (sum over everyone's sums) / (sum of everyone's weights), however
    the samples were dealt to ranks and micro-batches. A mean cannot say that: the mean of means
    over unequal parts is another number.
    """

    sum: torch.Tensor
    """Scalar; the sum over samples (or tokens) of their losses, with its graph."""
    weight: float | torch.Tensor
    """Number of samples (or tokens, or any weight) in `sum`. Never takes part in the graph."""


class Task:
    """Base class of tasks. Subclass it, or write any class with these methods.

    The constructor takes the job's `args:` as keyword arguments. Methods are called in every
    process; the data sets must be the same everywhere, which the trainer relies on.
    """

    def model(self) -> torch.nn.Module:
        """Build the model, on the CPU; the trainer seeds before and moves it after."""
        raise NotImplementedError

    def train_dataset(self) -> Any:
        """A map-style dataset: `len(dataset)` and `dataset[i]`, any picklable samples."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Any) -> Loss | torch.Tensor:
        """The loss of one micro-batch.

        Args:
            model: the model, unwrapped: call it, or any method of it.
            batch: what `collate` made of the samples, on the model's device.

        Returns:
            `Loss(sum, weight)`, or a scalar that means "mean over this batch's samples".
        """
        raise NotImplementedError

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters."""
        raise NotImplementedError

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """A learning-rate scheduler, stepped once after each optimizer step; None for none."""
        return None

    def eval_dataset(self) -> Any:
        """A map-style dataset for evaluation; None when there is nothing to evaluate."""
        return None

    def evaluate(
        self, model: torch.nn.Module, batch: Any
    ) -> Mapping[str, Loss | torch.Tensor | float]:
        """Metrics of one evaluation batch, under `no_grad` and `model.eval()`.

        Returns:
            By name, `Loss(sum, weight)` or a scalar that means "mean over this batch's
            samples". Without an override: the training loss, as `loss`.
        """
        return {"loss": self.loss(model, batch)}

    def predict(
        self, model: torch.nn.Module, batch: Any
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Predictions for one evaluation batch, under `no_grad` and `model.eval()`.

        A task that has this method gets `predictions.npz` at the end of training: row i of each
        array belongs to sample i of `eval_dataset()`, on any number of processes.

        Returns:
            A tensor, or several by name; the first dimension is the samples of the batch, and
            rows have one shape in all batches.
        """
        raise NotImplementedError

    def sample_weights(self) -> Any:
        """How often samples are drawn, in proportion: one number each; None: all once an epoch.

        An epoch then is as many draws, with replacement, as there are samples.
        """
        return None

    def sample_order(self, seed: int, epoch: int) -> Any:
        """The order of an epoch; None: shuffled, or as `data.shuffle` says.

        Args:
            seed: the job's; the order must be a function of it and of the epoch alone.
            epoch: from 0.

        Returns:
            A sequence of sample ids, or an object with `__len__` and `block(start, stop)` that
            returns the ids at these positions. Ids may repeat or be left out; all epochs have
            the same length.
        """
        return None

    def callbacks(self) -> Any:
        """A list of `dtrain.Callback`, told of steps, evaluations and checkpoints."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the task itself remembers from step to step, such as a counter or a teacher.

        It is kept in checkpoints, so that a resumed training goes on with it. It must be the same
        on all processes: count optimizer steps, not calls of `loss`. Whoever writes this method
        writes `load_state_dict` too. Averages of `dtrain.EMA` are kept without it.

        Returns:
            Tensors, numbers, str and None, in dicts, lists and tuples.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, called before the first step of a resumed training.

        Args:
            state: what `state_dict` returned; what was on the model's device is there again.
        """

    def collate(self, samples: list[Any]) -> Any:
        """Make one batch of a list of samples; torch's default_collate unless overridden."""
        from torch.utils.data import default_collate

        return default_collate(samples)
