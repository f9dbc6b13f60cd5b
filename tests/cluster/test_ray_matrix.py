"""The cells of README's matrix that need Ray: see `tests/support/matrix.py`."""

from __future__ import annotations

from pathlib import Path

from support.matrix import documented, shown
from support.ray_cluster import RayCluster


def test_the_matrix_is_what_launches_on_ray_show(
    ray: RayCluster, tmp_path: Path, profiles: Path
) -> None:
    text = f"launcher: ray\nextends: ray\noptions:\n  address: {ray.address}\n"
    (profiles / "here.yaml").write_text(text)
    assert shown(tmp_path, "ray", "here") == documented("ray")
