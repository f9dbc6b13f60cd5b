"""Which of verify's launches start warm: forked where torch is imported already."""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.launchers.base import Launcher
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.warm import WarmServer
from dtrain.plan import LaunchPlan


class Warmth:
    """A server for each trainer, whose modules no run of another one imports.

    Only launches on this host that compute on CPUs are warm. The reference is not: each
    interpreter seeds the hashes of text anew, and a training that depends on them would look the
    same in runs that share one.
    """

    def __init__(self, reference: LaunchPlan, plans: Iterable[LaunchPlan]) -> None:
        """Start the server of the reference's trainer; the others start when they are needed.

        Args:
            reference: what is about to run.
            plans: what will run after it.
        """
        self._reference = reference
        self._servers: dict[str, WarmServer] = {}
        self._modules: dict[str, list[str]] = {}
        for plan in plans:
            if _can_be_warm(plan):
                self._modules.setdefault(plan.trainer, []).extend(plan.modules)
        self._server(reference.trainer)

    def launcher(self, plan: LaunchPlan) -> Launcher | None:
        """What starts a plan warm; None when it starts as any launch does."""
        ours = self._reference
        if not _can_be_warm(plan) or (plan.trainer, plan.strategy) == (ours.trainer, ours.strategy):
            return None
        server = self._server(plan.trainer)
        return LocalLauncher(server.spawn) if server is not None and server.is_ready() else None

    def close(self) -> None:
        """End the servers."""
        for server in self._servers.values():
            server.close()

    def _server(self, trainer: str) -> WarmServer | None:
        if trainer in self._modules and trainer not in self._servers:
            self._servers[trainer] = WarmServer(list(dict.fromkeys(self._modules[trainer])))
        return self._servers.get(trainer)


def _can_be_warm(plan: LaunchPlan) -> bool:
    return plan.launcher == "local" and not plan.gpus_per_node
