"""The launch plan: job, profile and flags resolved into every command, variable and file.

`make_plan` is pure: it receives what it must know of this machine as `Facts`. `dtrain plan` prints
a plan, and `dtrain launch` starts exactly that object. Nodes and workers read it from the run
directory.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dtrain import catalog, ports
from dtrain.environ import HASH_SEED, hash_seed, masked, shown
from dtrain.errors import PlanError
from dtrain.job.launcher_options import AnyOptions
from dtrain.run import files
from dtrain.run.remote.runs import staging
from dtrain.run.remote.store import is_url
from dtrain.run.rundir import RunDir

if TYPE_CHECKING:
    from dtrain.job.spec import JobSpec

# Imports of a task's file that may be done once per node, before the fork: they start no thread
# and do not look at RANK. Four ranks that import scikit-learn at once take 4 s on 2 cores.
FORK_SAFE = ("PIL", "numpy", "scipy", "sklearn", "torchvision")


@dataclass(frozen=True)
class Facts:
    """The inputs of a plan that are not in job, profile or flags."""

    run_id: str
    runs: str
    """The absolute path of the directory of all runs, on this host."""
    python: str
    host: str
    cores: int
    free_port: int
    """A port on which no process listens here at present."""
    attempt: int = 0
    task_imports: tuple[str, ...] = ()
    """The modules that the task's file imports."""
    runs_url: str = ""
    """The URL at which all runs are kept, if there is one."""
    hash_seed: str = "0"
    """PYTHONHASHSEED of all processes, unless the job sets one."""
    limits_s: Mapping[str, float] = field(default_factory=dict)
    """The time limit of each queue of the cluster that the job may use, where it is known."""

    @classmethod
    def gather(
        cls,
        run_id: str,
        runs: str | os.PathLike[str],
        attempt: int = 0,
        task_imports: tuple[str, ...] = (),
        cores: int | None = None,
    ) -> Facts:
        """Look at this host. `cores` is how many of its cores the run may use; None means all."""
        url = os.fspath(runs).rstrip("/") if is_url(runs) else ""
        folder = str(staging(url)) if url else os.path.abspath(runs)
        before = files.read_json(RunDir(os.path.join(folder, run_id)).plan) if attempt else None
        return cls(
            run_id=run_id,
            runs=folder,
            runs_url=url,
            python=sys.executable,
            host=socket.gethostname(),
            cores=cores or len(os.sched_getaffinity(0)),
            free_port=ports.free_candidate("127.0.0.1", f"{run_id}/{attempt}"),
            attempt=attempt,
            task_imports=task_imports,
            hash_seed=hash_seed(before["worker_env"] if before else os.environ),
        )


@dataclass(frozen=True)
class Command:
    """One process that the launch starts, or that a person starts by hand."""

    where: str
    """The host or node on which it runs."""
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    """Variables that are added to the environment it inherits."""
    by_hand: bool = False
    """True if it is only printed for a person to run. `launch` does not start it."""
    node_ranks: tuple[int, ...] = ()
    """The nodes that it serves; none if the command requests them from a cluster."""


