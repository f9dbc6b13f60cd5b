"""The section of a report about the steps that were profiled."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from dtrain.report.page import page_of
from dtrain.run import files
from dtrain.run.rundir import RunDir
from dtrain.run.step_profile import Communication, Operator, StepProfile
from support.written_runs import write_run

ON_GPU = StepProfile(
    rank=0,
    attempt=0,
    restart=0,
    first_step=10,
    last_step=15,
    device="H200",
    seconds=0.3,
    operators=[Operator("aten::<mm>", 12, 0.001, 0.15, 0.5), Operator("aten::add", 6, 0.1, 0, 0)],
    communication=Communication(0.06, 0.2, 0.75, {"ncclDevKernel_AllReduce": 12}),
    trace="attempts/0/node-0/rank-00000.trace.json.gz",
    memory="attempts/0/node-0/rank-00000.memory.pickle",
)


def page(run: RunDir, found: StepProfile) -> str:
    files.write_json(run.step_profile(0, 0, found.rank), asdict(found))
    return page_of([run])


def test_the_numbers_and_files_of_a_rank(tmp_path: Path) -> None:
    text = page(write_run(tmp_path, "digits-aaaaaa"), ON_GPU)
    for part in ("<h2>Profile</h2>", "10-15", ">50<", "20.0 %", "75.0 %", ON_GPU.trace, "GPU ms",
                 str(ON_GPU.memory), "aten::&lt;mm&gt;", "150.000", "50.0 %"):  # fmt: skip
        assert part in text, part


def test_without_a_gpu_and_without_communication(tmp_path: Path) -> None:
    alone = replace(ON_GPU, memory=None, communication=Communication(0.0, 0.0, 0.0, {}))
    text = page(write_run(tmp_path, "digits-aaaaaa"), alone)
    assert "aten::&lt;mm&gt;" in text
    assert "GPU ms" not in text
    assert "75.0 %" not in text


def test_a_run_without_a_profile_has_no_such_section(tmp_path: Path) -> None:
    assert "Profile</h2>" not in page_of([write_run(tmp_path, "digits-aaaaaa")])
