"""`--placement argv`: the process that starts the node process names its nodes."""

from __future__ import annotations

import signal

from dtrain.errors import UsageError
from dtrain.launch_plan import LaunchPlan
from dtrain.node.placement.base import NodePlacement, PlacementReader
from dtrain.procs import DEFERRED_SIGNALS


class ArgvPlacement(PlacementReader):
    """Reads `--node-rank K`, which may be given several times. All else is in the plan."""

    def join(self, plan: LaunchPlan) -> NodePlacement:
        node_ranks = self.arguments.node_rank
        if not node_ranks:
            raise UsageError(
                "give the rank of this node with --node-rank", code="node.no-node-rank"
            )
        if len(node_ranks) == plan.nodes:  # no other node waits for a message
            signal.pthread_sigmask(signal.SIG_UNBLOCK, DEFERRED_SIGNALS)
        return NodePlacement(plan, node_ranks, self.arguments.listen_fd, self.environ)
