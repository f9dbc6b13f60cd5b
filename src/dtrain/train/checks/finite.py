"""NaN and infinity: whose loss, whose gradient, on which samples; and whether to train on it.

Every step looks at the loss of the global batch, at gradients of up to 16,384 elements (biases and
norms: they take in what any layer's output hands back, so what is wrong there shows), and at the
gradient's norm where clipping computes it. All gradients are looked at in every `checks.every`-th
step, and in every step with `on_nan: skip`.

Who it was is found by computing this rank's micro-batches again, alone, before the optimizer has
seen the gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.checks import digest
from dtrain.train.checks.chain import CHAIN, AloneError
from dtrain.train.checks.errors import NonFiniteError
from dtrain.train.checks.subject import GRADIENTS, Subject
from dtrain.train.data.feed import Feed
from dtrain.train.data.fetch import Fetched
from dtrain.train.data.loader import to_device
from dtrain.train.data.permutation import Ids
from dtrain.train.loss import LossModule
from dtrain.train.seeding import RandomState

logger = logging.getLogger(__name__)

_SMALL = 16_384
_MAX_SHOWN = 12
_MAX_ALONE = 256
"""Samples that are tried one by one."""


class FiniteGuard:
    """Decides, before each update, whether its loss and gradients are numbers.

    Args:
        subject: what is trained.
        loss: the task's loss over the model.
        feed: the data, to read a micro-batch again.
        spec: the job.
        ranks: the place of this process.
        device: of the model.
    """

    def __init__(
        self,
        subject: Subject,
        loss: LossModule,
        feed: Feed,
        spec: JobSpec,
        ranks: RankInfo,
        device: torch.device,
    ) -> None:
        self._subject = subject
        self._loss = loss
        self._feed = feed
        self._policy = spec.checks.on_nan
        self._every = spec.checks.every
        self._max_skipped = spec.checks.max_skipped
        self._scaled = spec.train.precision == "fp16"
        self._ranks = ranks
        self._device = device
        self._cut = subject.is_cut()
        self._step = 0
        self._epoch = 0
        self._ids: list[Ids] = []
        self._losses: list[torch.Tensor] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._warned = False
        self.skipped_in_a_row = 0
        feed.watchers.append(self._ids_read)

    def begin(self, step: int, epoch: int) -> None:
        """Before the first forward of a step, counted from 1."""
        self._step, self._epoch = step, epoch
        self._ids, self._losses = [], []
        if self._policy == "skip":  # a forward of NaN spoils BatchNorm's statistics for good
            named = self._subject.model.named_buffers()
            self._buffers = {name: each.clone() for name, each in named}

    def note(self, loss: torch.Tensor) -> None:
        """The sum of losses of a micro-batch of this rank."""
        self._losses.append(loss.detach())

    def accepts(self, loss: float, norm: torch.Tensor | None) -> bool:
        """Whether to update with the reduced gradients; called by all ranks.

        Args:
            loss: of the whole global batch.
            norm: of the reduced gradients, where it is known.

        Returns:
            False to leave out the step, on all ranks.

        Raises:
            NonFiniteError: something is NaN or infinite and the policy is to stop, or too many
                steps in a row were skipped.
        """
        found = not math.isfinite(loss) or self._found(norm)
        # elsewhere all ranks see the same reduced gradient
        if (self._policy == "skip" or self._cut) and collectives.in_group():
            flag = torch.tensor(int(found))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            found = bool(flag)
        if not found:
            self.skipped_in_a_row = 0
            return True
        error = self._explained(loss)
        if self._policy == "stop":
            raise error
        if not self._warned or self._policy == "skip":
            self._warned = True
            logger.log(logging.INFO if error.collateral else logging.WARNING, "%s", error)
        if self._policy == "warn":
            return True
        return self._skip(error)

    def _skip(self, error: NonFiniteError) -> bool:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self._max_skipped:
            raise NonFiniteError(
                f"{self._max_skipped} steps in a row were skipped already "
                f"(checks.max_skipped):\n{error}",
                own=not error.collateral,
            )
        for name, buffer in self._subject.model.named_buffers():
            buffer.copy_(self._buffers[name])
        return False

    def _found(self, norm: torch.Tensor | None) -> bool:
        if self._scaled:
            return False  # the loss scaler's own business
        if norm is not None and not bool(torch.isfinite(norm)):
            return True
        everything = self._policy == "skip" or (self._every and self._step % self._every == 0)
        gradients = [
            digest.local(each)
            for each in self._subject.tensors(GRADIENTS).values()
            if everything or each.numel() <= _SMALL
        ]
        return not _all_finite(gradients)

    def _ids_read(self, fetched: Fetched) -> None:
        self._ids.append(fetched.samples)

    # -- whose it is, found out once ---------------------------------------------------------

    def _explained(self, loss: float) -> NonFiniteError:
        bad = [i for i, each in enumerate(self._losses) if not math.isfinite(float(each))]
        if not math.isfinite(loss):
            what = f"the loss of step {self._step} is {loss}"
            if not bad:
                return NonFiniteError(f"{what}; this rank's own losses are finite", own=False)
            return NonFiniteError(f"{what}: rank {self._ranks.rank}'s{self._on(bad[0])}", own=True)
        names = self._gradients()
        if not names:
            return NonFiniteError(
                f"the gradient of step {self._step} is not finite on another rank", own=False
            )
        what = (
            f"the gradient of step {self._step} is not finite in {len(names)} of "
            f"{len(self._subject.parameters())} parameters, nearest to the loss {names[-1]}"
        )
        if self._cut or not self._feed.rereadable:
            why = "parameters are cut" if self._cut else "a stream cannot be read again"
            return NonFiniteError(f"{what}; whose it is is not known: {why}", own=True)
        try:
            index, own = self._own_gradients()
        except AloneError as error:
            why = f"the loss calls {error} of torch.distributed"
            return NonFiniteError(f"{what}; whose it is is not known: {why}", own=True)
        if index is None:
            return NonFiniteError(f"{what}; this rank's own gradients are finite", own=False)
        return NonFiniteError(
            f"{what}: from {own[-1]} of rank {self._ranks.rank}{self._on(index)}", own=True
        )

    def _gradients(self) -> list[str]:
        gradients = self._subject.tensors(GRADIENTS)
        return [name for name, each in gradients.items() if not _all_finite([digest.local(each)])]

    def _own_gradients(self) -> tuple[int | None, list[str]]:
        """The first micro-batch whose gradients are not finite, and of which parameters."""
        parameters = {n: p for n, p in self._subject.parameters().items() if p.requires_grad}
        for index, ids in enumerate(self._ids):
            with self._undisturbed():
                gradients = torch.autograd.grad(
                    self._again(ids), list(parameters.values()), allow_unused=True
                )
            pairs = zip(parameters, gradients, strict=True)
            names = [name for name, g in pairs if g is not None and not _all_finite([g])]
            if names:
                return index, names
        return None, []

    def _again(self, ids: Ids) -> torch.Tensor:
        """The sum of losses of these samples."""
        batch = to_device(self._feed.again(self._epoch, ids), self._device)
        total: torch.Tensor = self._loss(batch, len(ids))[0]
        return total

    def _on(self, index: int) -> str:
        """Where a micro-batch's samples come from, in words."""
        if index >= len(self._ids):
            return ""
        ids = self._ids[index]
        shown = ", ".join(map(str, ids[:_MAX_SHOWN].tolist()))
        more = f" and {len(ids) - _MAX_SHOWN} more" if len(ids) > _MAX_SHOWN else ""
        text = f", micro-batch {index + 1} of {len(self._losses)}, samples {shown}{more}"
        guilty = self._guilty(ids) if self._feed.rereadable and not self._cut else []
        if 0 < len(guilty) < len(ids):
            alone = ", ".join(map(str, guilty[:_MAX_SHOWN]))
            text += f"\nalone, {'sample' if len(guilty) == 1 else 'samples'} {alone} gives it"
        return text

    def _guilty(self, ids: Ids) -> list[int]:
        """The samples whose loss alone is not finite, if they can be tried alone."""
        guilty = []
        try:
            for position in range(min(len(ids), _MAX_ALONE)):
                with self._undisturbed(), torch.no_grad():
                    loss = self._again(ids[position : position + 1])
                if not bool(torch.isfinite(loss)):
                    guilty.append(int(ids[position]))
        except Exception as error:  # a norm over one sample, say: then nobody knows which it was
            logger.debug("samples cannot be tried alone: %s", error)
            return []
        return guilty

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave random numbers and buffers as they were, and the other ranks alone."""
        random = RandomState.capture()
        buffers = {name: each.clone() for name, each in self._subject.model.named_buffers()}
        try:
            CHAIN.alone = True
            with torch.enable_grad():
                yield
        finally:
            CHAIN.alone = False
            random.restore()
            with torch.no_grad():
                for name, buffer in self._subject.model.named_buffers():
                    buffer.copy_(buffers[name])


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether all elements are numbers.

    The 2-norm is NaN or infinite if any element is, and takes a tenth of the time of `isfinite`; it
    overflows too, so it only acquits.
    """
    tensors = [each for each in tensors if each.numel()]
    if not tensors:
        return True
    norms: Any = torch._foreach_norm(tensors)
    if len({each.dtype for each in norms}) > 1:
        norms = [each.float() for each in norms]
    if bool(torch.isfinite(torch.stack(norms)).all()):
        return True
    return all(bool(torch.isfinite(each).all()) for each in tensors)
