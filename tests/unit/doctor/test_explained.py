"""Errors of workers that a check explains, with the numbers of this node."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.doctor import explained
from dtrain.doctor.explained import explain

Mount = Callable[[str], Path]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system of the size given."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "dtrain-test", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("no right to mount a small file system here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full_disk(small: Mount) -> Path:
    """A file system without room."""
    folder = small("1m")
    (folder / "filler").write_bytes(bytes(1 << 20))
    return folder


@pytest.mark.parametrize(
    ("text", "size", "is_explained"),
    [
        ("was killed by SIGBUS", "1m", True),
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", "1m", True),
        ("was killed by SIGBUS", "1100m", False),  # it was another memory
        ("unable to write to file </torch_7>: No space left on device (28)", "1100m", True),
    ],
)
def test_shared_memory(
    text: str, size: str, is_explained: bool, small: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_NODE_NAME", "gpu-b")
    monkeypatch.setattr(explained, "SHM", small(size))
    found = explain(text)
    assert (f"{explained.SHM}, which on gpu-b has " in found) == is_explained
    assert ("--shm-size" in found) == is_explained


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
