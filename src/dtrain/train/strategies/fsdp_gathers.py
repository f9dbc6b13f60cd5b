"""Keeps FSDP's gathers in the same order on all ranks, even if ranks call different blocks.

FSDP gathers a block when its forward begins. If rank 0 calls expert 0 and rank 1 calls expert 1,
the two all-gathers are matched with one another. Each rank then computes with half of the other's
parameters. There is no error as long as the shapes are the same.

So the ranks agree on a block before they gather it. At the first block on which they do not agree,
the list that holds it becomes a whole list. All of its blocks are gathered together, now and at
the start of every later step. Their gradients are reduced together after the last backward. To
agree takes an all-reduce of 16 bytes per block. The ranks stop doing this after the first step if
every list is a chain: each block is called once, in sequence, on the very tensor that the block
before it returned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from dtrain.train.checkpoint.state import plain_name
from dtrain.train.checks.collective_trace import CHAIN

logger = logging.getLogger(__name__)

_END = 2**31
"""Used in place of a block's number: this rank's forward calls no further block."""


class BlockList:
    """The blocks that one `ModuleList` or `Sequential` holds."""

    def __init__(self, name: str, blocks: dict[str, FSDPModule]) -> None:
        self.name = name
        self.blocks = blocks
        self.whole = False
        """Whether all blocks are gathered together."""
        self.chained = True
        """Whether every forward so far was a chain of the blocks."""
        self._called = 0
        self._returned: Any = None

    def call(self, block: FSDPModule, given: Any) -> None:
        blocks = list(self.blocks.values())
        expected = blocks[self._called] if self._called < len(blocks) else None
        follows = self._called == 0 or _follows(given, self._returned)
        self.chained = self.chained and block is expected and follows
        self._called += 1

    def returned(self, outputs: Any) -> None:
        self._returned = outputs

    def end_forward(self) -> None:
        self.chained = self.chained and self._called == len(self.blocks)
        self._called, self._returned = 0, None


class Gathers:
    """Keeps the gathers of a sharded model in one order.

    Args:
        model: the model.
        blocks: the blocks that are gathered one at a time.
        root: the module that holds the rest of the parameters.
        reshards: whether a block is freed after its forward, and gathered again for its backward.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], root: FSDPModule, *, reshards: bool
    ) -> None:
        self._lists = _lists(model, set(blocks))
        self._reshards = reshards
        """Whether a block is freed after its forward."""
        self._everything = [root, *(b for each in self._lists for b in each.blocks.values())]
        self._meets = bool(self._lists)
        """Whether ranks agree on each block before they gather it."""
        self._learns = True
        self._in_forward = False
        numbered = [(each, *item) for each in self._lists for item in each.blocks.items()]
        self._numbered = [each for each, _, _ in numbered]
        for number, (each, name, block) in enumerate(numbered):
            self._watch(number, name, block, each)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Return a context for each forward of a step. All ranks run the same number."""
        for each in self._whole():
            gather(each.blocks.values())
        self._in_forward = True
        try:
            yield
            while self._meets and not self._agree(_END):
                pass
        finally:
            self._in_forward = False
            for each in self._lists:
                each.end_forward()

    def finish_backward(self) -> None:
        for each in self._whole():
            self.reduce(each.blocks.values())
        if self._learns:
            self._learns = False
            self._stop_agreeing_if_chained()

    def streams(self, block: nn.Module) -> bool:
        """Return whether a block is gathered for its own forward only."""
        listed = (each for each in self._lists if not each.whole)
        return self._reshards and any(block in each.blocks.values() for each in listed)

    def reduce(self, blocks: Iterable[FSDPModule]) -> None:
        """Sum the gradients of blocks over the ranks, block by block, and cut the parameters."""
        for block in blocks:
            _set_streaming(block, True, reshards=self._reshards)
            for group in _groups(block):
                group.post_backward()
                group.finalize_backward()

    def _whole(self) -> Iterable[BlockList]:
        return (each for each in self._lists if each.whole)

    def _watch(self, number: int, name: str, block: FSDPModule, own: BlockList) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._in_forward:
                return
            if self._learns:
                own.call(block, (args, kwargs))
            while self._meets and not own.whole and not self._agree(number):
                pass
            if not own.whole:
                CHAIN.add(f"fsdp gathers {name}")

        def after(module: nn.Module, args: Any, outputs: Any) -> None:
            if self._in_forward and self._learns:
                own.returned(outputs)

        # before FSDP's own hook, which gathers
        block.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        block.register_forward_hook(after)

    def _agree(self, number: int) -> bool:
        """Return whether all ranks have reached the same block.

        If they have not, the lists of these blocks become whole lists.
        """
        ends = torch.tensor([number, -number])
        with CHAIN.excluded():  # ranks may get here from different lines
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        highest, lowest = int(ends[0]), -int(ends[1])
        if highest == lowest:
            return True
        found = {self._numbered[each].name: self._numbered[each] for each in (lowest, highest)
                 if each != _END}  # fmt: skip
        for each in found.values():
            if not each.whole:
                self._make_whole(each)
        return False

    def _make_whole(self, each: BlockList) -> None:
        if dist.get_rank() == 0:
            logger.info(
                "ranks call different blocks of %s: fsdp gathers all of them in each step",
                each.name,
            )
        if not any(self._whole()):
            for unit in self._everything:  # prefetching follows the calls of one rank
                unit.set_modules_to_backward_prefetch([unit])
        each.whole = True
        CHAIN.add(f"fsdp gathers all of {each.name}")
        with CHAIN.excluded():
            gather(each.blocks.values())

    def _stop_agreeing_if_chained(self) -> None:
        """Stop agreeing, after the first step, if all lists are chains on all ranks."""
        mine = all(each.chained or each.whole for each in self._lists)
        chained = torch.tensor(int(mine))
        dist.all_reduce(chained, op=dist.ReduceOp.MIN)
        self._meets = not int(chained)


def gather(blocks: Iterable[FSDPModule]) -> None:
    """Gather blocks. They stay gathered until `Gathers.reduce`, and no backward reduces them."""
    for block in blocks:
        _set_streaming(block, False, reshards=False)
        block.unshard()


def _lists(model: nn.Module, blocks: set[nn.Module]) -> list[BlockList]:
    """Return the blocks by the module that holds them: first those in lists and sequences."""
    found = []
    holders = list(model.named_modules())
    holders.sort(key=lambda each: not isinstance(each[1], nn.ModuleList | nn.Sequential))
    for name, holder in holders:
        name = plain_name(name)
        held = {
            f"{name}.{key}" if name else key: child
            for key, child in holder.named_children()
            if child in blocks
        }
        blocks -= set(held.values())
        if held:
            found.append(BlockList(name or "the model", held))
    return found


def _set_streaming(block: FSDPModule, streams: bool, *, reshards: bool) -> None:
    block.set_reshard_after_forward(streams and reshards, recurse=False)
    block.set_reshard_after_backward(streams, recurse=False)
    block.set_requires_gradient_sync(streams, recurse=False)


def _groups(block: FSDPModule) -> Iterable[Any]:
    state = block._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [each for each in groups if each is not None]  # None: the blocks hold all parameters


def _follows(given: Any, returned: Any) -> bool:
    """Return whether a block receives exactly what another block returned.

    A part of it does not count: a block that gets a part (the rows that are routed to it) may get
    nothing in a later step, and then it is not called.
    """
    memory = _memory(returned)
    return not memory.isdisjoint(_memory(given))


def _memory(values: Any) -> set[tuple[int, tuple[int, ...]]]:
    tensors = [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]
    return {(each.data_ptr(), tuple(each.shape)) for each in tensors if each.numel()}
