"""What does not go together with a stream that shards itself."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.job.spec import JobSpec


def sharded_problem(job: JobSpec, world_sizes: Sequence[int]) -> str | None:
    """Why `data.stream: sharded` cannot be; None when it can, or is not asked for.

    Args:
        job: as it is launched.
        world_sizes: every number of processes that the launch may come to.
    """
    if job.data.stream == "same":
        return None
    if job.strategy == "exact":
        return (
            "strategy 'exact' gives the same bits on any number of processes, which a stream that "
            "shards itself cannot (data.stream: sharded): each number reads in another order; "
            "use 'ddp', or a stream that is the same on every rank"
        )
    if len(world_sizes) > 1:
        return (
            f"launch.nodes may come to {len(world_sizes)} sizes, and with data.stream: sharded a "
            "restart needs as many processes as the start: each goes on in its own stream; give "
            "one number of nodes"
        )
    batch = job.train.global_batch_size
    if world_sizes[0] > batch:
        return (
            f"train.global_batch_size is {batch}, less than the {world_sizes[0]} processes; with "
            "data.stream: sharded a step takes one sample or more of each process's own stream"
        )
    return None
