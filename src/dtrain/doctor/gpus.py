"""Checks that this host has the GPUs that are asked for, and a driver for torch.

They are made without torch and CUDA.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.doctor import versions
from dtrain.doctor.asked import Asked
from dtrain.doctor.diagnosis import OK, PROBLEM, WARNING, Diagnosis
from dtrain.launch_plan import LaunchPlan
from dtrain.words import counted

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""The devices of Nvidia, of Windows below WSL, and of AMD. Without one of them no GPU is usable."""
_LEAST_DRIVERS = {11: "450", 12: "525", 13: "580"}
"""The least driver for each major version of CUDA."""
_BUSY = 0.1
"""The share of a GPU's memory from which on another program uses it: a display needs less."""


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


def split(
    size: int, environ: Mapping[str, str] = os.environ, count: int | None = None
) -> list[str | None]:
    """Return the GPUs of this host in groups, each as CUDA_VISIBLE_DEVICES names them.

    Where the number of GPUs is not known, or too small, there is one group of all, which is None.

    Args:
        size: the GPUs of a group.
        environ: the environment of this process.
        count: the GPUs that the driver knows. None means to ask it.
    """
    count = installed() if count is None else count
    visible = environ.get(VISIBLE)
    found = usable(visible, count) or 0
    names = [str(number) for number in range(found)] if visible is None else visible.split(",")
    groups = [names[first : first + size] for first in range(0, found - size + 1, size)]
    return [",".join(name.strip() for name in group) for group in groups] or [None]


def installed() -> int | None:
    """Return the number of GPUs that the driver knows. None if it cannot be asked."""
    if not any(Path(path).exists() for path in _DRIVERS):
        return 0
    with _nvml() as nvml:
        return None if nvml is None else int(nvml.nvmlDeviceGetCount())


def readings() -> list[dict[str, float]]:
    """Return what each GPU of this host is doing now; none where the driver cannot be asked.

    A reading has `utilization` (the percentage of time in which a kernel ran), `memory_used` and
    `memory_total` (bytes) and `power` (watts), each only where the GPU has it.
    """
    return _of_each(_reading) if installed() else []


def _reading(nvml: Any, gpu: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    with contextlib.suppress(nvml.NVMLError):  # a partition of a GPU lacks some of them
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        found |= {"memory_used": memory.used, "memory_total": memory.total}
        found["utilization"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        found["power"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return found


def gpus(asked: Asked) -> Diagnosis:
    """Compare the GPUs that CUDA shows here with those asked for."""
    visible = asked.env.get(VISIBLE, os.environ.get(VISIBLE))
    found = usable(visible, installed())
    wanted = f"; {asked.gpus} asked for" if asked.gpus else ""
    if found is None:
        return Diagnosis("gpus", WARNING, f"the driver does not answer{wanted}", "nvidia-smi")
    because = "" if visible is None else f" with {VISIBLE}={visible!r}"
    names = [name for name in _of_each(lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu)) if name]
    kind = f" ({', '.join(dict.fromkeys(names))})" if names and found else ""
    fact = f"{counted(found, 'GPU') if found else 'no GPU'}{kind}{because}{wanted}"
    if found < asked.gpus:
        remedy = f"--gpus {found}; 0 trains on the CPU. `nvidia-smi -L` lists the GPUs"
        return Diagnosis("gpus", PROBLEM, fact, remedy)
    busy = [name for name in _of_each(_busy) if name] if asked.gpus else []
    if busy:
        return Diagnosis(
            "gpus", WARNING, f"{fact}; in use already: {', '.join(busy)}", "nvidia-smi"
        )
    return Diagnosis("gpus", OK, fact)


def driver(asked: Asked) -> Diagnosis:
    """Compare the CUDA that the driver supports with that of torch."""
    built = versions.torch_cuda()
    if not installed():
        return Diagnosis("driver", OK, f"no GPU; torch is built for {_cuda(built)}")
    if built is None:
        fact = "this host has a GPU, and torch is built for the CPU alone"
        remedy = "pip install torch, from the index of https://pytorch.org for your CUDA"
        return Diagnosis("driver", PROBLEM if asked.gpus else WARNING, fact, remedy)
    with _nvml() as nvml:
        if nvml is None:
            return Diagnosis("driver", WARNING, "not checked", "pip install nvidia-ml-py")
        version = str(nvml.nvmlSystemGetDriverVersion())
        supported = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    return _compared(asked, version, supported, built)


def _compared(asked: Asked, version: str, supported: int, built: str) -> Diagnosis:
    """Compare versions of CUDA: a driver runs every minor version of its major one, and older ones.

    See https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.
    """
    has, needs = supported // 1000, int(built.partition(".")[0])
    fact = f"driver {version} supports CUDA {has}.{supported % 1000 // 10}, torch has CUDA {built}"
    if has >= needs:
        return Diagnosis("driver", OK, fact)
    least = _LEAST_DRIVERS.get(needs, "a newer one")
    remedy = f"update the driver to {least}, or install torch for CUDA {has}"
    return Diagnosis("driver", PROBLEM if asked.gpus else WARNING, fact, remedy)


def numa_nodes() -> list[int]:
    """Return the NUMA node of each GPU, -1 where the kernel does not know."""
    found = []
    for bus in _of_each(lambda nvml, gpu: nvml.nvmlDeviceGetPciInfo(gpu).busId):
        name = bus.decode() if isinstance(bus, bytes) else str(bus)
        path = Path("/sys/bus/pci/devices", name.lower()[-12:], "numa_node")
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()))
    return found


def _busy(nvml: Any, gpu: Any) -> str:
    memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
    index, share = nvml.nvmlDeviceGetIndex(gpu), memory.used / memory.total
    return f"GPU {index} ({share:.0%} of its memory)" if share > _BUSY else ""


def _of_each(ask: Any) -> list[Any]:
    """Ask for a fact of each GPU; nothing where the driver cannot be asked."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        count = nvml.nvmlDeviceGetCount()
        return [ask(nvml, nvml.nvmlDeviceGetHandleByIndex(number)) for number in range(count)]


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Yield NVIDIA's library of the driver. None if its package or the driver is missing."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # the package's own errors, and that of a missing package
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _cuda(built: str | None) -> str:
    return "the CPU alone" if built is None else f"CUDA {built}"
