"""What must not change between two moments of one process: its digest then and now.

For what no other rank holds a copy of (parts of parameters under `fsdp`, the one copy of `dp`),
and for buffers, which strategies give to all ranks from the first. Covers the step after a
comparison, and nothing in other steps: parameters and moments from its beginning to its update,
buffers from the end of the step before to its first forward. Callbacks, which may change all of
them, have been told of the step before by then.
"""

from __future__ import annotations

from dtrain.train.checks import digest
from dtrain.train.checks.train_state import TrainState
from dtrain.words import few


class UnexpectedChangeDetector:
    def __init__(self, subject: TrainState, kinds: tuple[str, ...]) -> None:
        self._subject = subject
        self._kinds = kinds
        self._before: dict[str, dict[str, int]] = {}

    def begin(self) -> None:
        self._before = {kind: self._digests(kind) for kind in self._kinds}

    def look(self) -> list[str]:
        """What has changed since, in words; ends the watch."""
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
