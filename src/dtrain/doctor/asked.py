"""What a launch asks of one of its hosts, for the checks to compare with."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain import catalog
from dtrain.launch_plan import LaunchPlan
from dtrain.run.rundir import RunDir

if TYPE_CHECKING:
    from dtrain.job.spec import JobSpec

_FEW_FILES = 32
_FILES_PER_RANK = 4
_FILES_OF_RANK, _FILES_PER_LOADER = 64, 7
"""A pipe, and the shared memory of the batches that are on their way. 7 were measured for two
tensors in each batch and `data.prefetch: 2`."""


@dataclass(frozen=True)
class Asked:
    """What a launch asks of one host. The defaults are those where no job is known."""

    directory: Path
    """The directory of the run, where checkpoints are written. It may not exist yet."""
    procs: int = 0
    """The ranks on this host; 0 if no job is known."""
    threads: int = 1
    """The threads of each rank."""
    gpus: int = 0
    """The GPUs on this host."""
    loaders: int = 0
    """The loader processes of each rank."""
    hosts: int = 1
    """The number of hosts that use the directory of the run."""
    checkpoint_bytes: int = 0
    """The size of a checkpoint; 0 if it is not known."""
    kept: int = 1
    """The number of checkpoints that are kept."""
    head: tuple[str, int] | None = None
    """The host and port of the rendezvous, where it is known and on another host."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The variables that the job sets for its workers."""

    @classmethod
    def of(cls, plan: LaunchPlan, spec: JobSpec) -> Asked:
        """Return what a plan asks of each of its hosts."""
        launcher = catalog.launcher(plan.launcher)
        nodes_here = plan.nodes if launcher.simulates else 1
        hosts = plan.nodes + launcher.allocates  # and the one where the command runs
        if launcher.simulates or plan.options.is_here:
            hosts = 1
        best = spec.checkpoint.best
        return cls(
            directory=plan.run.path,
            procs=plan.procs_per_node * plan.replicas * nodes_here,
            threads=plan.threads_per_proc,
            gpus=plan.gpus_per_node * nodes_here,
            loaders=spec.data.workers if spec.program is None else 0,
            hosts=hosts,
            checkpoint_bytes=checkpoint_bytes(plan.run),
            kept=spec.checkpoint.keep + (best.keep if best else 0),
            head=(plan.rdzv_host, plan.rdzv_port) if hosts > 1 and plan.rdzv_port else None,
            env=plan.worker_env,
        )

    @property
    def all_loaders(self) -> int:
        """Return the loader processes of all ranks of this host."""
        return self.procs * self.loaders

    @property
    def open_files(self) -> int:
        """Return the open files that one process needs."""
        return max(
            open_files_of_agents(self.procs), _FILES_OF_RANK + _FILES_PER_LOADER * self.loaders
        )


def open_files_of_agents(ranks: int) -> int:
    """Return the open files that the agents of a host need, where they have so many ranks."""
    return _FEW_FILES + _FILES_PER_RANK * ranks


def open_files_limit() -> tuple[int, int]:
    """Return the soft and the hard limit of open files of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def checkpoint_bytes(run: RunDir) -> int:
    """Return the size of the newest checkpoint of a run; 0 if it has none here."""
    steps = sorted(path for path in run.checkpoints.glob("step-*") if path.is_dir())
    if not steps:
        return 0
    return sum(path.stat().st_size for path in steps[-1].rglob("*") if path.is_file())
