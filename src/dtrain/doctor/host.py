"""Checks of this host: cores, memory that processes share, limits, disk, clock.

Each check takes what a launch asks for and returns what it measured.
"""

from __future__ import annotations

import ctypes
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from dtrain import cgroups
from dtrain.doctor import gpus
from dtrain.doctor.asked import Asked, open_files_limit
from dtrain.doctor.diagnosis import OK, PROBLEM, WARNING, Diagnosis
from dtrain.words import counted, few, size

SHM = Path("/dev/shm")
LARGER_SHM = "mount -o remount,size=8G /dev/shm (for a container: --shm-size=8g)"
NODES = Path("/sys/devices/system/node")
_CONTAINER_SHM = 64 << 20
"""What a container gets unless it asks for more. NVIDIA's guide of NCCL asks for 1 GB."""
ENOUGH_SHM = 1 << 30
_ENOUGH_FILES = 1024
_LITTLE_DISK = 1 << 30
_FEW_INODES = 1000
_SLOW_FSYNC_S = 0.05
_FSYNCS = 9
_TASKS_PER_RANK = 24
"""Threads of a rank besides those that compute: of torch, NCCL, gloo and dtrain."""
_UNSYNCHRONIZED = 0x40  # STA_UNSYNC of adjtimex(2)
_SHARED_TYPES = (
    "nfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "cifs", "smb", "afs", "9p", "virtiofs",
    "fuse.", "orangefs", "pvfs2", "wekafs", "panfs", "dfs",
)  # fmt: skip
"""Types of file systems that several hosts may have in common; the beginning of the name."""


def cores(asked: Asked) -> Diagnosis:
    """Compare the cores that this process may use with the processes and threads asked for."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    granted = min(allowed, quota or allowed)
    needed = asked.procs * asked.threads
    fact = f"{granted:g} of {counted(psutil.cpu_count() or allowed, 'core')}"
    if quota and quota < allowed:
        fact += f" by the control group's quota ({allowed} in the affinity)"
    if asked.procs:
        fact += f", for {counted(asked.procs, 'rank')} × {counted(asked.threads, 'thread')}"
    if asked.all_loaders:
        fact += f" and {counted(asked.all_loaders, 'loader process', 'loader processes')}"
    if granted >= needed:
        return Diagnosis("cores", OK, fact)
    fewer = max(1, int(granted // asked.threads))
    remedy = f"--procs {fewer}, or on a cluster more CPUs for each node, -o cpus_per_node={needed}"
    return Diagnosis("cores", WARNING, f"{fact}: they take turns", remedy)


def cpu_quota() -> float | None:
    """Return the cores that the control group allows. None without a limit."""
    limit = cgroups.numbers("cpu", "cpu.max")
    if not limit:
        quota, period = (cgroups.numbers("cpu", f"cpu.cfs_{n}_us") for n in ("quota", "period"))
        limit = quota + period
    return limit[0] / limit[1] if len(limit) == 2 and min(limit) > 0 else None


def numa(asked: Asked, directory: Path = NODES) -> Diagnosis:
    """Compare the NUMA nodes of the cores that are bound here with those of the GPUs."""
    mine = os.sched_getaffinity(0)
    found = {int(path.name[4:]): path / "cpulist" for path in directory.glob("node[0-9]*")}
    if not found:
        return Diagnosis("numa", OK, "this host has one NUMA node")
    cores_of = {number: cpus(path.read_text()) for number, path in sorted(found.items())}
    used = [number for number, have in cores_of.items() if have & mine]
    bound = "bound to" if len(mine) < len(set().union(*cores_of.values())) else "all cores,"
    fact = f"{bound} {counted(len(mine), 'core')} on NUMA node {few(used)} of {len(cores_of)}"
    far = [
        number for number in (gpus.numa_nodes() if asked.gpus else []) if number not in (-1, *used)
    ]
    if not far:
        return Diagnosis("numa", OK, fact)
    remedy = (
        "bind the ranks to the cores of their GPUs: for Slurm, -o slurm.gpu-bind=closest; for "
        f"other launchers, start the command with `numactl --cpunodebind={few(far)}`"
    )
    return Diagnosis("numa", WARNING, f"{fact}; a GPU is on NUMA node {few(far)}", remedy)


def cpus(text: str) -> set[int]:
    """Return the numbers of a list of cores in the kernel's form, for example `0-3,8`."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def shm(asked: Asked, directory: Path = SHM) -> Diagnosis:
    """Compare the shared memory with what loader processes and NCCL put there."""
    try:
        usage = psutil.disk_usage(str(directory))
    except OSError as error:
        return Diagnosis("shm", PROBLEM, f"{directory}: {error.strerror}", LARGER_SHM)
    fact = f"{directory} has {size(usage.free)} free of {size(usage.total)}"
    users = [counted(asked.all_loaders, "loader process", "loader processes")]
    users = (users if asked.all_loaders else []) + (["NCCL"] if asked.gpus > 1 else [])
    if not users:
        return Diagnosis("shm", OK, fact)
    fact += f", for {' and '.join(users)}"
    if usage.free > ENOUGH_SHM:
        return Diagnosis("shm", OK, fact)
    remedy = LARGER_SHM + (", or fewer data.workers" if asked.all_loaders else "")
    return Diagnosis("shm", PROBLEM if usage.free <= _CONTAINER_SHM else WARNING, fact, remedy)


