"""Find what the place has in which `dtrain init` runs: cores, GPUs, Slurm, a Ray cluster."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dtrain import catalog, ports
from dtrain.doctor import gpus
from dtrain.errors import DtrainError
from dtrain.job.profile import load_profile
from dtrain.launchers.ray import cluster as ray_cluster
from dtrain.launchers.slurm.partitions import Partition, accounts, partitions
from dtrain.words import counted

_RAY_PORT = 8265


@dataclass(frozen=True)
class Size:
    """Nodes, and what each of them has."""

    nodes: int
    cores: int
    gpus: int
    alike: bool = True

    @property
    def shown(self) -> str:
        each = "" if self.nodes == 1 else " each" if self.alike else " on most"
        with_gpus = f", {counted(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{counted(self.nodes, 'node')}, {counted(self.cores, 'core')}{with_gpus}{each}"


@dataclass(frozen=True)
class Place:
    """What was found."""

    host: Size
    partitions: tuple[Partition, ...] = ()
    accounts: tuple[str, ...] = ()
    ray: str | None = None
    """The address of a Ray cluster that answers."""
    ray_size: Size | None = None
    """None if it is not known, for example because only its dashboard is."""
    missing: tuple[str, ...] = ()
    """Sentences about what is there and cannot be used."""
    site: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Launcher → options that the user's own profile sets, outside of the project."""

    @property
    def launcher(self) -> str:
        """The launcher that fits best."""
        return "ray" if self.ray else "slurm" if self.partitions else "local"

    @property
    def launchers(self) -> list[str]:
        """The launchers among which a user may choose here."""
        found = {"local": True, "slurm": bool(self.partitions), "ray": bool(self.ray)}
        return [name for name, is_here in found.items() if is_here]

    def lines(self) -> list[str]:
        """Return what was found, for a person."""
        found = [f"this machine: {self.host.shown.removeprefix('1 node, ')}"]
        for each in self.partitions:
            size = of_partition(each).shown
            default = " (default)" if each.is_default else ""
            found.append(f"Slurm partition {each.name}{default}: {size}; limit {each.limit}")
        if self.accounts:
            found.append(f"Slurm accounts: {', '.join(self.accounts)}")
        if self.ray:
            size = f": {self.ray_size.shown}" if self.ray_size else ""
            found.append(f"Ray cluster at {self.ray}{size}")
        return [*found, *self.missing]


def of_partition(partition: Partition) -> Size:
    return Size(partition.nodes, partition.cores, partition.gpus, partition.alike)


def find_place(launcher: str | None = None, address: str | None = None) -> Place:
    """Look at this machine, at Slurm and at Ray.

    Args:
        launcher: the launcher that is already chosen. The cluster of another one is not asked.
        address: the address of a Ray cluster. None means that it is looked for.
    """
    shown = gpus.usable(os.environ.get(gpus.VISIBLE), gpus.installed()) or 0
    host = Size(1, len(os.sched_getaffinity(0)), shown)
    missing: list[str] = []
    found: tuple[Partition, ...] = ()
    ray, ray_size = None, None
    if launcher in (None, "slurm") and shutil.which("sinfo"):
        try:
            found = tuple(partitions())
        except DtrainError as error:
            missing.append(str(error))
    if launcher in (None, "ray") and (address := address or ray_cluster.found_address()):
        try:
            ray_size = _ray_size(address)
            ray = address
        except DtrainError as error:
            missing.append(f"Ray at {address}: {error}")
    owned = tuple(accounts()) if found else ()
    site = {name: _site_options(name) for name in ("slurm", "ray")}
    return Place(host, found, owned, ray, ray_size, tuple(missing), site)


def _site_options(launcher: str) -> dict[str, Any]:
    """Return the options of the profile that one of the project extends."""
    options = load_profile(launcher, ".", of_project=False).spec.options
    return {name: value for name, value in options.items() if value is not None}


def is_dashboard(address: str) -> bool:
    """Return whether an address of Ray is the URL of a dashboard, which takes jobs."""
    return address.startswith(("http://", "https://"))


def _ray_size(address: str) -> Size | None:
    """Return the size of a Ray cluster that answers.

    Raises:
        DtrainError: it cannot be used.
    """
    if missing := catalog.problem_of("launcher", "ray"):
        raise DtrainError(missing, code="plan.missing-package")
    if is_dashboard(address):
        parts = urlsplit(address)
        if not ports.is_listening(f"{parts.hostname}:{parts.port or _RAY_PORT}"):
            raise DtrainError("no dashboard answers there", code="ray.no-cluster")
        return None
    try:
        ports.parse_address(address)
    except ValueError as error:
        raise DtrainError(f"{error}, and no URL of a dashboard", code="ray.no-cluster") from None
    nodes = ray_cluster.nodes_of(address)
    totals = [each.total for each in nodes]
    largest = max(totals, key=lambda each: (each.get("GPU", 0), each.get("CPU", 0)), default={})
    cores, found = int(largest.get("CPU", 0)), int(largest.get("GPU", 0))
    return Size(len(nodes), max(1, cores), found)
