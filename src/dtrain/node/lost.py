"""Records of ranks that leave none themselves, written by who missed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtrain.node import stack_dump
from dtrain.run import failures
from dtrain.run.failures import FailureRecord, Frame

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
    made = failures.of_worker(
        "absent",
        "did not come to the collective that the others waited for "
        f"({plan.collective_timeout_s:g} s)",
        1,
        frames=(failures.users_own(stack) or stack[:1])[::-1],
        collateral=stack_dump.waits_or_leaves(stack),
        **place,
    )
    made.write(plan.run, plan.attempt)
    return made
