"""Versions, and fingerprints of code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dtrain.doctor import versions
from dtrain.doctor.asked import Asked


def test_versions_of_what_is_here() -> None:
    found = versions.versions(Asked(Path("runs")))
    assert found.status == "ok"
    assert versions.installed().keys() == {"Python", "dtrain", "torch"}
    assert f"Python {sys.version.split()[0]}" in found.fact


def test_a_torch_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> str:
        raise versions.PackageNotFoundError

    monkeypatch.setattr(versions, "version", missing)
    found = versions.versions(Asked(Path("runs")))
    assert (found.status, found.remedy) == ("problem", "pip install torch")


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = '12.8'\nhip = None\n", "12.8"),
        ("cuda = '13.0'\n", "13.0"),
        ("__version__ = '2.10'\ncuda: Optional[str] = None\n", None),
    ],
)
def test_the_cuda_of_a_fake_torch(
    text: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(versions, "find_spec", lambda _name: spec)
    assert versions.torch_cuda() == cuda


def test_a_fingerprint_is_of_the_python_files_alone(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("a = 1\n")
    first = versions.fingerprint(tmp_path)
    for other in ("data.csv", "runs/a-1/x.py", ".git/x.py", "__pycache__/task.py"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("b = 1\n")
    assert versions.fingerprint(tmp_path) == first
    (tmp_path / "task.py").write_text("a = 2\n")
    second = versions.fingerprint(tmp_path)
    (tmp_path / "task.py").rename(tmp_path / "other.py")
    assert len({first, second, versions.fingerprint(tmp_path)}) == 3
    assert versions.own_fingerprint() == versions.own_fingerprint()
