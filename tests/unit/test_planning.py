"""Planning: what a command adds to a job file and a profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.job.load import flag as written
from dtrain.launchers.flags import FLAGS, Flag
from dtrain.planning import Request, plan_run
from support.errors import raises
from support.launch import TINY


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.option)
def test_a_flag_of_another_launcher_is_refused(flag: Flag, launcher: str, tmp_path: Path) -> None:
    given = {flag.option: written(f"--{flag.option}", "0")}
    request = Request(launcher=launcher, runs=str(tmp_path), options=given)
    if flag.launcher == launcher:
        return
    with raises("usage.flag-of-other-launcher", f"--launcher {flag.launcher}"):
        plan_run(str(TINY), request)


def test_an_id_is_made_of_the_jobs_name(tmp_path: Path) -> None:
    prepared = plan_run(str(TINY), Request(runs=str(tmp_path), suffix="-3"))
    assert prepared.plan.run_id.startswith("tiny-")
    assert prepared.plan.run_id.endswith("-3")
    assert prepared.plan.launcher == "local"
