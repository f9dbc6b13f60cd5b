"""What the checks raise."""

from __future__ import annotations

from typing import Any

from dtrain.errors import BlamedError, DtrainError


class ReplicaError(BlamedError):
    """The replicas are no longer one model."""


class Rollback(Exception):
    """A wish to go back to the newest checkpoint; carries the error to raise instead."""

    def __init__(self, error: ReplicaError) -> None:
        super().__init__(str(error))
        self.error = error


class NonFiniteError(DtrainError):
    """A loss or a gradient is NaN or infinite.

    Args:
        message: what, in which step, on which samples.
        own: whether it came from this rank.
    """

    def __init__(self, message: str, own: bool) -> None:
        super().__init__(message)
        self.collateral = not own

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), not self.collateral)
