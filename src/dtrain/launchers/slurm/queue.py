"""Query the states of batch jobs from squeue, scontrol and, where there is accounting, sacct."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dtrain.environ import inherited_env
from dtrain.errors import LaunchError
from dtrain.job.units import parse_duration

_FIELDS = ("JobArrayID", "State", "Reason", "NodeList", "exit_code", "RestartCnt")
_FORMAT = ",".join(f"{name}:|" for name in _FIELDS)
_TIMEOUT_S = 60
_MIN_PAUSE_S, _MAX_PAUSE_S, _PAUSE_GROWTH = 0.5, 15.0, 1.3

_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "GONE", "NODE_FAIL",
    "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip

# why a job waits; other reasons are shown as Slurm reports them
_WAITS = {
    "Resources": "waiting for nodes to become free",
    "Priority": "waiting behind jobs of higher priority",
    "Dependency": "waiting for another job to end",
    "BeginTime": "waiting for its begin time, as after every requeue",
    "JobArrayTaskLimit": "waiting for other runs of its array to end",
    "JobHeldUser": "held; release it with `scontrol release`",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "Licenses": "waiting for licenses",
    "Reservation": "waiting for its reservation to begin",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS allows",
    "AssocMaxJobsLimit": "your account runs as many jobs as it is allowed",
    "None": "waiting for the scheduler",
}
# why a job waits forever
_UNSCHEDULABLE = {
    "PartitionTimeLimit": ("time", "the time limit is above that of the partition"),
    "PartitionNodeLimit": ("nodes", "the number of nodes is above the partition's limit"),
    "PartitionConfig": ("", "the request is above a limit of the partition"),
    "BadConstraints": ("constraint", "no node has these features"),
    "DependencyNeverSatisfied": ("dependency", "the dependency can no longer be satisfied"),
    "InvalidAccount": ("account", "you are not allowed to use the account"),
    "InvalidQOS": ("qos", "you are not allowed to use the QOS"),
    "QOSMaxWallDurationPerJobLimit": ("time", "the time limit is above that of the QOS"),
    "AssocMaxWallDurationPerJobLimit": ("time", "the time limit is above that of the account"),
    "AccountNotAllowed": ("account", "the account is not allowed in this partition"),
    "QOSNotAllowed": ("qos", "the QOS is not allowed in this partition"),
}  # fmt: skip


class Unreachable(LaunchError):
    """An error for a controller that does not answer. Facts known before are still valid."""

    code = "slurm.controller-silent"


@dataclass(frozen=True)
class Job:
    job_id: str
    state: str
    """The state by Slurm's name: PENDING, RUNNING, COMPLETED, …; GONE when Slurm has forgotten
    it."""
    reason: str = "None"
    nodes: str = ""
    exit_code: int = 0
    """The exit code in a shell's form: 128 + N for signal N."""
    restarts: int = 0
    """The number of times that it was requeued."""

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    @property
    def unschedulable(self) -> tuple[str, str] | None:
        """The option and the reason why a job will never start. None means that it may start.

        The option is empty when Slurm does not report which of several options is the cause.
        """
        return _UNSCHEDULABLE.get(self.reason) if self.state == "PENDING" else None

    @property
    def description(self) -> str:
        text = f"job {self.job_id} {self.state.lower().replace('_', ' ')}"
        if self.state == "PENDING":
            why = self.unschedulable[1] if self.unschedulable else _WAITS.get(self.reason, "")
            return f"{text}: {why} ({self.reason})" if why else f"{text}: {self.reason}"
        if self.state == "GONE":
            return f"job {self.job_id} is no longer known to Slurm"
        return f"{text} on {self.nodes}" if self.nodes and not self.is_over else text