@dataclass(frozen=True)
class Element:
    """The place of a run in a sweep."""

    sweep: str
    """The id of the sweep."""
    index: int
    """The number of the run in the sweep, from 0."""
    count: int
    """The number of runs in the sweep."""
    values: dict[str, Any]
    """The swept fields, with this run's values. Values of secret names are masked."""

    def __str__(self) -> str:
        return ", ".join(f"{field}={value}" for field, value in self.values.items())


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launch will do. It is plain data that can be written as JSON."""

    run_id: str
    run_dir: str
    attempt: int
    name: str
    job_dir: str
    """The directory of job.yaml. The path of the task's file is relative to it."""
    launcher: str
    profile: str
    trainer: str
    strategy: str
    min_nodes: int
    nodes: int
    """The largest number of nodes; equal to `min_nodes` unless elastic."""
    node_names: tuple[str, ...]
    procs_per_node: int
    gpus_per_node: int
    world_size: int
    replicas: int
    """Model replicas inside one process: above 1 for strategy `dp` only."""
    device: str
    backend: str
    rdzv_host: str
    rdzv_port: int
    max_restarts: int
    join_timeout_s: float
    stop_timeout_s: float
    collective_timeout_s: float
    threads_per_proc: int
    preload: tuple[str, ...]
    worker_env: dict[str, str]
    """Variables of every worker. Values of secret names are masked here."""
    options: AnyOptions
    """The launcher's own settings, of its own type after it has completed the plan."""
    lost_after_s: float = 30.0
    max_requeues: int = 0
    """The number of times that a cluster may start the job again automatically."""
    code_dir: str = ""
    """The directory in which workers find the task, if it is a copy of `job_dir`."""
    sources: dict[str, str] = field(default_factory=dict)
    """The origin of each of the launcher's settings: `launchers/slurm.yaml:9:14`, or a flag."""
    program: tuple[str, ...] = ()
    """The script, `-m` and the module, or the command, and the arguments, with secret ones masked.
    It is empty for a task."""
    set_by_flags: dict[str, Any] = field(default_factory=dict)
    """Fields of the job that flags have set, at the first launch and at each resume. Values of
    secret names are masked.
    """
    commands: tuple[Command, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for the user before it starts, for example that a time limit was reduced."""
    files: tuple[str, ...] = ()
    """Files that the launch writes before it starts anything."""
    run_url: str = ""
    """The URL of the run, if it has one. `run_dir` is then a copy, one on each host."""
    preflight: bool = False
    """Whether the nodes check themselves and one another before the workers start."""
    sweep: Element | None = None
    """The place of the run in its sweep, if it has one."""

    @cached_property
    def run(self) -> RunDir:
        return RunDir(self.run_dir)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules imported before the workers are forked: trainer, strategy, `preload`."""
        named = [("trainer", self.trainer), ("strategy", self.strategy)]
        targets = [catalog.find(kind, name) for kind, name in named if name != catalog.OWN]
        return (*(target.partition(":")[0] for target in targets), *self.preload)

    @property
    def node_ranks(self) -> tuple[int, ...]:
        """The nodes that this launch serves on this host; empty if a cluster provides them."""
        return tuple(rank for each in self.commands if not each.by_hand for rank in each.node_ranks)

    @property
    def is_of_node_zero(self) -> bool:
        """True if this launch writes the run's result. With one command per node, node 0's does."""
        return not self.node_ranks or 0 in self.node_ranks

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as stored in plan.json and printed by `--json`."""
        plain = asdict(replace(self, options=AnyOptions()))
        return {**plain, "options": self.options.model_dump(mode="json")}

    def placed(self, attempt: int, node_names: Sequence[str], host: str, port: int) -> LaunchPlan:
        """Return the plan of an attempt whose nodes and rendezvous are known only at its start."""
        nodes = len(node_names)
        return replace(
            self,
            attempt=attempt,
            node_names=tuple(node_names),
            nodes=nodes,
            min_nodes=nodes,
            world_size=nodes * self.procs_per_node,
            rdzv_host=host,
            rdzv_port=port,
        )

    @classmethod
    def read(cls, run: RunDir) -> LaunchPlan:
        """Read the plan of a run from its directory, which may have been moved since.

        Raises:
            PlanError: there is none, so this is not a run directory.
            DamagedError: plan.json does not contain a plan.
        """
        plan = files.read_as(cls, run.plan)
        if plan is None:
            raise PlanError(
                f"{run.path} is not a run directory: it has no plan.json", code="run.no-plan"
            )
        inside = plan.code_dir.removeprefix(f"{plan.run_dir}/")
        code_dir = plan.code_dir if inside == plan.code_dir else str(run.path / inside)
        return replace(plan, run_dir=str(run.path), code_dir=code_dir)


def make_plan(
    job: JobSpec,
    *,
    job_dir: str,
    launcher: str,
    profile: str,
    options: AnyOptions,
    facts: Facts,
    sources: Mapping[str, str] | None = None,
) -> LaunchPlan:
    """Resolve a job into a plan, without its commands, which the launcher adds.

    Raises:
        PlanError: the parts do not work together. The message names them, and the closest
            combination that works.
    """
    launch = job.launch
    min_nodes, nodes = launch.nodes
    if problem := catalog.pair_problem(job.trainer, job.strategy, nodes):
        raise PlanError(
            problem, ("strategy", "trainer", "launch.nodes"), code="plan.unsupported-combination"
        )
    procs, replicas = _processes(job)
    _check_sizes(job, procs, facts.attempt)
    if facts.runs_url and (problem := catalog.url_problem(launcher)):
        raise PlanError(problem, code="plan.launcher-needs-directory")
    threads = _threads(launcher, options, facts.cores, nodes, procs * replicas)
    run = RunDir(os.path.join(facts.runs, facts.run_id))
    return LaunchPlan(
        run_id=facts.run_id,
        run_dir=str(run.path),
        run_url=f"{facts.runs_url}/{facts.run_id}" if facts.runs_url else "",
        attempt=facts.attempt,
        name=job.name,
        job_dir=job_dir,
        launcher=launcher,
        profile=profile,
        trainer=job.trainer,
        strategy=job.strategy,
        min_nodes=min_nodes,
        nodes=nodes,
        node_names=(),
        procs_per_node=procs,
        gpus_per_node=launch.gpus_per_node,
        world_size=procs * nodes,
        replicas=replicas,
        device="cuda" if launch.gpus_per_node else "cpu",
        backend="nccl" if launch.gpus_per_node else "gloo",
        rdzv_host="127.0.0.1",
        rdzv_port=facts.free_port,
        max_restarts=launch.max_restarts,
        join_timeout_s=launch.join_timeout,
        stop_timeout_s=launch.stop_timeout,
        collective_timeout_s=launch.collective_timeout,
        lost_after_s=launch.lost_after or (600.0 if catalog.launcher(launcher).allocates else 30.0),
        threads_per_proc=threads,
        preload=_preload(job, facts),
        worker_env={
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            HASH_SEED: facts.hash_seed,
            **masked(launch.env),
        },
        options=options,
        program=_program(job, job_dir),
        sources=dict(sources or {}),
        files=tuple(
            str(path)
            for path in (run.job, run.resolved, run.plan, run.handle(facts.attempt), run.code)
        ),
    )


_SIZES = ("launch.procs_per_node", "launch.gpus_per_node", "launch.nodes")


def _check_sizes(job: JobSpec, procs: int, attempt: int) -> None:
    """Refuse a number of processes that the strategy, the data or an injected fault cannot have."""
    from dtrain.job.faults import absent_rank
    from dtrain.job.spec import sharded_problem  # commands that only read a plan do not need it

    min_nodes, nodes = job.launch.nodes
    world_sizes = [procs * count for count in range(min_nodes, nodes + 1)]
    if problem := catalog.shard_problem(job.strategy, job.train.virtual_shards, world_sizes):
        raise PlanError(problem, (*_SIZES, "strategy"), code="plan.uneven-shards")
    if problem := catalog.replicas_problem(job.strategy, job.fsdp.replicas, world_sizes):
        raise PlanError(problem, (*_SIZES, "fsdp.replicas"), code="plan.uneven-replicas")
    if job.strategy == "fsdp" and job.fsdp.cpu_offload and not job.launch.gpus_per_node:
        raise PlanError(
            "fsdp.cpu_offload moves parameters from GPUs to the host, and this launch has no GPUs; "
            "use --gpus, or leave it out",
            ("fsdp.cpu_offload", "launch.gpus_per_node"),
            code="plan.offload-without-gpus",
        )
    if problem := sharded_problem(job, world_sizes):
        raise PlanError(problem, ("data.stream", "strategy", *_SIZES), code="plan.sharded-stream")
    absent = [rank for rank in _profiled(job) if rank >= procs * nodes]
    if absent:
        last = procs * nodes - 1
        ranks = f"ranks 0 to {last}" if last else "rank 0"
        raise PlanError(
            f"rank {absent[0]} is to be profiled: there will be only {ranks}",
            ("profile.ranks", *_SIZES),
            code="plan.profile-of-absent-rank",
        )
    inject = [] if attempt else job.checks.inject  # only the first attempt has injected faults
    if problem := absent_rank(inject, procs * nodes):
        raise PlanError(problem, ("checks.inject",), code="plan.absent-rank")


def _profiled(job: JobSpec) -> list[int]:
    """Return the ranks that the job names to be profiled."""
    return [] if job.profile is None or job.profile.ranks == "all" else job.profile.ranks


def _processes(job: JobSpec) -> tuple[int, int]:
    """Return (processes per node, replicas per process) of a job."""
    launch = job.launch
    requested = launch.procs_per_node
    if launch.gpus_per_node and requested and requested > launch.gpus_per_node:
        raise PlanError(
            f"{requested} processes per node cannot share {launch.gpus_per_node} GPUs; "
            f"use --procs {launch.gpus_per_node} or leave it out",
            _SIZES,
            code="plan.more-processes-than-gpus",
        )
    wanted = requested or launch.gpus_per_node or 1
    strategy = catalog.STRATEGIES.get(job.strategy)
    if strategy is None or not strategy.one_process:
        return wanted, 1
    if job.strategy == "single":
        if wanted > 1:
            raise PlanError(
                f"strategy 'single' is one process, not {wanted}; use 'ddp', or leave out "
                "--procs and --gpus",
                (*_SIZES, "strategy"),
                code="plan.single-is-one-process",
            )
        return 1, 1
    return 1, wanted


def _threads(launcher: str, options: AnyOptions, cores_here: int, nodes: int, per_node: int) -> int:
    """Return the threads of each of a node's `per_node` processes and replicas.

    Every thread has a core.
    """
    fact = catalog.launcher(launcher)
    if fact.allocates:
        return max(1, (options.cores_per_node or per_node) // per_node)
    return max(1, cores_here // (per_node * (nodes if fact.simulates else 1)))


def _program(job: JobSpec, job_dir: str) -> tuple[str, ...]:
    own: list[str] = []
    if job.script is not None:
        own = [os.path.join(job_dir, job.script)]
    elif job.module is not None:
        own = ["-m", job.module]
    elif job.command is not None:
        own = shown("command", list(job.command))
    return (*own, *shown("script_args", list(job.script_args)))


def _preload(job: JobSpec, facts: Facts) -> tuple[str, ...]:
    if job.launch.preload is not None:
        return tuple(job.launch.preload)
    safe = FORK_SAFE + (catalog.LIGHTNING if job.trainer == "lightning" else ())
    names = [name for name in facts.task_imports if name.partition(".")[0] in safe]
    if job.trainer == "lightning" and not any(name.startswith(catalog.LIGHTNING) for name in names):
        names.append(catalog.LIGHTNING[0])
    return tuple(names)
