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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dtrain.errors import DtrainError
from dtrain.job.spec import JobSpec
from dtrain.ranks import RankInfo
from dtrain.train import collectives
from dtrain.train.checks import digest
from dtrain.train.checks.collective_trace import CHAIN, AloneError
from dtrain.train.checks.spoilt import Spoilt, all_finite, and_more
from dtrain.train.checks.train_state import GRADIENTS, PARAMETERS, TrainState
from dtrain.train.data.loader import to_device
from dtrain.train.data.permutation import Ids
from dtrain.train.data.pipeline import Feed
from dtrain.train.loss import LossModule
from dtrain.train.seeding import RandomState
from dtrain.words import numbered

logger = logging.getLogger(__name__)

_MAX_ALONE = 256
"""Samples that are tried one by one."""


class NonFiniteError(DtrainError):
    """A loss, a gradient or something that is kept between steps is NaN or infinite.

    Args:
        message: what is not finite, and of which step.
        own: whether the cause is on this rank, as far as is known.
        code: as for `DtrainError`.
    """

    code = "check.not-finite"

    def __init__(self, message: str, own: bool, *, code: str = "") -> None:
        super().__init__(message, code=code)
        self.collateral = not own

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), not self.collateral), self.__dict__


class FiniteGuard:
    """Decides, before each update, whether its loss and gradients are numbers."""

    def __init__(
        self,
        subject: TrainState,
        loss: LossModule | None,
        feed: Feed | None,
        spec: JobSpec,
        ranks: RankInfo,
        device: torch.device,
    ) -> None:
        self._subject = subject
        self._policy = spec.checks.on_nan
        self._max_skipped = spec.checks.max_skipped
        self._scaled = spec.train.precision == "fp16"
        self._ranks = ranks
        self._cut = subject.is_cut()
        self._step = 0
        self._search = _Search(subject, loss, feed, device)
        self._buffers: dict[str, torch.Tensor] = {}
        self._warned = False
        self._kept = Spoilt(subject)
        self.skipped_in_a_row = 0

    def begin(self, step: int, epoch: int) -> None:
        """Before the first forward of a step, counted from 1."""
        self._step = step
        self._search.begin(epoch)
        if self._policy == "skip":  # a forward of NaN spoils BatchNorm's statistics for good
            named = self._subject.model.named_buffers()
            self._buffers = {name: each.clone() for name, each in named}

    def note(self, loss: torch.Tensor) -> None:
        self._search.losses.append(loss.detach())

    def gradients_are_finite(self) -> bool:
        """Whether those of all ranks are, once they are reduced; called by all ranks."""
        found = self._found(None)
        return not (self._of_any(found) if self._cut else found)

    def own_loss(self) -> float:
        """The sum of this process's losses in this step."""
        return float(sum(float(each) for each in self._search.losses))

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
        if self._policy == "skip" or self._cut:
            found = self._of_any(found)
        if not found:
            self.skipped_in_a_row = 0
            return True
        finite_loss = math.isfinite(loss)
        error = self._gradient_error(norm) if finite_loss else self._loss_error(loss)
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
            code="check.state-not-finite",
        )
        if self._policy != "warn":
            raise error
        if self._ranks.is_rank_zero:
            logger.warning("no checkpoint after step %d: %s is not finite", step, first)
        return False

    def _of_any(self, found: bool) -> bool:
        if not collectives.in_group():
            return found
        flag = torch.tensor(int(found))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _skip(self, error: NonFiniteError) -> bool:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self._max_skipped:
            raise NonFiniteError(
                f"{self._max_skipped} steps in a row were skipped already "
                f"(checks.max_skipped):\n{error}",
                own=not error.collateral,
                code="check.too-many-skipped",
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

    def _loss_error(self, loss: float) -> NonFiniteError:
        what = f"the loss of step {self._step} is {loss}"
        culprit = self._search.of_loss()
        if culprit is None:
            return NonFiniteError(f"{what}; this rank's own losses are finite", own=False)
        spoilt = self._kept.found([PARAMETERS])  # buffers may be so by this forward
        if spoilt:
            what += (
                f" ({spoilt[0]} was not finite before it{and_more(spoilt)}, though all "
                "gradients were: an earlier update made it so)"
            )
        return NonFiniteError(f"{what}: rank {self._ranks.rank}'s{culprit}", own=True)

    def _gradient_error(self, norm: torch.Tensor | None) -> NonFiniteError:
        gradient = f"the gradient of step {self._step}"
        gradients = self._subject.tensors(GRADIENTS)
        names = [n for n, each in gradients.items() if not all_finite([digest.local(each)])]
        if not names and not self._cut:
            return NonFiniteError(
                f"the norm of {gradient} is {norm}, though each element of it is finite: it is too "
                "large to be clipped",
                own=True,
                code="check.gradient-too-large",
            )
        if not names:
            return NonFiniteError(f"{gradient} is not finite on another rank", own=False)
        what = (
            f"{gradient} is not finite in {len(names)} of {len(self._subject.parameters())} "
            f"parameters, nearest to the loss {names[-1]}"
        )
        try:
            culprit = self._search.of_gradient()
        except _UnknownSourceError as error:
            return NonFiniteError(
                f"{what}; which rank it comes from is not known: {error}", own=True
            )
        if culprit is None:
            return NonFiniteError(f"{what}; this rank's own gradients are finite", own=False)
        source = f"from {culprit.parameter} of rank {self._ranks.rank}"
        return NonFiniteError(f"{what}: {source}{culprit}", own=True)


class _UnknownSourceError(Exception):
    """Nobody can tell whose a gradient is; says why."""


@dataclass(frozen=True)
class _Culprit:
    """A micro-batch of this rank that has a loss or a gradient that is not finite."""

    number: int
    num_micro_batches: int
    samples: list[int]
    """Empty where they are not known."""
    parameter: str | None
    """The one whose gradient it is; None: the loss is not finite."""
    alone: list[int]
    """Samples that give it without the others; empty where that is not known."""

    def __str__(self) -> str:
        if not self.samples:
            return ""
        samples = numbered("sample", self.samples)
        text = f", micro-batch {self.number} of {self.num_micro_batches}, {samples}"
        if 0 < len(self.alone) < len(self.samples):
            gives = "gives" if len(self.alone) == 1 else "give"
            text += f"\ncomputed alone, {numbered('sample', self.alone)} {gives} it"
        return text


class _Search:
    """Finds this rank's part in what is not finite, by computing its micro-batches again, alone."""

    def __init__(
        self,
        subject: TrainState,
        loss: LossModule | None,
        feed: Feed | None,
        device: torch.device,
    ) -> None:
        self._subject = subject
        self._loss = loss
        self._feed = feed
        self._device = device
        self._epoch = 0
        self._ids: list[Ids] = []
        self.losses: list[torch.Tensor] = []
        """The sum of each micro-batch of this step."""
        self._why_not = ""
        if subject.is_cut():
            self._why_not = "parameters are cut"
        elif loss is None or feed is None:
            self._why_not = "this training step is not computed a second time"
        elif not feed.rereadable:
            self._why_not = "a stream cannot be read again"
        if feed is not None:
            feed.watchers.append(lambda fetched: self._ids.append(fetched.samples))

    def begin(self, epoch: int) -> None:
        self._epoch, self._ids, self.losses = epoch, [], []

    def of_loss(self) -> _Culprit | None:
        """The first micro-batch whose loss is not finite."""
        losses = enumerate(self.losses)
        bad = next((i for i, each in losses if not math.isfinite(float(each))), None)
        return None if bad is None else self._culprit(bad, None)

    def of_gradient(self) -> _Culprit | None:
        """The first micro-batch whose own gradient is not finite.

        Raises:
            _UnknownSourceError: that cannot be found out.
        """
        if self._why_not:
            raise _UnknownSourceError(self._why_not)
        parameters = {n: p for n, p in self._subject.parameters().items() if p.requires_grad}
        try:
            for index, ids in enumerate(self._ids):
                names = self._spoils(ids, parameters)
                if names:
                    return self._culprit(index, names[-1])
        except AloneError as error:
            raise _UnknownSourceError(f"the loss calls {error} of torch.distributed") from None
        return None

    def _culprit(self, index: int, parameter: str | None) -> _Culprit:
        # a manual step has several losses of one micro-batch
        last = len(self._ids) - 1
        ids = self._ids[min(index, last)] if self._ids else np.zeros(0, dtype=np.int64)
        alone = [] if self._why_not else self._alone(ids, parameter)
        return _Culprit(index + 1, len(self.losses), ids.tolist(), parameter, alone)

    def _alone(self, ids: Ids, parameter: str | None) -> list[int]:
        """The samples whose loss, or gradient, alone is not finite, if they can be tried alone."""
        singles = [ids[position : position + 1] for position in range(min(len(ids), _MAX_ALONE))]
        try:
            if parameter is None:
                return [int(one[0]) for one in singles if self._loss_spoilt(one)]
            only = {parameter: self._subject.parameters()[parameter]}
            return [int(one[0]) for one in singles if self._spoils(one, only)]
        except Exception as error:  # a norm over one sample, say: then nobody knows which it was
            logger.debug("samples cannot be tried alone: %s", error)
            return []

    def _spoils(self, ids: Ids, parameters: dict[str, torch.nn.Parameter]) -> list[str]:
        """To which parameters these samples bring a gradient that is not finite."""
        with self._undisturbed():
            gradients = torch.autograd.grad(
                self._again(ids), list(parameters.values()), allow_unused=True
            )
        pairs = zip(parameters, gradients, strict=True)
        return [name for name, g in pairs if g is not None and not all_finite([g])]

    def _again(self, ids: Ids) -> torch.Tensor:
        assert self._feed is not None
        assert self._loss is not None
        batch = to_device(self._feed.again(self._epoch, ids), self._device)
        total: torch.Tensor = self._loss(batch, len(ids))[0]
        return total

    def _loss_spoilt(self, ids: Ids) -> bool:
        with self._undisturbed(), torch.no_grad():
            return not bool(torch.isfinite(self._again(ids)))

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave random numbers and buffers as they were, and the other ranks alone."""
        random = RandomState.capture()
        buffers = {name: each.clone() for name, each in self._subject.model.named_buffers()}
        try:
            CHAIN.offline = True
            with torch.enable_grad():
                yield
        finally:
            CHAIN.offline = False
            random.restore()
            with torch.no_grad():
                for name, buffer in self._subject.model.named_buffers():
                    buffer.copy_(buffers[name])
