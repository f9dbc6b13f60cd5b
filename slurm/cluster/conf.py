"""The text of Slurm's configuration files; nothing is started here.

Made for Slurm 22.05 (Debian 12) and tests: what a production cluster does in minutes, this one
does in seconds. The figures were measured.
"""

from __future__ import annotations

import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from os import getuid
from pathlib import Path

from cluster.spec import Files, Spec

NETWORK = "10.77"
CTL_IP = f"{NETWORK}.0.1"
LOGIN_IP = f"{NETWORK}.0.2"

_BEHAVIOUR = """\
AuthType=auth/munge
CredType=cred/munge
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
# No affinity: the nodes claim more than the machine has, and share it.
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# A submitted job runs in less than 1 s; with the defaults, 3 s.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1
PriorityType=priority/basic
# A node that was silent comes back by itself, one set down by hand does not.
ReturnToService=1
SlurmctldTimeout=10
TCPTimeout=1
BatchStartTimeout=10
# From TERM to KILL; 30 by default.
KillWait=5
# A step that could not tell the controller of its end tries again after 60 s; sooner than that the
# node would be drained.
UnkillableStepTimeout=90
InactiveLimit=0
# Finished jobs can be asked for 5 minutes without accounting.
MinJobAge=300
WaitTime=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A job that is preempted gets the signal it asked for, as before its time limit.
SlurmctldParameters=preempt_send_user_signal
"""

_PARTITIONS = """\
PartitionName=DEFAULT Nodes=ALL State=UP DefaultTime=60 MaxTime=INFINITE PreemptMode=OFF
PartitionName=main PriorityTier=10 Default=YES
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=3
PartitionName=high PriorityTier=20
PartitionName=short PriorityTier=10 DefaultTime=1 MaxTime=2
"""


@dataclass(frozen=True)
class Addresses:
    """Where the daemons listen."""

    ctl_name: str
    ctl_ip: str
    first_port: int

    @classmethod
    def of(cls, spec: Spec) -> Addresses:
        """Hosts of their own have Slurm's usual ports; sharing one, each has its own."""
        if spec.mode != "ports":
            return cls("ctl", CTL_IP, 6817)
        assert spec.port is not None, "chosen before"
        return cls("localhost", "127.0.0.1", spec.port)

    @property
    def slurmdbd(self) -> int:
        """Its port."""
        return self.first_port + 2

    @property
    def mariadb(self) -> int:
        """Its port."""
        return self.first_port + 3

    def slurmd(self, index: int) -> int:
        """The port of node `index`, in mode `ports`."""
        return self.first_port + 10 + index


def node_ip(index: int) -> str:
    """Of node `index`, where hosts have networks of their own."""
    return f"{NETWORK}.1.{1 + index}"


def user() -> str:
    """Who runs it all."""
    return pwd.getpwuid(getuid()).pw_name


def slurm_conf(spec: Spec, files: Files) -> str:
    """All of slurm.conf."""
    return "\n".join(
        [_places(spec, files), _BEHAVIOUR, _timing(spec), _accounting(spec, files), _nodes(spec)]
    ) + ("\n" + _PARTITIONS)


def gres_conf(spec: Spec, devices: list[Path]) -> str:
    """A line for each GPU; Slurm 22.05 wants a device file with each.

    The flag keeps variables of other makers' GPUs out of jobs.
    """
    return "".join(
        f"NodeName={name} Name=gpu Flags=nvidia_gpu_env File={path}\n"
        for name, count in spec.gpus.items()
        for path in devices[:count]
    )


def cgroup_conf() -> str:
    """Memory, and nothing else."""
    constrain = {"Cores": "no", "Devices": "no", "RAMSpace": "yes", "SwapSpace": "no"}
    return _lines(
        {
            "CgroupPlugin": "cgroup/v1",
            "CgroupMountpoint": "/sys/fs/cgroup",
            **{f"Constrain{what}": value for what, value in constrain.items()},
        }
    )


def hosts(spec: Spec) -> str:
    """The hosts file that every host sees."""
    nodes = {name: node_ip(index) for index, name in enumerate(spec.node_names)}
    lines = {"localhost": "127.0.0.1", "ctl": CTL_IP, "login": LOGIN_IP, **nodes}
    return "".join(f"{ip} {name}\n" for name, ip in lines.items())


def slurmdbd_conf(spec: Spec, files: Files) -> str:
    """All of slurmdbd.conf."""
    where = Addresses.of(spec)
    return _lines(
        {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={files.munge_socket}",
            "DbdHost": where.ctl_name,
            "DbdAddr": where.ctl_ip,
            "DbdPort": where.slurmdbd,
            "SlurmUser": user(),
            "LogFile": files.log / "slurmdbd.log",
            "PidFile": files.run / "slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1",
            "StoragePort": where.mariadb,
            "StorageUser": "slurm",
            "StoragePass": "slurm",
            "StorageLoc": "slurm_acct_db",
        }
    )


def _places(spec: Spec, files: Files) -> str:
    where = Addresses.of(spec)
    return _lines(
        {
            "ClusterName": "dtrain",
            "SlurmctldHost": f"{where.ctl_name}({where.ctl_ip})",
            "SlurmctldPort": where.first_port,
            "SlurmdPort": where.first_port + 1,
            "SlurmUser": user(),
            "SlurmdUser": user(),
            # A requeued job waits for cred_expire + 1 s: 121 by default. Under 5 means the default.
            "AuthInfo": f"socket={files.munge_socket},cred_expire=5",
            "StateSaveLocation": files.state,
            "SlurmdSpoolDir": f"{files.spool}/%n",
            "SlurmctldPidFile": files.run / "slurmctld.pid",
            "SlurmdPidFile": f"{files.run}/slurmd-%n.pid",
            "SlurmctldLogFile": files.log / "slurmctld.log",
            "SlurmdLogFile": f"{files.log}/slurmd-%n.log",
        }
    )


def _timing(spec: Spec) -> str:
    return _lines(
        {
            "SlurmdTimeout": spec.slurmd_timeout_s,
            "MessageTimeout": max(2, spec.slurmd_timeout_s // 2),
            "DefMemPerCPU": spec.memory_mb // spec.cpus_per_node,
            "TaskPlugin": "task/cgroup" if spec.memory_limits else "task/none",
        }
    )


def _accounting(spec: Spec, files: Files) -> str:
    if not spec.accounting:
        return "JobAcctGatherType=jobacct_gather/none\n"
    where = Addresses.of(spec)
    return _lines(
        {
            "JobAcctGatherType": "jobacct_gather/linux",
            "JobAcctGatherFrequency": "task=5",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": where.ctl_ip,
            "AccountingStoragePort": where.slurmdbd,
            # This connection takes its munge socket from here and not from AuthInfo.
            "AccountingStoragePass": files.munge_socket,
            "AccountingStorageTRES": "gres/gpu",
            **({"AccountingStorageEnforce": "associations,qos"} if spec.associations else {}),
        }
    )


def _nodes(spec: Spec) -> str:
    lines = []
    for index, (name, claim) in enumerate(spec.claims.items()):
        where = f"NodeAddr={node_ip(index)}"
        if spec.mode == "ports":
            port = Addresses.of(spec).slurmd(index)
            where = f"NodeHostname=localhost NodeAddr={name} Port={port}"
        lines.append(f"NodeName={name} {where} {claim} State=UNKNOWN\n")
    return "".join(lines)


def _lines(settings: Mapping[str, object]) -> str:
    return "".join(f"{name}={value}\n" for name, value in settings.items())
