"""Reserve the nodes of an attempt on a Ray cluster, all or none, and report shortages."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtrain.errors import PlanError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.ray.options import RayOptions
from dtrain.ports import is_listening
from dtrain.words import counted

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

_UNITS = {"memory": 1024**3}
_SHOWN_NODES = 12
_POLL_S = 0.2
_RESERVE_S = 5.0
_RELEASE_S = 3.0  # resources of the previous attempt are freed in this time
_FIRST_NOTICE_S = 2.0


@dataclass(frozen=True)
class ResourceRequest:
    min_nodes: int
    max_nodes: int
    per_node: dict[str, float]
    """Resources of each node, by Ray's names; memory is in bytes."""
    labels: dict[str, str]

    @classmethod
    def of(cls, plan: LaunchPlan) -> ResourceRequest:
        options = RayOptions.of(plan.options)
        per_node: dict[str, float] = {
            "CPU": options.cpus_per_node or plan.procs_per_node * plan.replicas
        }
        if plan.gpus_per_node:
            per_node["GPU"] = plan.gpus_per_node
        if options.memory:
            per_node["memory"] = options.memory
        per_node |= options.resources
        return cls(plan.min_nodes, plan.nodes, per_node, dict(options.labels))

    def __str__(self) -> str:
        nodes = counted(self.max_nodes, "node", least=self.min_nodes)
        labels = "".join(f", label {name}={value}" for name, value in self.labels.items())
        return f"{nodes} with {_amounts(self.per_node)} each{labels}"


@dataclass(frozen=True)
class NodeView:
    """A node of the cluster, with the data that Ray has about it."""

    id: str
    name: str
    address: str
    port: int
    """The port of its raylet."""
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str]

    def answers(self) -> bool:
        """Return whether its raylet can be reached. Ray still lists a dead one as alive for a
        while."""
        return is_listening(f"{self.address}:{self.port}")

    def lacks(self, request: ResourceRequest, *, now: bool) -> list[str]:
        """Return descriptions of its shortages; empty when it can take a node of the run.

        Args:
            request: the request.
            now: true to compare with free resources, false with all resources.
        """
        have = self.free if now else self.total
        short = [
            f"{_amount(name, need - have.get(name, 0))} {name} missing"
            for name, need in request.per_node.items()
            if have.get(name, 0) + 1e-6 < need
        ]
        return short + [
            f"label {name} is {self.labels.get(name, 'missing')}"
            for name, value in request.labels.items()
            if self.labels.get(name) != value
        ]


