"""Launcher `torchrun`, in which this command is one node of the job. It is run on each host.

The node agents are dtrain's own. `dtrain plan` also prints the torchrun lines that start the same
workers without them.
"""

from __future__ import annotations

from dataclasses import replace

from dtrain import ports
from dtrain.errors import PlanError, UsageError
from dtrain.job.fields import Text
from dtrain.job.launcher_options import LauncherOptions
from dtrain.job.units import is_number
from dtrain.launch_plan import Command, Facts, LaunchPlan
from dtrain.launchers.base import Slot
from dtrain.launchers.local import LocalLauncher, NodeProcess, node_command


class TorchrunOptions(LauncherOptions):
    """The rank of this host's node, and the address of node 0."""

    launcher = "torchrun"

    node_rank: int | Text | None = None
    """The rank of the node on this host, from 0."""
    rdzv_endpoint: Text | None = None
    """The HOST:PORT at which node 0 listens, for example head:29400."""


class TorchrunLauncher(LocalLauncher):
    """A launcher for one node on this host. The same command starts the others on their hosts."""

    options_model = TorchrunOptions

    def complete(self, plan: LaunchPlan, facts: Facts) -> LaunchPlan:
        options = TorchrunOptions.of(plan.options)
        node_rank = _node_rank(plan, options.node_rank)
        host, port = _endpoint(plan, options.rdzv_endpoint, facts)
        plan = replace(
            plan,
            # several hosts write the same plan; each agent knows its own host's name
            node_names=(facts.host,) if plan.nodes == 1 else ("",) * plan.nodes,
            rdzv_host=host,
            rdzv_port=port,
            options=TorchrunOptions(node_rank=node_rank, rdzv_endpoint=f"{host}:{port}"),
        )
        by_hand = tuple(_torchrun(plan, facts, rank) for rank in range(plan.nodes))
        return replace(plan, commands=(node_command(plan, facts, [node_rank]), *by_hand))

    def slots(self, plan: LaunchPlan, runs: int, at_once: int | None) -> list[Slot]:
        """See `Shareable.slots`.

        Raises:
            UsageError: a run needs a command on each of its hosts.
        """
        if plan.nodes > 1:
            raise UsageError(
                "a sweep starts its runs by one command, and launcher 'torchrun' needs one on each "
                "host; launchers local, slurm and ray have --sweep",
                code="usage.sweep-unsupported",
            )
        return super().slots(plan, runs, at_once)

    def start(self, plan: LaunchPlan) -> NodeProcess:
        listen = ports.to_listen_on(plan.rdzv_host) if plan.is_of_node_zero else None
        return NodeProcess(plan, plan.commands[0], listen)


def _node_rank(plan: LaunchPlan, node_rank: int | str | None) -> int:
    if node_rank is None:
        if plan.nodes > 1:
            raise PlanError(
                f"launcher 'torchrun' with {plan.nodes} nodes needs the node rank of this host: "
                f"--node-rank 0 … {plan.nodes - 1}",
                code="torchrun.no-node-rank",
            )
        return 0
    if not is_number(str(node_rank)) or int(node_rank) >= plan.nodes:
        raise PlanError(
            f"--node-rank {str(node_rank)[:60]} does not exist among {plan.nodes} nodes "
            f"(0 … {plan.nodes - 1})",
            code="torchrun.invalid-node-rank",
        )
    return int(node_rank)


def _endpoint(plan: LaunchPlan, endpoint: str | None, facts: Facts) -> tuple[str, int]:
    if endpoint is None:
        if plan.nodes > 1:
            raise PlanError(
                "launcher 'torchrun' with several nodes needs the address of node 0: "
                "--rdzv-endpoint HOST:PORT",
                code="torchrun.no-endpoint",
            )
        return "127.0.0.1", facts.free_port
    try:
        return ports.parse_address(endpoint)
    except ValueError as error:
        raise PlanError(
            f"--rdzv-endpoint {error}, for example head:29400", code="torchrun.invalid-endpoint"
        ) from None


def _torchrun(plan: LaunchPlan, facts: Facts, node_rank: int) -> Command:
    argv = (
        "torchrun",
        f"--nnodes={plan.nodes}",
        f"--node-rank={node_rank}",
        f"--nproc-per-node={plan.procs_per_node}",
        f"--master-addr={plan.rdzv_host}",
        f"--master-port={plan.rdzv_port}",
        f"--max-restarts={plan.max_restarts}",
        *("--no-python", facts.python, "-P", "-m", "dtrain.worker"),
        plan.run_dir,
    )
    where = plan.node_names[node_rank] or f"node {node_rank}"
    return Command(where=where, argv=argv, env=dict(plan.worker_env), by_hand=True)
