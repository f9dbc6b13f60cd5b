"""Checks of this host, each on a condition that is made for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain import cgroups
from dtrain.doctor import host
from dtrain.doctor.asked import Asked
from dtrain.doctor.checks import ALONE_CHECKS, HOST_CHECKS, run_checks
from dtrain.doctor.diagnosis import CHECK_CODES, Diagnosis

CHILD = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from dtrain.doctor import checks, host, network
from dtrain.doctor.asked import Asked
{before}
print(json.dumps(asdict({call})))
"""


def in_child(before: str, call: str, *within: str) -> Diagnosis:
    """What a check finds in a process of its own, with less than this one has."""
    command = [*within, sys.executable, "-c", CHILD.format(before=before, call=call)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Diagnosis(**json.loads(done.stdout))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an empty file system with the options given."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "dtrain-test", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("no right to mount a small file system here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_host_without_a_job_has_no_problem_and_answers_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    found = [*run_checks({**HOST_CHECKS, **ALONE_CHECKS}, Asked(tmp_path / "runs"))]
    assert time.monotonic() - began < 5  # 0.05 s on an idle machine
    assert [each.check for each in found] == [*HOST_CHECKS, *ALONE_CHECKS]
    assert {each.check for each in found} <= CHECK_CODES.keys()
    assert [each for each in found if each.status == "problem"] == []


def test_a_check_that_fails_is_a_warning() -> None:
    def broken(_asked: Asked) -> Diagnosis:
        raise OSError("no such device")

    (found,) = run_checks({"numa": broken}, Asked(Path("runs")))
    assert (found.check, found.status) == ("numa", "warning")
    assert "no such device" in found.fact


@pytest.mark.parametrize(
    ("size", "loaders", "gpus", "status"),
    [
        ("32m", 0, 0, "ok"),
        ("32m", 2, 0, "problem"),  # loader processes
        ("32m", 0, 2, "problem"),  # NCCL
        ("32m", 0, 1, "ok"),
        ("64m", 2, 0, "problem"),  # a container's own
        ("512m", 2, 0, "warning"),
        ("1100m", 2, 0, "ok"),
    ],
)
def test_shared_memory(
    disk: Callable[[str], Path], size: str, loaders: int, gpus: int, status: str
) -> None:
    asked = Asked(Path("runs"), procs=2, loaders=loaders, gpus=gpus)
    found = host.shm(asked, disk(f"size={size}"))
    assert found.status == status
    assert ("--shm-size" in found.remedy) == (status != "ok")
    assert ("4 loader processes" in found.fact) == (loaders > 0)


@pytest.mark.parametrize(
    ("limit", "asked", "status", "remedy"),
    [
        ("NOFILE, (60, 60)", "procs=8", "problem", "ulimit -n 4096 (the hard limit is 60"),
        ("NOFILE, (300, 5000)", "procs=2, loaders=40", "problem", "ulimit -n 4096"),
        ("NOFILE, (300, 5000)", "procs=2", "warning", "ulimit -n 4096"),
        ("NOFILE, (5000, 5000)", "procs=2", "ok", ""),
        ("AS, (1 << 33, 1 << 33)", "procs=2", "warning", "ulimit -v unlimited"),
    ],
)
def test_limits(limit: str, asked: str, status: str, remedy: str) -> None:
    lower = f"import resource; resource.setrlimit(resource.RLIMIT_{limit})"
    found = in_child(lower, f"host.ulimits(Asked(Path('runs'), {asked}))")
    assert (found.check, found.status) == ("ulimits", status)
    assert found.remedy.startswith(remedy)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_number_of_processes_of_a_user() -> None:
    become = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (10, 10)); os.setresuid(65534, 65534, 65534)"
    )
    found = in_child(become, "host.ulimits(Asked(Path('runs'), procs=4))")
    assert found.status == "problem"
    assert "ulimit -u" in found.remedy
    assert found.fact.endswith(" 100")  # 4 ranks with a thread that computes, and 24 others


def test_cores_of_the_affinity() -> None:
    bind = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    found = in_child(bind, "host.cores(Asked(Path('runs'), procs=2, threads=1))")
    assert found.status == "warning"
    assert found.fact.startswith("1 of ")
    assert found.remedy.startswith("--procs 1")
    bound = in_child(bind, "host.numa(Asked(Path('runs')))")
    assert bound.status == "ok"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cores_of_a_fake_control_group(
    files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(cgroups, "directories", lambda _controller: iter([tmp_path]))
    assert host.cpu_quota() == quota
    if quota == 0.5:
        found = host.cores(Asked(tmp_path, procs=1, threads=1))
        assert found.status == "warning"
        assert "quota" in found.fact


def test_numa_nodes_of_fake_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = sorted(os.sched_getaffinity(0))
    for node, cores in enumerate((",".join(map(str, mine)), "500-503")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{cores}\n")
    asked = Asked(tmp_path, gpus=2)
    for gpus, status in (([0, 0], "ok"), ([-1, 0], "ok"), ([0, 1], "warning")):
        monkeypatch.setattr(host.gpus, "numa_nodes", lambda gpus=gpus: gpus)
        found = host.numa(asked, tmp_path)
        assert found.status == status
        assert found.fact.startswith(f"bound to {len(mine)} core")
    assert host.cpus("0-2,8,\n") == {0, 1, 2, 8}


def test_disk(disk: Callable[[str], Path]) -> None:
    small = disk("size=4m")
    runs = small / "not" / "made"
    found = host.disk(Asked(runs))
    assert (found.status, str(small) in found.fact) == ("warning", True)
    assert host.disk(Asked(runs, checkpoint_bytes=5 << 20)).status == "problem"
    assert host.disk(Asked(disk("size=4m,ro"))).status == "problem"
    large = disk("size=2g")
    assert host.disk(Asked(large)).status == "ok"
    asked = Asked(large, checkpoint_bytes=900 << 20, kept=2)
    assert host.disk(asked).status == "warning"  # there is room for two, and a third is made
    assert host.disk(Asked(disk("size=2g,nr_inodes=100"))).status == "warning"


def test_fsync(disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = disk("size=4m")
    found = host.fsync(Asked(folder))
    assert (found.status, found.fact.endswith(f"at {folder} (tmpfs)")) == ("ok", True)
    assert host.fsync(Asked(disk("size=4m,ro"))).status == "problem"
    monkeypatch.setattr(host.os, "fsync", lambda _fd: time.sleep(0.06))  # a slow disk
    assert host.fsync(Asked(folder)).status == "warning"


def test_a_directory_that_hosts_can_share(disk: Callable[[str], Path]) -> None:
    folder = disk("size=1m")
    assert host.shared(Asked(folder)).status == "ok"
    found = host.shared(Asked(folder, hosts=2))
    assert (found.status, " is on tmpfs: " in found.fact) == ("warning", True)
    assert host.filesystem(Path("/proc/self")) == "proc"


def test_a_clock_without_ntp_matters_on_several_hosts() -> None:
    alone, of_two = host.clock(Asked(Path("runs"))), host.clock(Asked(Path("runs"), hosts=2))
    assert alone.status == "ok"
    assert of_two.status == ("ok" if "kept by NTP" in alone.fact else "warning")
