"""The package as it is published: an sdist and a wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import ROOT


def built_in(folder: Path) -> Path:
    """Build an sdist, and the wheel from it, without the network. Return their directory."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
