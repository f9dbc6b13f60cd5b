"""`verify` of a compiled job: compared with one process that is not compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.verification.judge import Judge
from dtrain.verification.layouts import Layout, compiled_layouts
from support import JOBS
from support.warm_runner import WarmRunner, of_one

# what torch's compiler itself warns of
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


def test_rows_are_compiled_where_they_can_be() -> None:
    layouts = [
        Layout("ddp", procs=2), Layout("dp", procs=2), Layout("exact"),
        Layout("fsdp", procs=2, trainer="lightning", own_loops=True),
    ]  # fmt: skip
    assert [each.name for each in compiled_layouts(layouts)] == [
        "single compiled", "ddp ×2 compiled", "dp ×2", "exact", "lightning own loops fsdp ×2",
    ]  # fmt: skip


@pytest.mark.parametrize("differs", [False, True])
def test_a_compiled_layout_is_judged(differs: bool, tmp_path: Path) -> None:
    """The model drops: two ranks draw other numbers than one process, compiled or not."""
    runner = WarmRunner(
        JOBS / "compiled" / "job.yaml",
        overrides=(f"args.differs={str(differs).lower()}",),
        steps=2,
        keep=tmp_path,
    )
    layout = Layout("single", compiled=True) if differs else Layout("ddp", 2, compiled=True)
    result = of_one(Judge(runner), layout)
    assert result.passed is not differs, result
    assert result.code == ("verify.compiled-differs" if differs else "")
    assert result.fixed_noise is not differs
