"""Word from the driver of a launch by Ray to whoever follows the run."""

from __future__ import annotations

from typing import Any

from dtrain.errors import DtrainError, LaunchError, PlanError
from dtrain.run import failures, files
from dtrain.run.backend_files import RayFiles
from dtrain.run.rundir import RunDir


def refusal(error: DtrainError) -> dict[str, Any]:
    """Why nothing was started, as kept in `RayFiles.refusal`."""
    return {"message": str(error), "usage": isinstance(error, PlanError)}


def refuse(run: RunDir, error: DtrainError) -> None:
    """Keep why nothing was started."""
    files.write_json(RayFiles(run).refusal, refusal(error))


def refused(run: RunDir) -> DtrainError | None:
    """The error kept by `refuse`; None when there is none."""
    kept: dict[str, Any] | None = files.read_json(RayFiles(run).refusal)
    if kept is None:
        return None
    return (PlanError if kept["usage"] else LaunchError)(kept["message"])


def record_head_lost(run: RunDir, attempt: int, address: str | None) -> None:
    """Leave a failure record: the cluster itself is gone."""
    failures.record_node(
        run,
        attempt,
        "the head of the Ray cluster was lost, and with it all nodes of the run",
        kind="node_lost",
        node=f"the cluster at {address}" if address else "the cluster of this run",
        log=RayFiles(run).log,
    )
