"""GPUs and their driver, by a fake of NVIDIA's library: a test machine may have none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtrain.doctor import gpus, versions
from dtrain.doctor.asked import Asked


class FakeNvml:
    """What the library answers for two GPUs, with a driver that supports CUDA 12.4."""

    used = (1 << 20, 1 << 20)

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.54.15"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12040

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetIndex(self, gpu: int) -> int:
        return gpu

    def nvmlDeviceGetName(self, _gpu: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> SimpleNamespace:
        return SimpleNamespace(used=self.used[gpu], total=1 << 30)

    def nvmlDeviceGetPciInfo(self, gpu: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"0000FFFF:0{gpu}:00.0")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(gpus, "installed", lambda: 2)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    return fake


def asked(number: int) -> Asked:
    return Asked(Path("runs"), gpus=number)


def test_gpus_that_are_there(nvml: FakeNvml) -> None:
    found = gpus.gpus(asked(2))
    assert (found.status, found.fact) == ("ok", "2 GPUs (NVIDIA H200); 2 asked for")
    assert gpus.gpus(asked(3)).status == "problem"
    fewer = gpus.gpus(Asked(Path("runs"), gpus=2, env={gpus.VISIBLE: "1"}))
    assert (fewer.status, "1 GPU " in fewer.fact) == ("problem", True)
    assert gpus.numa_nodes() == []  # the kernel here knows no such device


def test_gpus_that_another_program_uses(nvml: FakeNvml) -> None:
    nvml.used = (0, 1 << 29)
    assert gpus.gpus(asked(0)).status == "ok"
    found = gpus.gpus(asked(2))
    assert (found.status, "GPU 1 (50% of its memory)" in found.fact) == ("warning", True)


@pytest.mark.parametrize(
    ("built", "number", "status"),
    [
        ("12.8", 1, "ok"),  # a later minor version of the same major one
        ("11.8", 1, "ok"),
        ("13.0", 1, "problem"),
        ("13.0", 0, "warning"),
        (None, 1, "problem"),
        (None, 0, "warning"),
    ],
)
def test_a_driver_and_the_cuda_of_torch(
    nvml: FakeNvml, built: str | None, number: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "torch_cuda", lambda: built)
    found = gpus.driver(asked(number))
    assert found.status == status
    if built == "13.0":
        assert "update the driver to 580" in found.remedy


def test_without_the_package_the_driver_is_not_checked(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(versions, "torch_cuda", lambda: "12.8")
    found = gpus.driver(asked(1))
    assert (found.status, found.remedy) == ("warning", "pip install nvidia-ml-py")
    assert gpus.gpus(asked(2)).fact == "2 GPUs; 2 asked for"
