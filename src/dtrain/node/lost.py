"""Records of nodes that could leave none themselves, written by whoever saw or missed it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dtrain.node import failures
from dtrain.node.failures import FailureRecord, Kind

if TYPE_CHECKING:
    from dtrain.plan import LaunchPlan


def record(
    plan: LaunchPlan,
    node_rank: int,
    message: str,
    *,
    log: str,
    kind: Kind = "node_lost",
    node: str = "",
    exit_code: int = 1,
    pid: int | None = None,
    restart: int | None = None,
) -> FailureRecord:
    """Leave a record of a node.

    Args:
        plan: the launch, with the attempt.
        node_rank: of the node.
        message: how it was lost.
        log: of the node, or of who tells.
        kind: of the failure.
        node: its name, where the plan does not have it.
        exit_code: of the run.
        pid: of the process that ended.
        restart: None: the newest of which there is a record, so that this counts beside them.
    """
    if restart is None:
        known = failures.read_all(plan.run, plan.attempt)
        restart = max((record.restart for record in known), default=0)
    made = FailureRecord(
        kind=kind,
        message=message,
        exit_code=exit_code,
        node_rank=node_rank,
        node=node or plan.node_names[node_rank],
        restart=restart,
        time=time.time(),
        pid=pid,
        log=log,
    )
    made.write(plan.run, plan.attempt)
    return made
