"""A script's process group is watched for while the script runs."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dtrain.integrations.script import run as script
from dtrain.run import events
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from support.launch import events as events_of
from support.launch import until


def made_late(path: Path) -> tuple[str | None, ...]:
    """What is told before and after; the group is made after the warning, and destroyed."""
    run, script.GROUP_PATIENCE_S = RunDir(path), 0.05
    watched = script.GroupWatch(run, 60)
    until("the warning", lambda: events.ungrouped_warning(run))
    before, over = events.ungrouped_warning(run), [watched.is_over()]
    dist.init_process_group("gloo")
    until("the news", lambda: events_of(run, "group_made"))
    over.append(watched.is_over())
    dist.barrier()  # the other rank may still be connecting
    dist.destroy_process_group()
    over.append(watched.is_over())
    watched.warn_if_none("to the end")
    assert over == [False, False, True]
    return before, events.ungrouped_warning(run)


def test_a_group_that_comes_late_ends_the_warning(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    ((before, after), same) = run_ranks(made_late, 2, run.path, init=False)
    assert (before, after) == same
    assert before is not None
    assert "no process group after 0.05 s" in before
    assert after is None
    assert len(events_of(run, "no_group")) == 1, "rank 0 speaks for all"
