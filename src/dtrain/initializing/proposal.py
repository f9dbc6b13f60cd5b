"""Propose where a job runs and on how many processes: from flags, an existing script, the place."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dtrain.initializing.existing import Existing
from dtrain.initializing.place import Place, Size, is_dashboard, of_partition
from dtrain.job.units import parse_nodes

_PORT = 29400
_UNKNOWN = Size(nodes=1, cores=2, gpus=0)


@dataclass(frozen=True)
class Wants:
    """What flags and answers say; None where they say nothing."""

    launcher: str | None = None
    nodes: str | None = None
    procs: int | None = None
    gpus: int | None = None
    options: dict[str, str] = field(default_factory=dict)
    """Options of the launcher."""


@dataclass(frozen=True)
class Proposal:
    """The content of a profile."""

    launcher: str
    nodes: str
    procs: int | None
    """Processes per node. None means one per GPU."""
    gpus: int
    launch: dict[str, Any]
    """Further fields of section `launch`."""
    options: dict[str, Any]
    about: str
    """What is known of the place, for the profile's description."""
    gpus_there: int
    """The number of GPUs that a node has, as far as it is known."""

    @property
    def processes(self) -> int:
        """The number of processes on all nodes."""
        return parse_nodes(self.nodes)[1] * (self.procs or self.gpus or 1)


def propose(place: Place, existing: Existing | None, wants: Wants) -> Proposal:
    """Fill in what is not wanted explicitly.

    Args:
        place: what was found.
        existing: what a given script says. None if there is none.
        wants: what the user says; it overrides the script.
    """
    given = existing or Existing()
    launcher = wants.launcher or given.launcher or place.launcher
    options: dict[str, Any] = dict(given.options) if launcher == given.launcher else {}
    options |= wants.options
    nodes = wants.nodes or given.nodes or "1"
    most = parse_nodes(nodes)[1]
    site = place.site.get(launcher, {})
    if launcher == "slurm" and existing is None:
        options = _chosen(place, wants.gpus or 0, site) | options
    if launcher == "ray" and place.ray and "address" not in site:
        options.setdefault("address", place.ray)
    if launcher == "ray" and is_dashboard(options.get("address", "")):
        options["submit"] = "job"
    about, size = _about(place, launcher, {**site, **options})
    if launcher == "local":
        size = replace(size, cores=size.cores // most, gpus=size.gpus // most)
    if launcher == "torchrun" and most > 1:
        options.setdefault("rdzv_endpoint", f"{socket.gethostname()}:{_PORT}")
    gpus = _gpus(given, wants, size.gpus, is_fresh=existing is None)
    procs = _procs(given, wants, gpus, size.cores, is_fresh=existing is None)
    if procs == gpus:
        procs = None
    return Proposal(launcher, nodes, procs, gpus, given.launch, options, about, size.gpus)


def _chosen(place: Place, gpus: int, site: Mapping[str, Any]) -> dict[str, Any]:
    """Return a partition and an account, unless the user's own profile has them.

    It is the first partition, the default one, unless only another one has so many GPUs.
    """
    able = [each.name for each in place.partitions if each.gpus >= gpus]
    names = able or [each.name for each in place.partitions]
    found = {"partition": names[:1], "account": place.accounts[:1]}
    return {name: some[0] for name, some in found.items() if some and name not in site}


def _about(place: Place, launcher: str, options: dict[str, Any]) -> tuple[str, Size]:
    """Return a description of where the launcher starts processes, and the size of that place."""
    if launcher == "slurm":
        name = options.get("partition")
        for each in place.partitions:
            if each.name == name or (name is None and each.is_default):
                size = of_partition(each)
                return f"Slurm partition {each.name}, {size.shown}, limit {each.limit}", size
        return "a batch job of Slurm", _UNKNOWN
    if launcher == "ray":
        if "address" in options:
            return f"the Ray cluster at {options['address']}", place.ray_size or _UNKNOWN
        return "a Ray cluster that each launch starts on this machine", place.host
    if launcher == "torchrun":
        return "hosts on which you run the command, each a node", place.host
    return f"this machine, {place.host.shown.removeprefix('1 node, ')}", place.host


def _gpus(given: Existing, wants: Wants, there: int, *, is_fresh: bool) -> int:
    """Return the number of GPUs per node. `there` are those that a node has."""
    if wants.gpus is not None:
        return wants.gpus
    if given.gpus is not None and wants.procs is None:
        return given.gpus
    procs = given.procs if wants.procs is None else wants.procs
    if isinstance(procs, int):
        return procs if procs <= there else 0
    if procs == "cpu":
        return 0
    return there if procs or is_fresh else min(there, 1)


def _procs(given: Existing, wants: Wants, gpus: int, cores: int, *, is_fresh: bool) -> int | None:
    if wants.procs is not None:
        return wants.procs
    if isinstance(given.procs, int) and wants.gpus is None:
        return given.procs
    if gpus:
        return None
    if given.procs is not None and not isinstance(given.procs, int):
        return max(1, cores)
    return min(2, max(1, cores)) if is_fresh else given.procs or 1
