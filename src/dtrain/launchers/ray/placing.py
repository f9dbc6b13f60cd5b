"""Get the nodes of an attempt from a Ray cluster: all or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray._private import state
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from dtrain.errors import PlanError
from dtrain.launchers.ray import placement
from dtrain.launchers.ray.options import RayOptions
from dtrain.launchers.ray.placement import NodeView, ResourceRequest
from dtrain.launchers.ray.watch import answers
from dtrain.plan import LaunchPlan

_POLL_S = 0.2
_RESERVE_S = 5.0
_SETTLE_S = 3.0  # in which what an attempt had becomes free again
_FIRST_NOTICE_S = 2.0


@dataclass(frozen=True)
class Placed:
    """Nodes that are ours."""

    group: PlacementGroup
    nodes: Sequence[NodeView]
    """All of the cluster."""


class Placing:
    """Places one attempt after another."""

    def __init__(
        self, plan: LaunchPlan, is_stopped: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self._options = RayOptions.of(plan.options)
        self._wish = ResourceRequest.of(plan)
        self._is_stopped = is_stopped
        self._say = say

    def place(self, *, again: bool) -> Placed | None:
        """Wait for nodes, and take them; None when we are asked to stop.

        Args:
            again: nodes were lost: they may come back, and Ray may not know of it yet.

        Raises:
            PlanError: the cluster never has so much, or not in time.
        """
        started = time.monotonic()
        notice_at = started + _FIRST_NOTICE_S
        patience = self._options.place_timeout
        while not self._is_stopped():
            nodes, dead = self._look(again)
            count = placement.choose(self._wish, nodes)
            waited = time.monotonic() - started
            could = placement.could(self._wish, nodes)
            if count and (count >= could or waited > _SETTLE_S):
                group = self._reserve(count, dead, _RESERVE_S)
                if group is not None:
                    return Placed(group, nodes)
            elif not count and self._options.autoscale == "on":
                group = self._reserve(self._wish.least, dead, patience - waited)
                if group is not None:
                    return Placed(group, self._look(again)[0])
            elif could < self._wish.least and not self._may_come(again):
                raise PlanError(f"cannot be placed: {placement.shortage(self._wish, nodes)}")
            if waited > patience:
                shortage = placement.shortage(self._wish, nodes)
                raise PlanError(f"not placed within {patience:.0f} s (place_timeout): {shortage}")
            if time.monotonic() >= notice_at:
                shortage = placement.shortage(self._wish, nodes)
                self._say(f"waiting for nodes since {waited:.0f} s: {shortage}")
                notice_at = time.monotonic() + 2 * waited
            time.sleep(_POLL_S)
        return None

    def free(self, placed: Placed) -> None:
        """Give nodes back."""
        remove_placement_group(placed.group)

    def _may_come(self, again: bool) -> bool:
        """Whether the cluster may get nodes that it does not have now."""
        return again and self._options.address is not None

    def _look(self, again: bool) -> tuple[list[NodeView], list[NodeView]]:
        """The nodes of the cluster, and those that Ray lists although they do not answer."""
        nodes = placement.views(ray.nodes(), state.available_resources_per_node())
        if not again:
            return nodes, []
        with ThreadPoolExecutor(32) as pool:
            alive = list(pool.map(answers, nodes))
        dead = [node for node, answered in zip(nodes, alive, strict=True) if not answered]
        return [node for node in nodes if node not in dead], dead

    def _reserve(
        self, count: int, dead: Sequence[NodeView], timeout_s: float
    ) -> PlacementGroup | None:
        """One bundle a node; None when somebody was quicker, or no new node came."""
        labels = dict(self._wish.labels)
        if dead:
            labels["ray.io/node-id"] = f"!in({','.join(node.id for node in dead)})"
        group = placement_group(
            [dict(self._wish.each)] * count,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[labels] * count if labels else None,
        )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._is_stopped():
            if group.wait(0.5):
                return group
        remove_placement_group(group)
        return None
