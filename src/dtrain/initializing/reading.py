"""Read what `--from` names: a command line, a shell or batch script, or a Python file."""

from __future__ import annotations

import os
from pathlib import Path

from dtrain.errors import UsageError, quoted
from dtrain.initializing.existing import Existing
from dtrain.initializing.lightning_script import read_python
from dtrain.initializing.script_file import read_commands, read_script


def read(given: str, folder: Path) -> Existing:
    """Return what an existing file or command line says. Nothing of it is run.

    Args:
        given: the path of a file, or a command line.
        folder: the directory of job.yaml.

    Raises:
        UsageError: it cannot be read, or starts no training.
    """
    path = Path(given)
    if os.path.isfile(given):
        return read_python(path, folder) if path.suffix == ".py" else read_script(path, folder)
    if not given.strip() or len(given.split()) == 1:
        what = "a directory" if os.path.isdir(given) else "not there"
        text = f"--from {quoted(given)} is {what}; give a file, or a command line in quotes"
        raise UsageError(text, code="init.no-file")
    return read_commands(given, "--from", lambda _line: "--from", folder, Path())
