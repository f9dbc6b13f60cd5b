"""Which steps and ranks are to be profiled: in a job, and by `--profile`."""

from __future__ import annotations

from typing import Any

import pytest

from dtrain.cli.options import written_flags
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.spec import JobSpec, StepProfileSpec, cross_problems
from dtrain.launch_plan import Facts, make_plan
from support.errors import raises

TASK = {"name": "n", "task": "t.py:T", "train": {"steps": 20, "global_batch_size": 8}}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("steps=10:15", {"profile.steps": "10:15"}),
        ("steps=7,ranks=0", {"profile.steps": 7, "profile.ranks": [0]}),
        ("ranks=0,3, 5,steps=1:2", {"profile.steps": "1:2", "profile.ranks": [0, 3, 5]}),
        ("steps=1:2,ranks=all", {"profile.steps": "1:2", "profile.ranks": "all"}),
    ],
)
def test_a_flag_sets_fields(text: str, fields: dict[str, Any]) -> None:
    written = written_flags({"profile": text, "environment": ()})
    assert {name: each.plain() for name, each in written.items()} == fields


@pytest.mark.parametrize("text", ["10:15", "step=10", "steps=1,2", "ranks=0,when=3", "=1"])
def test_a_flag_of_another_form_is_refused(text: str) -> None:
    with raises("usage.invalid-value"):
        written_flags({"profile": text, "environment": ()})


@pytest.mark.parametrize(
    ("written", "steps"), [("10:15", (10, 15)), (7, (7, 7)), ([3, 4], (3, 4)), (" 2 ", (2, 2))]
)
def test_steps(written: Any, steps: tuple[int, int]) -> None:
    assert StepProfileSpec.model_validate({"steps": written}).steps == steps


@pytest.mark.parametrize("written", ["15:10", "0:4", 0, "a", [1, 2, 3], None, 1.5])
def test_steps_that_are_none(written: Any) -> None:
    with pytest.raises(ValueError, match="steps"):
        StepProfileSpec.model_validate({"steps": written})


def test_the_ranks_that_record() -> None:
    def ranks(**given: Any) -> list[int]:
        spec = StepProfileSpec.model_validate({"steps": 1, **given})
        return [rank for rank in range(4) if spec.includes(rank)]

    assert ranks() == [0]
    assert ranks(ranks=[1, 3]) == [1, 3]
    assert ranks(ranks="all") == [0, 1, 2, 3]


def test_what_is_known_before_the_launch() -> None:
    late = {**TASK, "profile": {"steps": "15:21"}}
    assert [code for _, _, code in cross_problems(late)] == ["job.profile-after-the-end"]
    assert not cross_problems({**TASK, "profile": {"steps": "15:20"}})
    assert not cross_problems({**TASK, "profile": {"steps": "2:1"}})  # an error of its own
    command = {"name": "n", "command": ["ls"], "profile": {"steps": 2}}
    assert [code for _, _, code in cross_problems(command)] == ["job.field-without-effect"]


@pytest.mark.parametrize("ranks", [[2], [0, 7]])
def test_a_rank_that_will_not_exist(ranks: list[int]) -> None:
    spec = JobSpec.model_validate(
        {**TASK, "launch": {"nodes": 2}, "profile": {"steps": 3, "ranks": ranks}}
    )
    facts = Facts("n-1", "/runs", "python3", "laptop", cores=8, free_port=16000)
    with raises("plan.profile-of-absent-rank"):
        make_plan(
            spec, job_dir="/", launcher="local", profile="local", options=AnyOptions(), facts=facts
        )


def test_a_job_is_written_with_its_profile() -> None:
    for job in (TASK, {"name": "n", "script": "train.py"}):
        spec = JobSpec.model_validate({**job, "profile": {"steps": "3:4"}})
        assert spec.to_plain()["profile"] == {"steps": [3, 4], "ranks": [0]}
        assert JobSpec.model_validate(spec.to_plain()) == spec
