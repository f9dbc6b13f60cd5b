"""Modules that a task imports and that this Python does not have are reported before a launch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import JobError, Problem
from dtrain.job.imports import refuse_missing
from dtrain.job.spec import JobSpec
from support.errors import assert_problems, raises


def spec(**fields: Any) -> JobSpec:
    train = {"epochs": 1, "global_batch_size": 8}
    return JobSpec.model_validate({"name": "t", "task": "task.py:T", "train": train, **fields})


def missing(folder: Path, text: str, **fields: Any) -> Sequence[Problem]:
    (folder / "task.py").write_text(text)
    try:
        refuse_missing(spec(**fields), folder)
    except JobError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("text", "place", "names"),
    [
        ("import os\nimport nowhere_x\n", "task.py:2:1", ["nowhere_x"]),
        ("import os, nowhere_x.sub as x\n", "task.py:1:1", ["nowhere_x"]),
        ("from nowhere_x.sub import name\n", "task.py:1:1", ["nowhere_x"]),
        ("import helper\n", "helper.py:2:1", ["nowhere_x"]),
        ("import helpr\n", "task.py:1:1", ["helpr", "'helper'"]),
    ],
)
def test_a_missing_module_is_reported_at_its_line(
    text: str, place: str, names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "helper.py").write_text("import json\nimport nowhere_x\n")
    (problem,) = missing(tmp_path, text)
    assert_problems([problem], ("job.missing-import", f"{tmp_path}/{place}", *names))
    assert ("'helper'" in problem.message) == ("helpr" in text)


@pytest.mark.parametrize(
    "text",
    [
        "import os, sys, numpy.linalg\nfrom torch import nn\nimport tests_of_job\n",
        "try:\n    import nowhere_x\nexcept ImportError:\n    nowhere_x = None\n",
        "import contextlib\nwith contextlib.suppress(ImportError):\n    import nowhere_x\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nowhere_x\n",
        "import sys\nif sys.platform == 'win32':\n    import nowhere_x\n",
        "def f():\n    import nowhere_x\n",
        "from . import nowhere_x\n",
        "import sys\nsys.path.insert(0, '/elsewhere')\nimport nowhere_x\n",
        "import beside, folder.part, package\n",
        "import beside\nimport beside\n",
    ],
)
def test_what_may_be_there_is_not_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / "tests_of_job.py").touch()
    (tmp_path / "beside.py").write_text("import task\nimport beside\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    assert missing(tmp_path, text) == []


def test_where_the_job_may_find_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "nowhere_x.py").touch()
    path = {"env": {"PYTHONPATH": str(tmp_path / "more")}}
    assert missing(tmp_path, "import nowhere_x", launch=path) == []
    assert missing(tmp_path, "import nowhere_x", launch={"preload": ["json"]}) == []
    assert missing(tmp_path, "import nowhere_x") != []
    monkeypatch.chdir(tmp_path / "more")
    assert missing(tmp_path, "import nowhere_x") == []


def test_a_script_and_a_data_module_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import nowhere_x\n")
    script = JobSpec.model_validate({"name": "t", "script": "train.py"})
    with raises("job.missing-import", "train.py:1:1: ", "nowhere_x"):
        refuse_missing(script, tmp_path)
    data = {"data_module": "train.py:Data"}
    assert_problems(
        missing(tmp_path, "", trainer="lightning", lightning=data),
        ("job.missing-import", f"{tmp_path}/train.py:1:1", "nowhere_x"),
    )
