"""The cells of README's matrix that need Ray: see `tests/dist/matrix.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix import shown, told
from raying import RayCluster


def test_the_matrix_is_what_launches_on_ray_show(
    ray: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = tmp_path / "config" / "dtrain" / "launchers"
    profiles.mkdir(parents=True)
    text = f"launcher: ray\nextends: ray\noptions:\n  address: {ray.address}\n"
    (profiles / "here.yaml").write_text(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert shown(tmp_path, "ray", "here") == told("ray")
