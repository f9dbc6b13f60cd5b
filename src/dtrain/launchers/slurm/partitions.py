"""Query what a Slurm cluster has: partitions with their nodes, and the accounts of this user."""

from __future__ import annotations

import getpass
import re
import shutil
from collections import Counter
from dataclasses import dataclass

from dtrain.errors import LaunchError
from dtrain.launchers.slurm.queue import run_command

_ANSWER_S = 10.0
_FORMAT = "%P|%a|%l|%D|%c|%G"
_GPUS = re.compile(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)")
"""The number in `gpu:4` or `gpu:a100:4(S:0-1)`."""


@dataclass(frozen=True)
class Partition:
    """A partition into which jobs can be submitted. Cores and GPUs are those of most nodes."""

    name: str
    is_default: bool
    nodes: int
    cores: int
    gpus: int
    alike: bool
    """Whether all nodes have the same cores and GPUs."""
    limit: str
    """The time limit of a job, in Slurm's form, for example `1-00:00:00` or `infinite`."""


def partitions() -> list[Partition]:
    """Return the partitions of the cluster, the default one first.

    Raises:
        LaunchError: there is no sinfo here, or it does not answer.
    """
    listed = run_command(
        "sinfo", "--noheader", "--exact", f"--format={_FORMAT}", timeout_s=_ANSWER_S
    )
    if listed.returncode != 0:
        text = (listed.stderr.strip().splitlines() or ["no answer"])[0]
        raise LaunchError(f"sinfo does not answer: {text}", code="slurm.controller-silent")
    return parse_partitions(listed.stdout)


def parse_partitions(text: str) -> list[Partition]:
    """Parse the output of sinfo. Nodes of different sizes are different lines of a partition."""
    sizes: dict[str, Counter[tuple[int, int]]] = {}
    limits: dict[str, str] = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 6 and fields[1] == "up" and (fields[3] + fields[4]).isdigit():
            name, _, limits[fields[0]], nodes, cores, gres = fields
            size = int(cores), sum(int(number) for number in _GPUS.findall(gres))
            sizes.setdefault(name, Counter())[size] += int(nodes)
    found = [
        Partition(
            name.removesuffix("*"),
            name.endswith("*"),
            of_name.total(),
            *of_name.most_common(1)[0][0],
            alike=len(of_name) == 1,
            limit=limits[name],
        )
        for name, of_name in sizes.items()
    ]
    return sorted(found, key=lambda each: not each.is_default)


def accounts() -> list[str]:
    """Return the accounts of this user, the default one first. Empty without accounting."""
    if shutil.which("sacctmgr") is None:
        return []
    shown = ("--noheader", "--parsable2", "show", "user", getpass.getuser(), "withassoc")
    try:
        listed = run_command(
            "sacctmgr", *shown, "format=DefaultAccount,Account", timeout_s=_ANSWER_S
        )
    except LaunchError:
        return []
    if listed.returncode != 0:
        return []
    pairs = [line.strip().split("|") for line in listed.stdout.splitlines()]
    names = [pair[0] for pair in pairs] + [pair[-1] for pair in pairs]
    return [name for name in dict.fromkeys(names) if name]