def run_command(
    *argv: str, input_text: str | None = None, timeout_s: float = _TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, with the environment of a process outside any job.

    Raises:
        LaunchError: there is no such command here.
        Unreachable: it does not end in time.
    """
    try:
        return subprocess.run(
            argv, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s,
            env=slurm_env(), input=input_text, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise LaunchError(
            f"{argv[0]} is not installed here; use launcher 'slurm' where Slurm's commands are",
            code="slurm.no-commands",
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{argv[0]} has not answered for {timeout_s:g} s") from None


def slurm_env() -> dict[str, str]:
    """Return the environment for Slurm's commands: that of no other job, but the same
    configuration."""
    env = inherited_env()
    if "SLURM_CONF" in os.environ:
        env["SLURM_CONF"] = os.environ["SLURM_CONF"]
    return env


def parse_queue(text: str) -> dict[str, Job]:
    """Parse the output of `squeue -O`, by job id."""
    found = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) > len(_FIELDS):
            job_id, state, reason, nodes, code, restarts = fields[:6]
            exit_code = _shell_code(_int(code) >> 8, _int(code) & 0x7F)
            found[job_id] = Job(job_id, state, reason, nodes, exit_code, _int(restarts))
    return found


def parse_accounting(text: str) -> dict[str, Job]:
    """Parse the output of `sacct -X -P`, by job id. For a requeued job, the last run is
    returned."""
    found = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) >= 4:
            job_id, state, code, nodes = fields[:4]
            exit_code, _, signal = code.partition(":")
            name = (state.split() or ["UNKNOWN"])[0]  # `CANCELLED by 0`
            nodes = "" if nodes == "None assigned" else nodes
            status = _shell_code(_int(exit_code), _int(signal))
            found[job_id] = Job(job_id, name, "None", nodes, status)
    return found


def query(job_ids: Iterable[str]) -> dict[str, Job]:
    """Return the states of these jobs, and of all other jobs of this user that Slurm knows.

    It calls squeue once for all of them, and sacct once for those that squeue has forgotten.

    Raises:
        Unreachable: the controller does not answer.
    """
    wanted = list(dict.fromkeys(job_ids))
    flags = ("--noheader", "--array", "--states=all", f"--user={os.getuid()}")
    listed = run_command("squeue", *flags, f"--Format={_FORMAT}")
    if listed.returncode != 0:
        raise Unreachable(_first_line(listed.stderr))
    known = parse_queue(listed.stdout)
    missing = [job_id for job_id in wanted if job_id not in known]
    if missing:
        known |= _from_accounting(missing)
    return {job_id: Job(job_id, "GONE") for job_id in wanted} | known


def _from_accounting(job_ids: list[str]) -> dict[str, Job]:
    if shutil.which("sacct") is None:
        return {}
    shown = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode,NodeList")
    listed = run_command("sacct", *shown, f"--jobs={','.join(job_ids)}")
    return parse_accounting(listed.stdout) if listed.returncode == 0 else {}


def nodes_down(job: Job) -> dict[str, str]:
    """Return the nodes of a job that no longer run, with Slurm's reason for each."""
    if not job.nodes:
        return {}
    shown = ("--Node", "--noheader", "--states=down,fail", "--format=%N|%T, %E")
    try:
        listed = run_command("sinfo", *shown, f"--nodes={job.nodes}")
    except LaunchError:
        return {}
    return dict(line.strip().split("|", 1) for line in listed.stdout.splitlines() if "|" in line)


def node_states(partition: str | None) -> dict[str, int]:
    """Return how many nodes of a partition are in each state, for example `{"idle": 3}`.

    Args:
        partition: partitions with commas. None means the default one.
    """
    names = [f"--partition={partition}"] if partition else []
    shown = ("--noheader", "--format=%P|%T|%D")
    found: dict[str, int] = {}
    for line in run_command("sinfo", *shown, *names).stdout.splitlines():
        name, state, count = line.strip().split("|")
        if partition or name.endswith("*"):  # Slurm marks the default one
            found[state] = found.get(state, 0) + _int(count)
    return found


def time_limits(wanted: str | None) -> dict[str, float]:
    """Return seconds that a job may take in each partition that it may use.

    The result is empty when Slurm does not answer.

    Args:
        wanted: partitions with commas. None means the default one.
    """
    try:
        listed = _partitions()
    except LaunchError:
        return {}
    limits = {}
    for line in listed.splitlines():
        fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        name = fields.get("PartitionName", "")
        if name in wanted.split(",") if wanted else fields.get("Default") == "YES":
            limits[name] = _seconds(fields.get("MaxTime", ""))
    return limits


@functools.cache
def _partitions() -> str:
    """Return scontrol's output. It is cached, because each run of an array is planned
    separately."""
    listed = run_command("scontrol", "show", "partition", "--oneliner")
    if listed.returncode != 0:
        raise Unreachable(_first_line(listed.stderr))
    return listed.stdout


def _seconds(limit: str) -> float:
    """Return the seconds of a limit in Slurm's form, `[D-]HH:MM:SS` or `UNLIMITED`."""
    try:
        return parse_duration(limit)
    except ValueError:
        return float("inf")


class Watcher:
    """A cache of the states of jobs, which queries Slurm again after a growing pause."""

    def __init__(self) -> None:
        self._known: dict[str, Job] = {}
        self._queried_at = 0.0
        self._pause_s = _MIN_PAUSE_S
        self._wanted: set[str] = set()
        self.error: LaunchError | None = None
        """The error of the last query of Slurm; None if it succeeded."""

    def job(self, job_id: str, *, now: bool = False) -> Job:
        """Return a job's last known state. With `now`, query it again, unless that was a moment
        ago."""
        self._wanted.add(job_id)
        wait_s = _MIN_PAUSE_S if now else self._pause_s
        if job_id not in self._known or time.monotonic() - self._queried_at >= wait_s:
            self._update()
        return self._known[job_id]

    def forget(self, job_id: str) -> None:
        """Forget this job's state, because it was changed. The next call queries at once."""
        self._known.pop(job_id, None)

    def _update(self) -> None:
        before: Mapping[str, Job] = dict(self._known)
        self._queried_at = time.monotonic()
        try:
            self._known = query(self._wanted)
            self.error = None
        except LaunchError as error:
            self.error = error
            unknown = {job_id: Job(job_id, "UNKNOWN") for job_id in self._wanted}
            self._known = unknown | self._known
        same = all(self._known[job_id] == before.get(job_id) for job_id in self._wanted)
        self._pause_s = min(self._pause_s * _PAUSE_GROWTH, _MAX_PAUSE_S) if same else _MIN_PAUSE_S


shared = Watcher()
"""The watcher of this process, for many jobs: those of an array, or all that `dtrain runs`
lists."""


def query_cached(job_id: str, *, now: bool = False) -> Job:
    """Return the state of a job, see `Watcher.job`. Many jobs in a row cost one call.

    Raises:
        Unreachable: the controller does not answer.
        LaunchError: there is no squeue here.
    """
    job = shared.job(job_id, now=now)
    if shared.error is not None:
        raise shared.error
    return job


def _shell_code(code: int, signal: int) -> int:
    return 128 + signal if signal else code


def _int(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[0]
