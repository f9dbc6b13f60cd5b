"""`--placement ray`: the actor that starts the node process reports where it was placed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dtrain import checked
from dtrain.environ import inherited_env
from dtrain.errors import UsageError
from dtrain.launch_plan import LaunchPlan
from dtrain.node.placement.base import NodePlacement, PlacementReader


@dataclass(frozen=True)
class PlacementArgs:
    """The arguments of `LaunchPlan.placed`, which `--placement-args` receives as JSON."""

    __pydantic_config__ = checked.CONFIG

    attempt: checked.Whole
    node_names: tuple[checked.Name, ...]
    host: checked.Name
    port: checked.Port


class RayPlacement(PlacementReader):
    def join(self, plan: LaunchPlan) -> NodePlacement:
        arguments = self.arguments
        try:
            placed = checked.read(PlacementArgs, arguments.placement_args or "")
        except ValueError as error:
            raise UsageError(f"--placement-args: {error}", code="node.invalid-placement") from None
        clean = inherited_env(self.environ)  # and without Ray's own variables
        environ = {name: clean[name] for name in clean if not name.startswith("RAY_")}
        node_ranks = arguments.node_rank or []
        return NodePlacement(
            plan.placed(**asdict(placed)), node_ranks, arguments.listen_fd, environ
        )
