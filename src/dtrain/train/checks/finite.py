"""Detection of NaN and infinity: find the loss or gradient and its samples, and apply the policy.

Every step checks the loss of the global batch and all gradients, by the norm that clipping computes
anyway. A finite loss may have a gradient that is not finite (sqrt at 0, the norm of zeros, the
unused side of `torch.where`). It may be in one large tensor only.

To find the source, each rank computes its micro-batches again, alone, before the optimizer uses
the gradient. The state that an update makes from finite gradients is checked before it is saved.
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
from dtrain.train import collectives, digest
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
"""The largest number of samples that are computed one by one."""


class NonFiniteError(DtrainError):
    """Raised when a loss, a gradient or state that is kept between steps is NaN or infinite.

    Args:
        message: names the value that is not finite, and the step.
        own: whether the cause is on this rank, as far as it is known.
        code: as for `DtrainError`.
    """

    code = "check.not-finite"

    def __init__(self, message: str, own: bool, *, code: str = "") -> None:
        super().__init__(message, code=code)
        self.collateral = not own

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), not self.collateral), self.__dict__


class FiniteGuard:
    """Decides, before each update, whether its loss and gradients are finite."""

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
        """Begin a step, before its first forward. Steps are counted from 1."""
        self._step = step
        self._search.begin(epoch)
        if self._policy == "skip":  # a forward of NaN makes BatchNorm's statistics NaN forever
            named = self._subject.model.named_buffers()
            self._buffers = {name: each.clone() for name, each in named}

    def note(self, loss: torch.Tensor) -> None:
        self._search.losses.append(loss.detach())

    def gradients_are_finite(self) -> bool:
        """Return whether the reduced gradients of all ranks are finite. All ranks must call it."""
        found = self._found(None)
        return not (self._of_any(found) if self._cut else found)

    def own_loss(self) -> float:
        """Return the sum of this process's losses in this step."""
        return float(sum(float(each) for each in self._search.losses))

    def accepts(self, loss: float, norm: torch.Tensor | None) -> bool:
        """Return whether to update with the reduced gradients. All ranks must call it.

        Args:
            loss: the loss of the whole global batch.
            norm: the norm of the reduced gradients, if it is known.

        Returns:
            False to skip the step, on all ranks.

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
        """Return whether the state may be saved as a checkpoint. All ranks must call it.

        Raises:
            NonFiniteError: something in the state is not finite, and the policy is not to warn.
        """
        spoilt = self._kept.found()
        everyone = collectives.gather_to_all(spoilt[:1])
        if not any(everyone):
            return True
        first = (spoilt or next(filter(None, everyone)))[0]
        error = NonFiniteError(
            f"after step {step}, {first} is not finite{and_more(spoilt)}, although all losses and "
            "gradients were finite: an update or a forward changed it. No checkpoint is saved; the "
            "earlier checkpoints are intact",
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
            return False  # the loss scaler handles it
        if norm is not None:
            return not bool(torch.isfinite(norm))
        gradients = self._subject.tensors(GRADIENTS).values()
        return not all_finite([digest.local(each) for each in gradients])

    def _loss_error(self, loss: float) -> NonFiniteError:
        what = f"the loss of step {self._step} is {loss}"
        culprit = self._search.of_loss()
        if culprit is None:
            return NonFiniteError(f"{what}; this rank's own losses are finite", own=False)
        spoilt = self._kept.found([PARAMETERS])  # this forward may have changed buffers
        if spoilt:
            what += (
                f" ({spoilt[0]} was not finite before this step{and_more(spoilt)}, although all "
                "gradients were finite: an earlier update changed it)"
            )
        return NonFiniteError(f"{what}: on rank {self._ranks.rank}{culprit}", own=True)

    def _gradient_error(self, norm: torch.Tensor | None) -> NonFiniteError:
        gradient = f"the gradient of step {self._step}"
        gradients = self._subject.tensors(GRADIENTS)
        names = [n for n, each in gradients.items() if not all_finite([digest.local(each)])]
        if not names and not self._cut:
            return NonFiniteError(
                f"the norm of {gradient} is {norm}, although each element is finite: the gradient "
                "is too large to be clipped",
                own=True,
                code="check.gradient-too-large",
            )
        if not names:
            return NonFiniteError(f"{gradient} is not finite on another rank", own=False)
        what = (
            f"{gradient} is not finite in {len(names)} of {len(self._subject.parameters())} "
            f"parameters; the one nearest to the loss is {names[-1]}"
        )
        try:
            culprit = self._search.of_gradient()
        except _UnknownSourceError as error:
            return NonFiniteError(
                f"{what}; the rank that it comes from is not known: {error}", own=True
            )
        if culprit is None:
            return NonFiniteError(f"{what}; this rank's own gradients are finite", own=False)
        source = f"from {culprit.parameter} of rank {self._ranks.rank}"
        return NonFiniteError(f"{what}: {source}{culprit}", own=True)


class _UnknownSourceError(Exception):
    """Raised with the reason why the rank that a gradient comes from cannot be found."""


@dataclass(frozen=True)
class _Culprit:
    """A micro-batch of this rank whose loss or gradient is not finite."""

    number: int
    num_micro_batches: int
    samples: list[int]
    """The ids of its samples; empty if they are not known."""
    parameter: str | None
    """The name of the parameter with the gradient. None means that the loss is not finite."""
    alone: list[int]
    """The samples that lead to it without the others; empty if they are not known."""

    def __str__(self) -> str:
        if not self.samples:
            return ""
        samples = numbered("sample", self.samples)
        text = f", micro-batch {self.number} of {self.num_micro_batches}, {samples}"
        if 0 < len(self.alone) < len(self.samples):
            gives = "gives" if len(self.alone) == 1 else "give"
            text += f"\n{numbered('sample', self.alone)} {gives} the same when computed alone"
        return text


class _Search:
    """Finds this rank's values that are not finite, by computing its micro-batches again, alone."""

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
        """The loss sum of each micro-batch of this step."""
        self._no_search_reason = ""
        if subject.is_cut():
            self._no_search_reason = "parameters are sharded"
        elif loss is None or feed is None:
            self._no_search_reason = "this training step is not computed a second time"
        elif not feed.rereadable:
            self._no_search_reason = "a stream cannot be read again"
        if feed is not None:
            feed.watchers.append(lambda fetched: self._ids.append(fetched.samples))

    def begin(self, epoch: int) -> None:
        self._epoch, self._ids, self.losses = epoch, [], []

    def of_loss(self) -> _Culprit | None:
        """Return the first micro-batch whose loss is not finite."""
        losses = enumerate(self.losses)
        bad = next((i for i, each in losses if not math.isfinite(float(each))), None)
        return None if bad is None else self._culprit(bad, None)

    def of_gradient(self) -> _Culprit | None:
        """Return the first micro-batch whose own gradient is not finite.

        Raises:
            _UnknownSourceError: it cannot be found.
        """
        if self._no_search_reason:
            raise _UnknownSourceError(self._no_search_reason)
        parameters = {n: p for n, p in self._subject.parameters().items() if p.requires_grad}
        try:
            for index, ids in enumerate(self._ids):
                names = self._non_finite_gradients(ids, parameters)
                if names:
                    return self._culprit(index, names[-1])
        except AloneError as error:
            raise _UnknownSourceError(f"the loss calls {error} of torch.distributed") from None
        return None

    def _culprit(self, index: int, parameter: str | None) -> _Culprit:
        # with manual optimization one micro-batch has several losses
        last = len(self._ids) - 1
        ids = self._ids[min(index, last)] if self._ids else np.zeros(0, dtype=np.int64)
        alone = [] if self._no_search_reason else self._alone(ids, parameter)
        return _Culprit(index + 1, len(self.losses), ids.tolist(), parameter, alone)

    def _alone(self, ids: Ids, parameter: str | None) -> list[int]:
        """Return the samples whose loss or gradient is not finite when they are computed alone."""
        singles = [ids[position : position + 1] for position in range(min(len(ids), _MAX_ALONE))]
        try:
            if parameter is None:
                return [int(one[0]) for one in singles if self._loss_is_not_finite(one)]
            only = {parameter: self._subject.parameters()[parameter]}
            return [int(one[0]) for one in singles if self._non_finite_gradients(one, only)]
        except Exception as error:  # for example a norm over one sample: the sample stays unknown
            logger.debug("samples cannot be computed alone: %s", error)
            return []

    def _non_finite_gradients(
        self, ids: Ids, parameters: dict[str, torch.nn.Parameter]
    ) -> list[str]:
        """Return the parameters for which these samples have a gradient that is not finite."""
        with self._isolated():
            gradients = torch.autograd.grad(
                self._compute_again(ids), list(parameters.values()), allow_unused=True
            )
        pairs = zip(parameters, gradients, strict=True)
        return [name for name, g in pairs if g is not None and not all_finite([g])]

    def _compute_again(self, ids: Ids) -> torch.Tensor:
        assert self._feed is not None
        assert self._loss is not None
        batch = to_device(self._feed.again(self._epoch, ids), self._device)
        total: torch.Tensor = self._loss(batch, len(ids))[0]
        return total

    def _loss_is_not_finite(self, ids: Ids) -> bool:
        with self._isolated(), torch.no_grad():
            return not bool(torch.isfinite(self._compute_again(ids)))

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Restore random states and buffers afterwards, and use no collectives."""
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
