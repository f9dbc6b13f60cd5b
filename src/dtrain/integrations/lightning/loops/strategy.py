"""Lightning's strategies for dtrain's processes; they launch nothing and join no group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from dtrain.errors import UsageError
from dtrain.integrations.lightning.compat import DDPStrategy, after, pl
from dtrain.integrations.lightning.environment import ExternalProcesses
from dtrain.train.checkpoint.parts import is_part, whole
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
from dtrain.words import few


class LoopsStrategy(ExternalProcesses, DDPStrategy):
    """The common base of the strategies for Lightning's own loops.

    DDPStrategy is its base for barriers, broadcasts and reductions of metrics.

    Args:
        context: the context of the training.
        weighed: a function that weighs the loss of a micro-batch. The gradient of its result is
            averaged over the processes.
        loaded: the content of the checkpoint file to continue from, in Lightning's form.
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
        """Return a context in which every process holds all parameters, for evaluation."""
        return nullcontext()

    @contextmanager
    def keeping_shards(self) -> Iterator[None]:
        """Return a context in which states have sharded tensors, as dtrain's checkpoints do."""
        yield

    def close(self) -> None:
        """Release the module's wrapper."""
        self.model = None

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        seed_everything(derive_seed("optimizer", self._context.spec.seed))
        super().setup_optimizers(trainer)

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Weigh the loss by its number of samples, in manual optimization too."""
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
        """Compare the processes' modules before Lightning makes them equal, which it does silently.

        Also refuse a module that is wrapped already.
        """
        module = self.lightning_module
        if is_sharded(module) or self._context.shards_model:  # DDP within DDP is the module's own
            refuse_wrapped(module, type(module).__name__)
        compare_model(module, self._context.spec)


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
            find_unused = self._context.spec.lightning.find_unused
            if find_unused is None:
                # with several optimizers, each step leaves the others' parameters unused
                find_unused = not self.lightning_module.automatic_optimization
            self._ddp_kwargs["find_unused_parameters"] = find_unused
            super().setup(trainer)

    def on_exception(self, exception: BaseException) -> None:
        if "finished reduction in the prior iteration" in str(exception):
            exception.add_note(
                "some parameters had no part in the loss of the last step: with "
                "lightning.find_unused: true DDP looks for them"
            )


class LoopsFSDP(LoopsStrategy):
    """FSDP2 of dtrain's own strategy, over two processes or more.

    Lightning's FSDPStrategy flattens parameters, which leaves no names for comparing, saving and
    resuming. It does not support manual optimization (github.com/Lightning-AI/pytorch-lightning,
    issue 19685). Here a manual step runs on whole parameters, which are resharded during updates.
    """

    _made: Sharded | None = None
    _manual = False
    _reduces = True
    """True if an update follows this backward."""
    _keeps_shards = False
    _in_step = False
    """True while a step of manual optimization runs, on whole parameters."""

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
        """Shard the module, unless that was done for another of the Trainer's loops."""
        module = self.lightning_module
        if self._made is None:
            self._compare()
            self._manual = not module.automatic_optimization
            size = self.world_size
            self._made = Sharded(
                module,
                module,
                self.root_device,
                size,
                self._context.spec.fsdp,
                divide_by=size,
                manual=self._manual,
            )
            if self._manual:
                for name in ("toggle_optimizer", "untoggle_optimizer"):
                    after(module, name, self._made.toggled)
        self._refuse_unsharded()
        return model if self._manual else self._made.root

    def _refuse_unsharded(self) -> None:
        """Raise if layers were made after the module was sharded: ranks would drift apart."""
        named = self.lightning_module.named_parameters()
        unsharded = [name for name, parameter in named if not is_part(parameter)]
        if unsharded:
            raise UsageError(
                f"{type(self.lightning_module).__name__} makes layers again in setup(), which "
                f"Lightning calls for each of fit and lightning.also_run: {few(unsharded)}; "
                "strategy 'fsdp' has sharded the layers of the first call; make them only if they "
                "do not exist yet",
                code="lightning.layers-made-again",
            )

    def teardown(self) -> None:
        """Leave the parts on their device."""
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
            self._sharded.unshard()  # an optimizer may call this closure again after an update
            result = closure()
            self._sharded.reshard()
            return result

        result = super().optimizer_step(optimizer, then_reshard, model, **kwargs)
        if self._in_step:
            self._sharded.unshard()
        return result

    def _forget_unused(self) -> None:
        """Remove the zero gradients of parameters that no process used."""
        usage = self._sharded.usage
        flags = torch.tensor(usage.flags())
        dist.all_reduce(flags)
        usage.forget_unused(flags.tolist())
        usage.clear()

    @contextmanager
    def keeping_shards(self) -> Iterator[None]:
        self._keeps_shards = True
        try:
            yield
        finally:
            self._keeps_shards = False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = model_state(self.lightning_module, keep_vars=self._keeps_shards)
        return self._whole(state)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return self._whole(super().optimizer_state(optimizer))

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the whole state on rank 0, and an empty one elsewhere. Called by all ranks."""
        if self._keeps_shards:
            return state
        state = tree_map(gathered, state)
        return state if self.is_global_zero else {}


def named_state(module: torch.nn.Module, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's `state_dict()` by parameter name; keep one not of torch's kind."""
    if set(state) == {"state", "param_groups"}:
        return optimizer_state(module, optimizer, state)
    return {"own": state}


def load_named_state(module: torch.nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        optimizer.load_state_dict(whole(state["own"]))
        for parameter, values in optimizer.state.items():
            values.update({key: as_cut(each, parameter) for key, each in values.items()})
    else:
        load_optimizer_state(module, optimizer, state)
