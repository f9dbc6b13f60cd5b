"""A check that this host has the GPUs that a plan requests, made without torch and CUDA."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from dtrain import catalog
from dtrain.launch_plan import LaunchPlan

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""The devices of Nvidia, of Windows below WSL, and of AMD. Without one of them no GPU is usable."""


def lacking(plan: LaunchPlan, environ: Mapping[str, str] = os.environ) -> str:
    """Return which of the plan's GPUs this host lacks, as a sentence. Empty if none is known to be.

    Args:
        plan: the plan. This host is one of its nodes, or simulates all of them with launcher
            `local`.
        environ: the environment that the workers inherit.
    """
    if not plan.gpus_per_node:
        return ""
    visible = plan.worker_env.get(VISIBLE, environ.get(VISIBLE))
    found = usable(visible, installed())
    wanted = plan.gpus_per_node * (plan.nodes if catalog.launcher(plan.launcher).simulates else 1)
    if found is None or found >= wanted:
        return ""
    each = f" ({plan.nodes} nodes with {plan.gpus_per_node} each)" if plan.nodes > 1 else ""
    because = "" if visible is None else f" with {VISIBLE}={visible!r}"
    instead = f"--gpus {found}" if found >= plan.nodes == 1 else f"--procs {plan.procs_per_node}"
    on_cpu = "" if instead.startswith("--gpus") else " and no --gpus, which trains on the CPU"
    gpus = "1 GPU is" if wanted == 1 else f"{wanted} GPUs{each} are"
    return (
        f"{gpus} asked for, but this host shows {found or 'none'}{because}; use {instead}{on_cpu}"
    )


def usable(visible: str | None, count: int | None) -> int | None:
    """Return how many of `count` GPUs CUDA shows: those listed before the first missing one.

    The result is None if `count` is not known, except when the list is empty.
    """
    if visible is None:
        return count
    found = 0
    for name in visible.split(","):
        name = name.strip()
        if name.lstrip("-").isdigit():
            number = int(name)
            if number < 0 or (count is not None and number >= count):
                break
        elif not name.startswith(("GPU-", "MIG-")):
            break
        found += 1
    return found if count is not None or not found else None


def installed() -> int | None:
    """Return the number of GPUs that the driver knows. None if it cannot be asked."""
    if not any(Path(path).exists() for path in _DRIVERS):
        return 0
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return None


def readings() -> list[dict[str, float]]:
    """Return what each GPU of this host is doing now; none where the driver cannot be asked.

    A reading has `utilization` (the percentage of time in which a kernel ran), `memory_used` and
    `memory_total` (bytes) and `power` (watts), each only where the GPU has it.
    """
    count = installed()
    if not count:
        return []
    import pynvml

    found: list[dict[str, float]] = []
    for index in range(count):
        reading: dict[str, float] = {}
        with contextlib.suppress(pynvml.NVMLError):  # a partition of a GPU lacks some of them
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            reading |= {"memory_used": memory.used, "memory_total": memory.total}
            reading["utilization"] = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
            reading["power"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        found.append(reading)
    return found
