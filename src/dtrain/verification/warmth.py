"""Which of verify's launches start warm: forked where torch is imported already."""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.environ import HASH_SEED
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.base import Launcher
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.warm import WarmServer


class Warmth:
    """A server for each trainer, whose modules no run of another one imports.

    Only launches on this host that compute on CPUs are warm, and only those that share the
    server's hash seed: the reference has another.
    """

    def __init__(self, reference: LaunchPlan, plans: Iterable[LaunchPlan]) -> None:
        """Start the server of the reference's trainer; the others start when they are needed.

        Args:
            reference: what is about to run.
            plans: what will run after it.
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
        """What starts a plan warm; None when it starts as any launch does."""
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
