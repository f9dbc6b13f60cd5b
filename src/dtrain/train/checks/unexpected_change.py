"""Detection of changes in tensors that must stay constant between two moments of one process.

It compares digests of two moments. It is for tensors of which no other rank has a copy: sharded
parameters under `fsdp`, and the only copy of `dp`. It is also for buffers, which strategies copy
from the first rank to all ranks. Only the step after a comparison is covered. Parameters and
moments are covered from its beginning to its update, and buffers from the end of the previous step
to its first forward. Callbacks may change all of them; those of the previous step have run by then.
"""

from __future__ import annotations

from dtrain.train import digest
from dtrain.train.checks.train_state import TrainState
from dtrain.words import few


class UnexpectedChangeDetector:
    """Keeps digests of the training's state, and finds what has changed since."""

    def __init__(self, subject: TrainState, kinds: tuple[str, ...]) -> None:
        self._subject = subject
        self._kinds = kinds
        self._before: dict[str, dict[str, int]] = {}

    def begin(self) -> None:
        """Keep the digests of this moment."""
        self._before = {kind: self._digests(kind) for kind in self._kinds}

    def end(self) -> list[str]:
        """Return texts that name what has changed since `begin`, and forget the digests."""
        before, self._before = self._before, {}
        found = []
        for kind, digests in before.items():
            now = self._digests(kind)
            changed = [name for name, each in digests.items() if now.get(name) != each]
            if changed:
                found.append(f"{kind}: {few(changed, 1)}")
        return found

    def _digests(self, kind: str) -> dict[str, int]:
        tensors = self._subject.tensors(kind)
        return dict(zip(tensors, digest.of_each(tensors.values()), strict=True))
