"""Lightning's strategies over dtrain's processes; they launch nothing and join no group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from dtrain.integrations.lightning.compat import DDPStrategy, after, pl
from dtrain.integrations.lightning.environment import ExternalProcesses
from dtrain.train.checkpoint.state import (
    as_cut,
    gathered,
    is_sharded,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dtrain.train.checks.initial_state import compare_model
from dtrain.train.context import TrainContext
from dtrain.train.contract import refuse_wrapped
from dtrain.train.seeding import derive_seed, seed_everything
from dtrain.train.strategies.fsdp_sharded import Sharded


class LoopsStrategy(ExternalProcesses, DDPStrategy):
    """What is the same whatever wraps the module.

    DDPStrategy is its base for barriers, broadcasts and reductions of metrics.

    Args:
        context: of the training.
        weighed: is given the loss of a micro-batch and gives what is to be trained on, whose
            gradient is averaged over the processes.
        loaded: what Lightning is given for the file that it goes on from.
    """

    def __init__(
        self,
        context: TrainContext,
        weighed: Callable[[torch.Tensor], torch.Tensor],
        loaded: dict[str, Any] | None,
    ) -> None:
        super().__init__(context.ranks, broadcast_buffers=False)
        self._context = context
        self._weighed = weighed
        self._loaded = loaded

    def whole(self) -> AbstractContextManager[None]:
        """A context in which every process holds all parameters, as for evaluation."""
        return nullcontext()

    def close(self) -> None:
        """Let go of the module's wrapper."""
        self.model = None

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        seed_everything(derive_seed("optimizer", self._context.spec.seed))
        super().setup_optimizers(trainer)

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weigh the loss, of manual optimization too, by the samples that it is a mean of."""
        loss = self._weighed(closure_loss)
        result: torch.Tensor = super().backward(loss, optimizer, *args, **kwargs)
        return result

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

    def _compare(self) -> None:
        """Before the processes' modules are made one, which is done without a word."""
        module = self.lightning_module
        if is_sharded(module) or self._context.shards_model:  # DDP within DDP is the module's own
            refuse_wrapped(module, type(module).__name__)
        compare_model(module, broadcast=self._context.spec.checks.init == "broadcast")


class LoopsDDP(LoopsStrategy):
    """DDP over several processes, the plain module in one.

    Buffers are rank 0's after every step, as under dtrain's own strategies, instead of before
    every forward.
    """

    def _setup_model(self, model: torch.nn.Module) -> Any:
        return model if self.world_size == 1 else super()._setup_model(model)

    def setup(self, trainer: pl.Trainer) -> None:
        if self.world_size == 1:
            super(DDPStrategy, self).setup(trainer)  # DDP's own wants a group
        else:
            self._compare()
            wish = self._context.spec.lightning.find_unused
            # of several optimizers each leaves the others' parameters out
            manual = not self.lightning_module.automatic_optimization
            self._ddp_kwargs["find_unused_parameters"] = manual if wish is None else wish
            super().setup(trainer)

    def on_exception(self, exception: BaseException) -> None:
        if "finished reduction in the prior iteration" in str(exception):
            exception.add_note(
                "some parameters had no part in the loss of the last step: with "
                "lightning.find_unused: true DDP looks for them"
            )


class LoopsFSDP(LoopsStrategy):
    """FSDP2, as under dtrain's own strategy, over two processes or more.

    Lightning's FSDPStrategy makes parameters flat, which leaves no names to compare, save and
    resume by, and does not do manual optimization (github.com/Lightning-AI/pytorch-lightning,
    issue 19685). Here such a step runs on whole parameters, resharded during updates.
    """

    _made: Sharded | None = None
    _manual = False
    _reduces = True
    """Whether this backward is followed by an update."""
    _in_step = False
    """Whether a step of manual optimization runs, on whole parameters."""

    @property
    def _sharded(self) -> Sharded:
        assert self._made is not None
        return self._made

    def whole(self) -> AbstractContextManager[None]:
        return self._sharded.whole()

    def close(self) -> None:
        super().close()
        self._made = None

    def setup(self, trainer: pl.Trainer) -> None:
        if self._made is None and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: torch.nn.Module) -> Any:
        """Cut the module, unless that was done for another of the Trainer's loops."""
        module = self.lightning_module
        if self._made is None:
            self._compare()
            self._manual = not module.automatic_optimization
            size = self.world_size
            self._made = Sharded(
                module, module, self.root_device, size, divide_by=size, manual=self._manual
            )
            if self._manual:
                for name in ("toggle_optimizer", "untoggle_optimizer"):
                    after(module, name, self._made.toggled)
        return model if self._manual else self._made.root

    def teardown(self) -> None:
        """Parts stay where they are."""
        assert self.accelerator is not None
        self.accelerator.teardown()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self._reduces = False
        try:
            yield
        finally:
            self._reduces = True

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self._manual:
            with self._sharded.forward(reduces=self._reduces):
                return super().training_step(*args, **kwargs)
        self._sharded.unshard()
        self._in_step = True
        result = super().training_step(*args, **kwargs)
        self._in_step = False
        self._sharded.reshard()
        return result

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        result = super().backward(closure_loss, optimizer, *args, **kwargs)
        if self._reduces and self._manual:
            self._sharded.reduce()
        elif self._reduces:
            self._sharded.finish_backward()
            self._forget_unused()
        return result

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        if not self._manual:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        def then_reshard() -> Any:
            self._sharded.unshard()  # an optimizer may call it again after an update
            result = closure()
            self._sharded.reshard()
            return result

        result = super().optimizer_step(optimizer, then_reshard, model, **kwargs)
        if self._in_step:
            self._sharded.unshard()
        return result

    def _forget_unused(self) -> None:
        """Take the gradient of zero from parameters that no process used."""
        usage = self._sharded.usage
        flags = torch.tensor(usage.flags())
        dist.all_reduce(flags)
        usage.forget_unused(flags.tolist())
        usage.clear()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return it whole on rank 0, empty elsewhere. Called by all ranks."""
        state = model_state(self.lightning_module)
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return it whole on rank 0, empty elsewhere. Called by all ranks."""
        state: dict[str, Any] = tree_map(gathered, super().optimizer_state(optimizer))
        return state if self.is_global_zero else {}


def named_state(module: torch.nn.Module, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict()` by parameter name; as it is of one not torch's kind."""
    if set(state) == {"state", "param_groups"}:
        return optimizer_state(module, optimizer, state)
    return {"own": state}


def load_named_state(module: torch.nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        optimizer.load_state_dict(state["own"])
        for parameter, values in optimizer.state.items():
            values.update({key: as_cut(each, parameter) for key, each in values.items()})
    else:
        load_optimizer_state(module, optimizer, state)
