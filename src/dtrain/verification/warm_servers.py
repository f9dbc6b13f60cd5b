"""Selects the launches of `dtrain verify` that start warm: forked after torch is imported."""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.environ import HASH_SEED
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.base import Launcher
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.warm import WarmServer


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
        self._servers: dict[_Kind, WarmServer] = {}
        self._modules: dict[_Kind, list[str]] = {}
        for plan in plans:
            if _can_be_warm(plan):
                self._modules.setdefault(_kind(plan), []).extend(plan.modules)
        for kind in self._modules:
            if kind[0] == reference.trainer:
                self._server(kind)

    def launcher(self, plan: LaunchPlan) -> Launcher | None:
        """Return the launcher that starts a plan warm; None if it starts as any launch does."""
        server = self._server(_kind(plan)) if _can_be_warm(plan) else None
        return LocalLauncher(server.spawn) if server is not None and server.is_ready() else None

    def close(self) -> None:
        for server in self._servers.values():
            server.close()

    def _server(self, kind: _Kind) -> WarmServer | None:
        if kind in self._modules and kind not in self._servers:
            modules = list(dict.fromkeys(self._modules[kind]))
            self._servers[kind] = WarmServer(modules, hash_seed=kind[1])
        return self._servers.get(kind)


_Kind = tuple[str, str]
"""The trainer, and the hash seed."""


def _kind(plan: LaunchPlan) -> _Kind:
    return plan.trainer, plan.worker_env[HASH_SEED]


def _can_be_warm(plan: LaunchPlan) -> bool:
    return plan.launcher == "local" and not plan.gpus_per_node