def views(nodes: Iterable[Mapping[str, Any]], free: Mapping[str, Any]) -> list[NodeView]:
    """Return the living nodes of `ray.nodes()`, sorted by address.

    Args:
        nodes: the nodes in Ray's form.
        free: the free resources of each node id.
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


def cluster_nodes() -> list[NodeView]:
    """Return the living nodes of the cluster to which this process is connected."""
    import ray
    from ray._private import state

    return views(ray.nodes(), state.available_resources_per_node())


def _sortable(address: str) -> tuple[int, int | str]:
    try:
        return 0, int(ipaddress.ip_address(address))
    except ValueError:
        return 1, address


@dataclass(frozen=True)
class Take:
    count: int
    are_available: bool = True
    """False if the cluster must grow first, which may take time."""


@dataclass(frozen=True)
class Wait:
    """A decision to query the cluster again a moment later."""


@dataclass(frozen=True)
class Refuse:
    why: str


Decision = Take | Wait | Refuse


def decide(
    request: ResourceRequest,
    nodes: Sequence[NodeView],
    waited_s: float,
    timeout_s: float,
    *,
    grows: bool,
    may_come_back: bool,
) -> Decision:
    """Decide about a request.

    Args:
        request: the request.
        nodes: all nodes of the cluster that answer.
        waited_s: the time waited so far.
        timeout_s: the maximum time to wait.
        grows: true if the cluster creates new nodes on request.
        may_come_back: true if nodes were lost, and others may be started in their place.
    """
    if waited_s > timeout_s:
        late = f"not placed within {timeout_s:.0f} s (place_timeout)"
        return Refuse(f"{late}: {shortage(request, nodes)}")
    free = min(request.max_nodes, sum(not node.lacks(request, now=True) for node in nodes))
    total = min(request.max_nodes, sum(not node.lacks(request, now=False) for node in nodes))
    if free >= request.min_nodes:
        return Take(free) if free >= total or waited_s > _RELEASE_S else Wait()
    if grows:
        return Take(request.min_nodes, are_available=False)
    if total < request.min_nodes and not may_come_back:
        return Refuse(f"cannot be placed: {shortage(request, nodes)}")
    return Wait()


def shortage(request: ResourceRequest, nodes: Sequence[NodeView]) -> str:
    """Return the request, what each node has free, and what is short there, in several lines."""
    fit = [node for node in nodes if not node.lacks(request, now=True)]
    count = f"{len(fit)} of the cluster's {len(nodes)} nodes fit"
    lines = [f"requested: {request}; {count if nodes else 'the cluster has no nodes'}"]
    for node in nodes[:_SHOWN_NODES]:
        names = [name for name in request.per_node if name in node.total or name == "CPU"]
        free = ", ".join(
            f"{_amount(name, node.free.get(name, 0))} of "
            f"{_amount(name, node.total.get(name, 0))} {name}"
            for name in names
        )
        lacks = "; ".join(node.lacks(request, now=True)) or "fits"
        lines.append(f"  {node.name} ({node.address}): free {free or 'nothing'}; {lacks}")
    if len(nodes) > _SHOWN_NODES:
        lines.append(f"  and {len(nodes) - _SHOWN_NODES} more")
    return "\n".join(lines)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{_amount(name, value)} {name}" for name, value in resources.items())


def _amount(name: str, value: float) -> str:
    if name in _UNITS:
        return f"{value / _UNITS[name]:.1f} GiB of"
    return f"{value:g}"


@dataclass(frozen=True)
class Placed:
    group: PlacementGroup
    nodes: Sequence[NodeView]
    """All nodes of the cluster."""


class Placer:
    def __init__(
        self, plan: LaunchPlan, is_stopped: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self._options = RayOptions.of(plan.options)
        self._request = ResourceRequest.of(plan)
        self._is_stopped = is_stopped
        self._say = say

    def place(self, *, after_loss: bool) -> Placed | None:
        """Wait for nodes, and reserve them. Return None after a request to stop.

        Args:
            after_loss: true if nodes were lost: they may come back, and Ray may not know of the
                loss yet.

        Raises:
            PlanError: the cluster never has so many resources, or not in time.
        """
        started = time.monotonic()
        notice_at = started + _FIRST_NOTICE_S
        timeout_s = self._options.place_timeout
        grows = self._options.autoscale
        may_come_back = after_loss and self._options.address is not None
        while not self._is_stopped():
            nodes, dead = self._query_nodes(after_loss)
            waited = time.monotonic() - started
            decision = decide(
                self._request, nodes, waited, timeout_s, grows=grows, may_come_back=may_come_back
            )
            if isinstance(decision, Refuse):
                raise PlanError(decision.why, code="ray.too-few-resources")
            is_long = isinstance(decision, Take) and not decision.are_available
            if is_long or time.monotonic() >= notice_at:
                self._say(f"waiting for nodes for {waited:.0f} s: {shortage(self._request, nodes)}")
                notice_at = time.monotonic() + 2 * waited
            if isinstance(decision, Wait):
                time.sleep(_POLL_S)
                continue
            within = _RESERVE_S if decision.are_available else timeout_s - waited
            group = self._reserve(decision.count, dead, within)
            if group is not None:
                return Placed(
                    group, nodes if decision.are_available else self._query_nodes(after_loss)[0]
                )
        return None

    def free(self, placed: Placed) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(placed.group)

    def _query_nodes(self, after_loss: bool) -> tuple[list[NodeView], list[NodeView]]:
        """Return the nodes of the cluster, and those that Ray lists although they do not answer."""
        nodes = cluster_nodes()
        if not after_loss:
            return nodes, []
        with ThreadPoolExecutor(32) as pool:
            alive = list(pool.map(NodeView.answers, nodes))
        dead = [node for node, answered in zip(nodes, alive, strict=True) if not answered]
        return [node for node in nodes if node not in dead], dead

    def _reserve(
        self, count: int, dead: Sequence[NodeView], timeout_s: float
    ) -> PlacementGroup | None:
        """Reserve one bundle per node. Return None if another process was faster, or no new node
        came."""
        from ray.util.placement_group import placement_group, remove_placement_group

        labels = dict(self._request.labels)
        if dead:
            labels["ray.io/node-id"] = f"!in({','.join(node.id for node in dead)})"
        group = placement_group(
            [dict(self._request.per_node)] * count,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[labels] * count if labels else None,
        )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._is_stopped():
            if group.wait(0.5):
                return group
        remove_placement_group(group)
        return None
