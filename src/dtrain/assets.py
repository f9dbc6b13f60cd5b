"""The location of the files that ship with dtrain: launcher profiles, sbatch templates."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def asset_dir(name: str) -> Path:
    """A directory of shipped files, as `launchers`: in a wheel, or at the top of the checkout."""
    packed = _PACKAGE / "_assets" / name
    return packed if packed.is_dir() else _PACKAGE.parents[1] / name
