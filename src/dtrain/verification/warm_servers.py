"""Selects the launches of `dtrain verify` that start warm: forked after torch is imported."""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.base import Launcher
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.warm import Kind, WarmServer, kind_of


class WarmServers:
    """A server for each trainer. Its modules are not imported in runs of another trainer.

    Only launches on this host that compute on CPUs are warm, and only if they have the server's
    hash seed. The reference has another hash seed.
    """

    def __init__(self, reference: LaunchPlan, plans: Iterable[LaunchPlan]) -> None:
        """Start the server of the reference's trainer. The others start when they are needed.

        Args:
            reference: the plan that runs first.
            plans: the plans that run after it.
        """
        self._servers: dict[Kind, WarmServer] = {}
        self._modules: dict[Kind, list[str]] = {}
        for plan in plans:
            if _can_be_warm(plan):
                self._modules.setdefault(kind_of(plan), []).extend(plan.modules)
        for kind in self._modules:
            if kind[0] == reference.trainer:
                self._server(kind)

    def launcher(self, plan: LaunchPlan) -> Launcher | None:
        """Return the launcher that starts a plan warm; None if it starts as any launch does."""
        server = self._server(kind_of(plan)) if _can_be_warm(plan) else None
        return LocalLauncher(server.spawn) if server is not None and server.is_ready() else None

    def close(self) -> None:
        for server in self._servers.values():
            server.close()

    def _server(self, kind: Kind) -> WarmServer | None:
        if kind in self._modules and kind not in self._servers:
            modules = list(dict.fromkeys(self._modules[kind]))
            self._servers[kind] = WarmServer(modules, hash_seed=kind[1])
        return self._servers.get(kind)


def _can_be_warm(plan: LaunchPlan) -> bool:
    return plan.launcher == "local" and not plan.gpus_per_node
