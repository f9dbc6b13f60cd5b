"""What a cluster is: what was asked for, where its files are, what is running."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MODES = ("netns", "userns", "ports")
LONGEST_DIRECTORY = 58
"""Characters. A job step listens on DIR/spool/127.0.0.9/127.0.0.9_99999.4294967291, and the kernel
takes 107 for the whole name of such a socket."""


class ClusterError(Exception):
    """Something a person can mend; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class Spec:
    """What was asked for."""

    nodes: int = 4
    gpus_per_node: int = 0
    """Pretended: scheduled and counted as GPUs, with no device behind."""
    cpus_per_node: int = 8
    """Claimed, not real: nodes share the machine's cores."""
    memory_mb: int = 4096
    accounting: bool = False
    """Whether `sacct` works; takes a database, which is most of the start's time."""
    associations: bool = False
    """With accounting: refuse accounts and QOS that it does not know."""
    memory_limits: bool = False
    """Kill a job that uses more memory than it asked for; takes root and cgroups of version 1."""
    node_prefix: str = "n"
    """What the nodes' names begin with. Clusters with memory limits share the machine's cgroups,
    which are named after the nodes: give each its own."""
    unlike: Sequence[str] = ()
    """Instead of `nodes` that are all alike, each with its name and what it claims, as slurm.conf
    says it: `fat3 CPUs=4 RealMemory=2048 Gres=gpu:2 Feature=a100`."""
    mode: str = "auto"
    port: int | None = None
    """In mode `ports`, the first of the ports taken. None: some that are free."""
    slurmd_timeout_s: int = 10
    """Until a silent node is DOWN; noticed a few seconds later. Under 5 a loaded machine loses
    nodes that are merely slow."""
    keep: bool = False
    """Leave the directory, with the logs, when the cluster ends."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", *MODES):
            raise ClusterError(f"no mode {self.mode!r}: one of auto, {', '.join(MODES)}")
        object.__setattr__(self, "unlike", tuple(self.unlike))
        if self.unlike:
            self._check_unlike()
        if not 1 <= self.nodes <= 100:
            raise ClusterError(f"{self.nodes} nodes: from 1 to 100 can be had")
        if not 0 <= self.gpus_per_node <= 64:
            raise ClusterError(f"{self.gpus_per_node} GPUs per node: from 0 to 64 can be had")
        if self.port is not None and not 1024 <= self.port <= 65000:
            raise ClusterError(f"port {self.port}: from 1024 to 65000 can be had")

    def _check_unlike(self) -> None:
        object.__setattr__(self, "nodes", len(self.unlike))
        if self.mode == "ports":
            raise ClusterError("unlike nodes take hosts of their own, not mode ports")
        for line in self.unlike:
            name, _, claim = line.partition(" ")
            if not re.fullmatch(r"[a-z][a-z0-9-]{0,8}", name) or "CPUs=" not in claim:
                raise ClusterError(
                    f"node {line!r}: a name of at most 9 small letters, digits and dashes, then "
                    "what it claims, as `fat3 CPUs=4 RealMemory=2048`"
                )

    @property
    def node_names(self) -> list[str]:
        """As Slurm knows them; without hosts files of their own, names that need no resolving."""
        if self.unlike:
            return [line.partition(" ")[0] for line in self.unlike]
        if self.mode == "ports":
            return [f"127.0.0.{2 + index}" for index in range(self.nodes)]
        return [f"{self.node_prefix}{index}" for index in range(self.nodes)]

    @property
    def claims(self) -> dict[str, str]:
        """What each node claims to have, in the words of slurm.conf, by its name."""
        if self.unlike:
            return {name: claim for name, _, claim in (line.partition(" ") for line in self.unlike)}
        gpus = f" Gres=gpu:{self.gpus_per_node}" if self.gpus_per_node else ""
        claim = f"CPUs={self.cpus_per_node} RealMemory={self.memory_mb}{gpus}"
        return dict.fromkeys(self.node_names, claim)

    @property
    def gpus(self) -> dict[str, int]:
        """How many GPUs each node claims, by its name."""
        found = {name: re.search(r"gpu:(\d+)", claim) for name, claim in self.claims.items()}
        return {name: int(match[1]) if match else 0 for name, match in found.items()}

    @property
    def cgroups(self) -> list[Path]:
        """The folders of the kernel that memory limits make."""
        names = self.node_names if self.memory_limits else []
        return [Path("/sys/fs/cgroup/memory", f"slurm_{name}") for name in names]


@dataclass(frozen=True)
class Files:
    """Every path of a cluster."""

    root: Path

    FOLDERS = ("etc", "run", "log", "spool", "state", "dev", "tmp", "bin", "mysql")

    @classmethod
    def at(cls, directory: str | Path) -> Files:
        """The files below a directory whose name is short enough for sockets."""
        root = Path(directory).absolute()
        if len(str(root)) > LONGEST_DIRECTORY:
            raise ClusterError(
                f"the directory's path is too long, {len(str(root))} characters: {root}\n"
                f"Slurm makes sockets in it, which leaves room for {LONGEST_DIRECTORY}. "
                "Take a shorter one, as /tmp/slurm."
            )
        if any(char.isspace() or char in "#,\"'\\%=" for char in str(root)):
            raise ClusterError(
                f"Slurm's files cannot tell a path like this: {str(root)!r}\n"
                "Take one without spaces, quotes, commas, # % = or backslashes."
            )
        return cls(root)

    def __getattr__(self, name: str) -> Path:
        if name in self.FOLDERS:
            return self.root / name
        raise AttributeError(name)

    @property
    def slurm_conf(self) -> Path:
        """What SLURM_CONF names."""
        return self.etc / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        """Of this cluster's own munged."""
        return self.run / "munge.sock"

    @property
    def control(self) -> Path:
        """The socket on which the keeper takes orders."""
        return self.run / "control.sock"

    @property
    def state_json(self) -> Path:
        """What runs now; see `State`."""
        return self.root / "state.json"


@dataclass
class Host:
    """A machine of its own, made of namespaces."""

    ip: str
    holder: int
    """The process whose end takes the host along."""
    init: int
    """The process in its namespaces; process 1 there, or the holder itself."""


@dataclass
class State:
    """What runs now. Written by the keeper alone, read by everybody."""

    spec: Spec
    keeper: int
    hosts: dict[str, Host] = field(default_factory=dict)
    daemons: dict[str, int] = field(default_factory=dict)
    ready: bool = False

    @classmethod
    def load(cls, files: Files) -> State:
        """Of the cluster in this directory."""
        try:
            raw = json.loads(files.state_json.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise ClusterError(f"no cluster runs in {files.root}") from None
        except ValueError:
            raise ClusterError(f"{files.state_json} is not of a cluster") from None
        if not isinstance(raw, dict) or not raw.keys() >= {"spec", "keeper", "hosts"}:
            raise ClusterError(f"{files.state_json} is not of a cluster")
        hosts = {name: Host(**host) for name, host in raw.pop("hosts").items()}
        return cls(spec=Spec(**raw.pop("spec")), hosts=hosts, **raw)

    def save(self, files: Files) -> None:
        """Whole or not at all: others read it at any time."""
        aside = files.state_json.with_suffix(".new")
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        os.replace(aside, files.state_json)
