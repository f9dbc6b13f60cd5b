"""The `options:` of a Ray profile."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dtrain.job.fields import Count, Duration, Natural, Positive, Size, Text
from dtrain.job.launcher_options import LauncherOptions, Switch
from dtrain.ports import parse_address


class RayOptions(LauncherOptions):
    """What a profile says in `options:`; launchers/ray.yaml tells of each."""

    launcher = "ray"

    address: Text | None = None
    """HOST:PORT of the cluster, its dashboard's URL with `submit: job`; None: one of our own."""
    submit: Literal["driver", "job"] = "driver"
    """Who drives: this command, or a Ray job."""
    cpus_per_node: Count | None = None
    """CPUs of each node; None: one per process."""
    memory: Size | None = None
    """Bytes of each node."""
    resources: dict[str, Positive] = Field(default_factory=dict)
    """Custom resources of each node."""
    labels: dict[str, Text] = Field(default_factory=dict)
    """Labels that each node must have."""
    place_timeout: Duration = 600.0
    """Seconds to wait for nodes to become free, or to come back."""
    autoscale: Switch = "off"
    """Whether nodes that the cluster does not have yet may come."""
    relaunch: Natural = 3
    """How often a new attempt is begun after a node was lost."""
    lost_after: Duration = 30.0
    """Seconds without a word after which a node is lost, and ends its workers by itself."""
    python: Text | None = None
    """Interpreter on the nodes; None: Ray's own."""
    snapshot: Switch = "on"
    """Whether workers import a copy of the code taken at the launch."""
    dashboard: Switch = "off"
    """Whether a cluster of our own has Ray's dashboard, on loopback."""
    runs: Text | None = None
    """With `submit: job`: the folder or URL of all runs on the cluster."""
    excludes: list[Text] = Field(default_factory=list)
    """Patterns of files that do not travel, with `submit: job` or to nodes that share no folder."""
    upload_limit: Size = 100 * 1024**2
    """The most bytes that travel so."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """With `submit: job`: further fields of Ray's runtime_env."""

    @property
    def cores_per_node(self) -> int | None:
        return self.cpus_per_node

    @model_validator(mode="after")
    def _check_submit_mode(self) -> RayOptions:
        if self.submit == "job" and not self.address:
            raise ValueError("submit: job needs the address of a cluster's dashboard")
        if self.submit == "driver" and self.address not in (None, "auto"):
            try:
                parse_address(str(self.address))
            except ValueError as error:
                raise ValueError(
                    f"{error} of the cluster's head, as 10.0.0.5:6379; for the dashboard's URL say "
                    "submit: job"
                ) from None
        if self.submit == "driver" and self.runs:
            raise ValueError("runs is for submit: job; here --runs says where runs are")
        return self
