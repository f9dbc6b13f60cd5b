"""Records of ranks and nodes that leave none themselves, written by who saw or missed them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dtrain.node import stack_dump
from dtrain.run import failures
from dtrain.run.failures import FailureRecord, Frame, Kind

if TYPE_CHECKING:
    from dtrain.plan import LaunchPlan


def absent(plan: LaunchPlan, stack: list[Frame], **place: Any) -> FailureRecord:
    """Leave a record of a rank that still runs now that others have given up waiting for it.

    The verdict decides whether it is to blame: one node does not know what happened on the
    others.

    Args:
        plan: the launch, with the attempt.
        stack: where it is, the innermost call first.
        **place: `rank`, `node_rank`, `node`, `restart`, `time`, `pid`, `log`.
    """
    made = FailureRecord(
        kind="absent",
        message="did not come to the collective that the others waited for "
        f"({plan.collective_timeout_s:g} s)",
        exit_code=1,
        frames=(failures.users_own(stack) or stack[:1])[::-1],
        collateral=stack_dump.waits_or_leaves(stack),
        **place,
    )
    made.write(plan.run, plan.attempt)
    return made


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
