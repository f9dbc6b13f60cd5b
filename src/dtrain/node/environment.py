"""The environment of a worker: torchrun's variables, and dtrain's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch.distributed.elastic.agent.server import WorkerGroup

from dtrain import ports
from dtrain.environ import MASK
from dtrain.launch_plan import LaunchPlan
from dtrain.run import failures, files, rundir


def worker_environment(
    plan: LaunchPlan, group: WorkerGroup, worker: Any, restart: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Compose a worker's environment. See design, section 6.

    Args:
        plan: the launch.
        group: torch's description of this node's workers.
        worker: torch's description of one of them.
        restart: the number of earlier starts of the workers.
        inherited: the environment of the node.
    """
    settled = {
        "RANK": worker.global_rank,
        "WORLD_SIZE": worker.world_size,
        "LOCAL_RANK": worker.local_rank,
        "LOCAL_WORLD_SIZE": group.spec.local_world_size,
        "GROUP_RANK": group.group_rank,
        "GROUP_WORLD_SIZE": group.group_world_size,
        "NODE_RANK": group.group_rank,
        "ROLE_RANK": worker.role_rank,
        "ROLE_WORLD_SIZE": worker.role_world_size,
        "ROLE_NAME": group.spec.role,
        "MASTER_ADDR": group.master_addr,
        "MASTER_PORT": group.master_port,
        "TORCHELASTIC_RESTART_COUNT": restart,
        "TORCHELASTIC_MAX_RESTARTS": plan.max_restarts,
        "TORCHELASTIC_RUN_ID": plan.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_ERROR_FILE": plan.run.error_file(plan.attempt, restart, worker.global_rank),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1,
        rundir.ATTEMPT_VARIABLE: plan.attempt,
        "DTRAIN_NODE_NAME": failures.node_name(),
    }
    return {
        **inherited,
        **_network(plan),
        **_simulated_gpus(plan, group.group_rank),
        **{name: value for name, value in plan.worker_env.items() if value != MASK},
        **(files.read_as(dict[str, str], plan.run.secret_env(plan.attempt)) or {}),
        **{name: str(value) for name, value in settled.items()},
    }


def _network(plan: LaunchPlan) -> dict[str, str]:
    """Set the interface that routes to the head: gloo and NCCL guess, and guess wrong."""
    address = ports.address_towards(plan.rdzv_host, plan.rdzv_port)
    interface = ports.interface_of(address)
    if interface is None:
        return {}
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    return {name: interface for name in names if name not in os.environ}


def _simulated_gpus(plan: LaunchPlan, node_rank: int) -> dict[str, str]:
    """Set the GPUs of one simulated node: nodes that share a host must not share GPUs."""
    if plan.launcher != "local" or plan.nodes == 1 or not plan.gpus_per_node:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    total = plan.nodes * plan.gpus_per_node
    devices = visible.split(",") if visible else [str(index) for index in range(total)]
    first = node_rank * plan.gpus_per_node
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + plan.gpus_per_node])}
