"""NaN and infinity: whose loss, whose gradient, on which samples; and whether to train on it.

Every step looks at the loss of the global batch and at all gradients: at their norm, which clipping
computes anyway. A finite loss may have a gradient that is not (sqrt at 0, the norm of zeros, the
side of `torch.where` that is not taken), in one large tensor and nowhere else.

Who it was is found by computing this rank's micro-batches again, alone, before the optimizer has
seen the gradient. What an update makes of finite gradients is looked at before it is saved.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.checks import digest
from dtrain.train.checks.collective_trace import CHAIN, AloneError
from dtrain.train.checks.errors import NonFiniteError
from dtrain.train.checks.spoilt import Spoilt, all_finite, and_more
from dtrain.train.checks.train_state import GRADIENTS, PARAMETERS, TrainState
from dtrain.train.data.fetch import Fetched
from dtrain.train.data.loader import to_device
from dtrain.train.data.permutation import Ids
from dtrain.train.data.pipeline import Feed
from dtrain.train.loss import LossModule
from dtrain.train.seeding import RandomState

logger = logging.getLogger(__name__)

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
        subject: TrainState,
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
        self._kept = Spoilt(subject)
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
        error = self._explained(loss, norm)
        if self._policy == "stop":
            raise error
        if not self._warned or self._policy == "skip":
            self._warned = True
            logger.log(logging.INFO if error.collateral else logging.WARNING, "%s", error)
        if self._policy == "warn":
            return True
        return self._skip(error)

    def allows_saving(self, step: int) -> bool:
        """Whether a checkpoint of this moment could be trained on; called by all ranks.

        Raises:
            NonFiniteError: it could not, and the policy is not to warn.
        """
        spoilt = self._kept.found()
        everyone = collectives.gather_to_all(spoilt[:1])
        if not any(everyone):
            return True
        first = (spoilt or next(filter(None, everyone)))[0]
        error = NonFiniteError(
            f"after step {step}, {first} is not finite{and_more(spoilt)}, though all losses and "
            "gradients were: an update or a forward made it so. Nothing of it is saved; the "
            "checkpoints before it are intact",
            own=bool(spoilt),
        )
        if self._policy != "warn":
            raise error
        if self._ranks.is_rank_zero:
            logger.warning("no checkpoint after step %d: %s is not finite", step, first)
        return False

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
        if norm is not None:
            return not bool(torch.isfinite(norm))
        gradients = self._subject.tensors(GRADIENTS).values()
        return not all_finite([digest.local(each) for each in gradients])

    def _ids_read(self, fetched: Fetched) -> None:
        self._ids.append(fetched.samples)

    # -- whose it is, found out once ---------------------------------------------------------

    def _explained(self, loss: float, norm: torch.Tensor | None) -> NonFiniteError:
        bad = [i for i, each in enumerate(self._losses) if not math.isfinite(float(each))]
        if not math.isfinite(loss):
            what = f"the loss of step {self._step} is {loss}"
            if not bad:
                return NonFiniteError(f"{what}; this rank's own losses are finite", own=False)
            spoilt = self._kept.found([PARAMETERS])  # buffers may be so by this forward
            if spoilt:
                what += (
                    f" ({spoilt[0]} was not finite before it{and_more(spoilt)}, though all "
                    "gradients were: an earlier update made it so)"
                )
            return NonFiniteError(f"{what}: rank {self._ranks.rank}'s{self._on(bad[0])}", own=True)
        names = self._gradients()
        if not names and not self._cut:
            return NonFiniteError(
                f"the norm of the gradient of step {self._step} is {norm}, though each element of "
                "it is finite: it is too large to be clipped",
                own=True,
            )
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
            f"{what}: from {own[-1]} of rank {self._ranks.rank}{self._on(index, own[-1])}", own=True
        )

    def _gradients(self) -> list[str]:
        gradients = self._subject.tensors(GRADIENTS)
        return [name for name, each in gradients.items() if not all_finite([digest.local(each)])]

    def _own_gradients(self) -> tuple[int | None, list[str]]:
        """The first micro-batch whose gradients are not finite, and of which parameters."""
        parameters = {n: p for n, p in self._subject.parameters().items() if p.requires_grad}
        for index, ids in enumerate(self._ids):
            names = self._spoils(ids, parameters)
            if names:
                return index, names
        return None, []

    def _spoils(self, ids: Ids, parameters: dict[str, torch.nn.Parameter]) -> list[str]:
        """To which parameters these samples bring a gradient that is not finite."""
        with self._undisturbed():
            gradients = torch.autograd.grad(
                self._again(ids), list(parameters.values()), allow_unused=True
            )
        pairs = zip(parameters, gradients, strict=True)
        return [name for name, g in pairs if g is not None and not all_finite([g])]

    def _again(self, ids: Ids) -> torch.Tensor:
        """The sum of losses of these samples."""
        batch = to_device(self._feed.again(self._epoch, ids), self._device)
        total: torch.Tensor = self._loss(batch, len(ids))[0]
        return total

    def _on(self, index: int, parameter: str | None = None) -> str:
        """Where a micro-batch's samples come from, in words.

        Args:
            index: of the micro-batch.
            parameter: whose gradient is not finite; None: the loss is not.
        """
        if index >= len(self._ids):
            return ""
        ids = self._ids[index]
        shown = ", ".join(map(str, ids[:_MAX_SHOWN].tolist()))
        more = f" and {len(ids) - _MAX_SHOWN} more" if len(ids) > _MAX_SHOWN else ""
        text = f", micro-batch {index + 1} of {len(self._losses)}, samples {shown}{more}"
        guilty = self._guilty(ids, parameter) if self._feed.rereadable and not self._cut else []
        if 0 < len(guilty) < len(ids):
            alone = ", ".join(map(str, guilty[:_MAX_SHOWN]))
            text += f"\nalone, {'sample' if len(guilty) == 1 else 'samples'} {alone} gives it"
        return text

    def _guilty(self, ids: Ids, parameter: str | None) -> list[int]:
        """The samples whose loss, or gradient, alone is not finite, if they can be tried alone."""
        guilty = []
        try:
            for position in range(min(len(ids), _MAX_ALONE)):
                alone = ids[position : position + 1]
                if (
                    self._loss_spoilt(alone)
                    if parameter is None
                    else self._spoils(alone, {parameter: self._subject.parameters()[parameter]})
                ):
                    guilty.append(int(ids[position]))
        except Exception as error:  # a norm over one sample, say: then nobody knows which it was
            logger.debug("samples cannot be tried alone: %s", error)
            return []
        return guilty

    def _loss_spoilt(self, ids: Ids) -> bool:
        with self._undisturbed(), torch.no_grad():
            return not bool(torch.isfinite(self._again(ids)))

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
