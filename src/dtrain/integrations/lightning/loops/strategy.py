"""Lightning's DDP over dtrain's processes; it launches nothing and joins no group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dtrain.integrations.lightning.compat import DDPStrategy, pl
from dtrain.integrations.lightning.environment import OurProcesses
from dtrain.train.checkpoint.state import load_optimizer_state, optimizer_state
from dtrain.train.checks.initial_state import compare_model
from dtrain.train.context import TrainContext
from dtrain.train.seeding import derive_seed, seed_everything


class LoopsDDP(OurProcesses, DDPStrategy):
    """DDP over several processes, the plain module in one.

    Buffers are rank 0's after every step, as under dtrain's own strategies, instead of before
    every forward.

    Args:
        context: of the training.
        weighed: is given the loss of a micro-batch and gives what is to be trained on.
        returned: is given what a training step returned, and may change it.
        loaded: what Lightning is given for the file that it goes on from.
    """

    def __init__(
        self,
        context: TrainContext,
        weighed: Callable[[torch.Tensor], torch.Tensor],
        returned: Callable[[Any], Any],
        loaded: dict[str, Any] | None,
    ) -> None:
        super().__init__(context.ranks, broadcast_buffers=False)
        self._context = context
        self._weighed = weighed
        self._returned = returned
        self._loaded = loaded

    def _setup_model(self, model: torch.nn.Module) -> Any:
        return model if self.world_size == 1 else super()._setup_model(model)

    def setup(self, trainer: pl.Trainer) -> None:
        """Compare the module of all processes first: DDP gives them rank 0's without a word."""
        if self.world_size == 1:
            super(DDPStrategy, self).setup(trainer)  # DDP's own wants a group
        else:
            broadcast = self._context.spec.checks.init == "broadcast"
            compare_model(self.lightning_module, broadcast=broadcast)
            wish = self._context.spec.lightning.find_unused
            # of several optimizers each leaves the others' parameters out
            manual = not self.lightning_module.automatic_optimization
            self._ddp_kwargs["find_unused_parameters"] = manual if wish is None else wish
            super().setup(trainer)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        seed_everything(derive_seed("optimizer", self._context.spec.seed))
        super().setup_optimizers(trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._returned(super().training_step(*args, **kwargs))

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weigh the loss, of manual optimization too, by the samples that it is a mean of."""
        loss = self._weighed(closure_loss)
        result: torch.Tensor = super().backward(loss, optimizer, *args, **kwargs)
        return result

    def on_exception(self, exception: BaseException) -> None:
        if "finished reduction in the prior iteration" in str(exception):
            exception.add_note(
                "some parameters had no part in the loss of the last step: with "
                "lightning.find_unused: true DDP looks for them"
            )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        if self._loaded is not None:
            return self._loaded
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        if self._loaded is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_named_state(self.lightning_module, optimizer, state)


def named_state(module: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """An optimizer's state by parameter name; as it is of one that is not torch's kind."""
    state: dict[str, Any] = optimizer.state_dict()
    if set(state) == {"state", "param_groups"}:
        return optimizer_state(module, optimizer)
    return {"own": state}


def load_named_state(module: torch.nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        optimizer.load_state_dict(state["own"])
    else:
        load_optimizer_state(module, optimizer, state)
