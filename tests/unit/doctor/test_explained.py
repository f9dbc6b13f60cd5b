"""Errors of workers that a check explains, with the numbers of this node."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.doctor import explained
from dtrain.doctor.explained import explain


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system without room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "dtrain-test", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system here")
    (folder / "filler").write_bytes(bytes(1 << 20))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "text",
    [
        "was killed by SIGBUS",
        "DataLoader worker (pid 7) is killed by signal: Bus error.",
        "unable to write to file </torch_7>: No space left on device (28)",
    ],
)
def test_shared_memory(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_NODE_NAME", "gpu-b")
    found = explain(text)
    assert "/dev/shm, which on gpu-b has " in found
    assert "--shm-size" in found


@pytest.mark.parametrize(
    "text", ["[Errno 24] Too many open files: 'x'", "received 0 items of ancdata"]
)
def test_open_files(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_NODE_NAME", "gpu-b")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = explain(text)
    assert found.startswith(f"a process on gpu-b may open {soft} files: ")
    assert "ulimit -n" in found


def test_a_full_disk_is_named_with_its_room(full_disk: Path) -> None:
    with pytest.raises(OSError) as raised:
        (full_disk / "more").write_bytes(bytes(1 << 20))
    found = explain(str(raised.value), [full_disk / "runs" / "a-1"])
    assert f"{full_disk} has 0 B free of 1.0 MB" in found
    assert explain(str(raised.value), [Path("/proc")]) == ""  # nothing else is full
    assert explain("cannot open", [full_disk]) == ""


def test_memory_of_one_directory(full_disk: Path) -> None:
    assert explained.of_shm(full_disk).endswith("has 0 B free of 1.0 MB now")


def test_other_signals_are_not_explained() -> None:
    assert explain("was killed by SIGSEGV") == ""