def ulimits(asked: Asked) -> Diagnosis:
    """Compare the limits of this process with what the ranks of this host need."""
    files, most = open_files_limit()
    tasks = _free_tasks()
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    more = "any number of" if tasks is None else f"{tasks} more"
    fact = f"{_count(files)} open files, {more} processes, {_size(locked)} of locked memory"
    raise_files = f"ulimit -n {max(4096, asked.open_files)}"
    if most != resource.RLIM_INFINITY and most < asked.open_files:
        raise_files += f" (the hard limit is {most}: raise nofile in /etc/security/limits.conf)"
    needed = asked.procs * (asked.threads + asked.loaders + _TASKS_PER_RANK)
    if files != resource.RLIM_INFINITY and files < asked.open_files:
        fact = f"{files} open files per process, and a rank needs {asked.open_files}"
        return Diagnosis("ulimits", PROBLEM, fact, raise_files)
    if tasks is not None and tasks < needed:
        fact = f"{tasks} more processes or threads are allowed, and the ranks need {needed}"
        remedy = "ulimit -u unlimited; for a container: --pids-limit=-1"
        return Diagnosis("ulimits", PROBLEM, fact, remedy)
    if space != resource.RLIM_INFINITY:
        fact = f"{_size(space)} of address space per process; CUDA and torch reserve far more"
        return Diagnosis("ulimits", WARNING, fact, "ulimit -v unlimited")
    if files != resource.RLIM_INFINITY and files < _ENOUGH_FILES:
        return Diagnosis("ulimits", WARNING, fact, raise_files)
    if asked.gpus and locked != resource.RLIM_INFINITY and Path("/sys/class/infiniband").exists():
        remedy = "ulimit -l unlimited; for a container: --ulimit memlock=-1"
        return Diagnosis("ulimits", WARNING, f"{fact}: too little for InfiniBand", remedy)
    return Diagnosis("ulimits", OK, fact)


def _free_tasks() -> int | None:
    """Return how many processes and threads may still be started here. None without a limit."""
    limits = []
    if (most := cgroups.numbers("pids", "pids.max")) and (
        now := cgroups.numbers("pids", "pids.current")
    ):
        limits.append(most[0] - now[0])
    of_user = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.getuid() != 0 and of_user != resource.RLIM_INFINITY:  # it does not apply to root
        limits.append(of_user - _tasks_of_user())
    return max(0, min(limits)) if limits else None


def _tasks_of_user() -> int:
    total, uid = 0, os.getuid()
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == uid:
            total += process.info["num_threads"] or 0
    return total


