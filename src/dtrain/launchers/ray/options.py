"""The `options:` of a Ray profile."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dtrain.job.fields import Count, Duration, Natural, Positive, Size, Text
from dtrain.job.launcher_options import LauncherOptions
from dtrain.ports import parse_address


class RayOptions(LauncherOptions):
    """Options of launcher `ray`."""

    launcher = "ray"

    address: Text | None = None
    """The HOST:PORT of a cluster's head, or `auto`. With submit=job, the URL of its dashboard.
    Empty starts a cluster on this machine."""
    submit: Literal["driver", "job"] = "driver"
    """The process that drives the run: this command, or a Ray job, which continues without it."""
    cpus_per_node: Count | None = None
    """Number of CPUs of each node. Empty means one per process."""
    memory: Size | None = None
    """Memory of each node, for example 64G."""
    resources: dict[str, Positive] = Field(default_factory=dict)
    """Custom resources of each node, for example resources.fast_disk=1."""
    labels: dict[str, Text] = Field(default_factory=dict)
    """Labels that each node must have, for example labels.zone=a."""
    place_timeout: Duration = 600.0
    """The time to wait for nodes to become free, or to come back."""
    autoscale: bool = False
    """Wait for nodes that the cluster does not have yet."""
    relaunch: Natural = 3
    """Number of new attempts after a node was lost."""
    lost_after: Duration = 30.0
    """The time without a heartbeat after which a node is lost. It then ends its workers itself."""
    python: Text | None = None
    """The Python interpreter on the nodes. Empty means that of the cluster's Ray."""
    snapshot: bool = True
    """Train the code as it was at the launch, not as it is when a worker starts."""
    dashboard: bool = False
    """Start Ray's dashboard, on loopback, with a cluster on this machine."""
    cluster_runs: Text | None = None
    """The directory or URL of all runs on the cluster, with submit=job. Empty means that the
    cluster sees the directory of this host."""
    excludes: list[Text] = Field(default_factory=list)
    """Patterns of files that are not sent to the cluster, in addition to those that git ignores."""
    upload_limit: Size = 100 * 1024**2
    """The maximum number of bytes that are sent to the cluster."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Further fields of Ray's runtime_env, with submit=job."""

    @property
    def cores_per_node(self) -> int | None:
        return self.cpus_per_node

    @property
    def is_here(self) -> bool:
        return self.address is None

    @model_validator(mode="after")
    def _check_submit_mode(self) -> RayOptions:
        if self.submit == "job" and not self.address:
            raise ValueError("submit: job needs the address of a cluster's dashboard")
        if self.submit == "driver" and self.address not in (None, "auto"):
            try:
                parse_address(str(self.address))
            except ValueError as error:
                raise ValueError(
                    f"{error} of the cluster's head, for example 10.0.0.5:6379; the dashboard's "
                    "URL needs submit: job"
                ) from None
        if self.submit == "driver" and self.cluster_runs:
            raise ValueError("cluster_runs needs submit: job; otherwise, use --runs")
        return self
