"""Which nodes of a Ray cluster can take a node of ours, and what the others are short of."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.launchers.ray.options import RayOptions
from dtrain.plan import LaunchPlan

_UNITS = {"memory": 1024**3}
_SHOWN_NODES = 12


@dataclass(frozen=True)
class ResourceRequest:
    """What is asked of the cluster."""

    least: int
    most: int
    """Nodes."""
    each: dict[str, float]
    """Resources of each node, by Ray's names; memory in bytes."""
    labels: dict[str, str]

    @classmethod
    def of(cls, plan: LaunchPlan) -> ResourceRequest:
        """What a plan asks for."""
        options = RayOptions.of(plan.options)
        each: dict[str, float] = {
            "CPU": options.cpus_per_node or plan.procs_per_node * plan.replicas
        }
        if plan.gpus_per_node:
            each["GPU"] = plan.gpus_per_node
        if options.memory:
            each["memory"] = options.memory
        each |= options.resources
        return cls(plan.min_nodes, plan.nodes, each, dict(options.labels))

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        labels = "".join(f", label {name}={value}" for name, value in self.labels.items())
        nodes = "node" if self.most == 1 else "nodes"
        return f"{count} {nodes} with {_amounts(self.each)} each{labels}"


@dataclass(frozen=True)
class NodeView:
    """A node of the cluster as Ray describes it."""

    id: str
    name: str
    address: str
    port: int
    """Of its raylet."""
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str]

    def lacks(self, wish: ResourceRequest, *, now: bool) -> list[str]:
        """What it is short of, in words; empty when it can take a node of the wish.

        Args:
            wish: what is asked.
            now: of what is free at the moment, not of what it has.
        """
        have = self.free if now else self.total
        short = [
            f"{_amount(name, need - have.get(name, 0))} {name} short"
            for name, need in wish.each.items()
            if have.get(name, 0) + 1e-6 < need
        ]
        return short + [
            f"label {name} is {self.labels.get(name, 'missing')}"
            for name, value in wish.labels.items()
            if self.labels.get(name) != value
        ]


def views(nodes: Iterable[Mapping[str, Any]], free: Mapping[str, Any]) -> list[NodeView]:
    """The living nodes of `ray.nodes()`, in order of their addresses.

    Args:
        nodes: as Ray lists them.
        free: node id → what is free there.
    """
    alive = [node for node in nodes if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in alive]
    found = []
    for node in alive:
        address, host = node["NodeManagerAddress"], node["NodeManagerHostname"]
        name = node.get("NodeName") or address
        if name == address and hosts.count(host) == 1:
            name = host
        found.append(
            NodeView(
                id=node["NodeID"],
                name=name,
                address=address,
                port=node["NodeManagerPort"],
                total=node["Resources"],
                free=free.get(node["NodeID"], {}),
                labels=node.get("Labels") or {},
            )
        )
    return sorted(found, key=lambda view: (_sortable(view.address), view.id))


def _sortable(address: str) -> tuple[int, int | str]:
    try:
        return 0, int(ipaddress.ip_address(address))
    except ValueError:
        return 1, address


def choose(wish: ResourceRequest, nodes: Sequence[NodeView]) -> int:
    """How many nodes can be had now: as many as are free, 0 when those are too few."""
    free = sum(not node.lacks(wish, now=True) for node in nodes)
    return min(wish.most, free) if free >= wish.least else 0


def could(wish: ResourceRequest, nodes: Sequence[NodeView]) -> int:
    """How many nodes could be had if nobody else used the cluster."""
    return min(wish.most, sum(not node.lacks(wish, now=False) for node in nodes))


def shortage(wish: ResourceRequest, nodes: Sequence[NodeView]) -> str:
    """What was asked, what each node has free, and what is short there; several lines."""
    fit = [node for node in nodes if not node.lacks(wish, now=True)]
    has = f"{len(fit)} of the cluster's {len(nodes)} can take it" if nodes else "it has no nodes"
    lines = [f"asked: {wish}; {has}"]
    for node in nodes[:_SHOWN_NODES]:
        names = [name for name in wish.each if name in node.total or name == "CPU"]
        free = ", ".join(
            f"{_amount(name, node.free.get(name, 0))} of "
            f"{_amount(name, node.total.get(name, 0))} {name}"
            for name in names
        )
        lacks = "; ".join(node.lacks(wish, now=True)) or "fits"
        lines.append(f"  {node.name} ({node.address}): free {free or 'nothing'}; {lacks}")
    if len(nodes) > _SHOWN_NODES:
        lines.append(f"  and {len(nodes) - _SHOWN_NODES} more")
    return "\n".join(lines)


def _amounts(each: Mapping[str, float]) -> str:
    return ", ".join(f"{_amount(name, value)} {name}" for name, value in each.items())


def _amount(name: str, value: float) -> str:
    if name in _UNITS:
        return f"{value / _UNITS[name]:.1f} GiB of"
    return f"{value:g}"