def _count(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def _size(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else size(number)


def existing(directory: Path) -> Path:
    """Return the directory, or the nearest one above it that exists."""
    path = directory.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def disk(asked: Asked) -> Diagnosis:
    """Compare the free disk where checkpoints go with their size, where that is known."""
    place = existing(asked.directory)
    try:
        found = os.statvfs(place)
    except OSError as error:
        return Diagnosis("disk", PROBLEM, f"{place}: {error.strerror}", "--runs DIR")
    free = found.f_bavail * found.f_frsize
    fact = f"{size(free)} free of {size(found.f_blocks * found.f_frsize)} at {place}"
    remedy = "free space there, or choose another directory with --runs DIR"
    if not os.access(place, os.W_OK | os.X_OK):
        return Diagnosis("disk", PROBLEM, f"{place} is not writable", "--runs DIR")
    if asked.checkpoint_bytes:
        fact += f"; a checkpoint takes {size(asked.checkpoint_bytes)}, {asked.kept} are kept"
        if free < asked.checkpoint_bytes:
            return Diagnosis("disk", PROBLEM, fact, remedy)
    if found.f_files and found.f_favail < _FEW_INODES:
        return Diagnosis("disk", WARNING, f"{fact}; {found.f_favail} inodes are free", remedy)
    if free < max(_LITTLE_DISK, (asked.kept + 1) * asked.checkpoint_bytes):
        return Diagnosis("disk", WARNING, fact, remedy)
    return Diagnosis("disk", OK, fact)


def fsync(asked: Asked) -> Diagnosis:
    """Measure what it costs to write 4 kB to the disk where checkpoints go."""
    place, times = existing(asked.directory), []
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            for _ in range(_FSYNCS):
                began = time.perf_counter()
                os.pwrite(file.fileno(), bytes(4096), 0)
                os.fsync(file.fileno())
                times.append(time.perf_counter() - began)
    except OSError as error:
        return Diagnosis("fsync", PROBLEM, f"{place}: {error.strerror}", "--runs DIR")
    median = statistics.median(times)
    fact = f"{1000 * median:.2g} ms, the median of {_FSYNCS}, at {place} ({filesystem(place)})"
    if median <= _SLOW_FSYNC_S:
        return Diagnosis("fsync", OK, fact)
    remedy = "choose a faster disk with --runs DIR; each checkpoint waits for it several times"
    return Diagnosis("fsync", WARNING, fact, remedy)


def filesystem(path: Path) -> str:
    """Return the type of the file system of a path, for example `ext4`."""
    real = path.resolve()
    above = {str(each) for each in (real, *real.parents)}
    mounts = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in above]
    innermost = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return innermost.fstype if innermost else "unknown"


def shared(asked: Asked) -> Diagnosis:
    """Return whether the run's directory can be one that all hosts of a launch see."""
    place = existing(asked.directory)
    kind = filesystem(place)
    if asked.hosts == 1:
        return Diagnosis("shared", OK, f"{place} is on {kind}; one host needs no more")
    if kind.startswith(_SHARED_TYPES):
        return Diagnosis("shared", OK, f"{place} is on {kind}, which hosts can share")
    fact = f"{place} is on {kind}: is it the same disk on all {asked.hosts} hosts?"
    remedy = "--runs DIR on a shared file system; `dtrain launch --preflight` proves that it is"
    return Diagnosis("shared", WARNING, fact, remedy)


class _Timex(ctypes.Structure):
    """`struct timex`, up to the fields that are read here."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
        ("further", ctypes.c_byte * 256),
    )


def clock(asked: Asked) -> Diagnosis:
    """Return whether the clock of this host is kept by NTP."""
    state = _Timex()
    if ctypes.CDLL(None).adjtimex(ctypes.byref(state)) < 0:
        return Diagnosis("clock", OK, "the kernel does not tell whether NTP keeps the clock")
    if not state.status & _UNSYNCHRONIZED:
        return Diagnosis("clock", OK, f"kept by NTP, within {state.maxerror / 1000:.1f} ms")
    fact = "no NTP keeps the clock of this host"
    if asked.hosts == 1:
        return Diagnosis("clock", OK, f"{fact}; one host needs none")
    return Diagnosis("clock", WARNING, fact, "timedatectl set-ntp true, on each host")
