"""A module that is imported relative to its package."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

OF_RANKS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
)  # fmt: skip
PRESENT = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")


def describe(main: ModuleType, folder: Path) -> None:
    """Write what a program sees of the way in which it was started."""
    spec: Any = main.__spec__
    seen = {
        "argv": sys.argv,
        "name": main.__name__,
        "package": main.__package__ or None,
        "spec": spec and spec.name,
        "file": os.path.abspath(main.__file__ or ""),
        "path": os.path.abspath(sys.path[0]),
        "cwd": os.getcwd(),
        "env": {name: os.environ.get(name) for name in OF_RANKS},
        "present": [name for name in PRESENT if os.environ.get(name)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen, indent=1))
