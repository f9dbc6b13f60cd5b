"""What the process reports that imports a task for `dtrain doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dtrain.train.doctor import _load_of, _tried


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(
    ("code", "line", "error", "is_missing"),
    [
        ("x = 1\ny = 1 / 0\n", 2, "ZeroDivisionError: division by zero", False),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3", False),
        ("x = (\n", 1, "SyntaxError: '(' was never closed", False),
        ("raise ValueError\n", 1, "ValueError: without a message", False),
        ("if 1:\n    import no_such\n", 2, "ModuleNotFoundError: No module named 'no_such'", True),
        ("class Other:\n    pass\n", 0, "job.yaml: task: ", False),
    ],
)
def test_an_error_is_placed(
    code: str, line: int, error: str, is_missing: bool, tmp_path: Path
) -> None:
    file = tmp_path / f"task_{abs(hash(code))}.py"
    file.write_text(code)
    found = _tried(_load_of(f"{file.name}:Mine", str(tmp_path)))
    assert found["where"] == (f"{file}:{line}" if line else "")
    assert found["error"].startswith(error)
    assert found["is_missing_module"] is is_missing


def test_an_import_that_works_is_timed(tmp_path: Path) -> None:
    (tmp_path / "fine_task.py").write_text("class Mine:\n    pass\n")
    found = _tried(_load_of("fine_task.py:Mine", str(tmp_path)))
    assert found.keys() == {"seconds"}
