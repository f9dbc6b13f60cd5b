"""Versions of what a host trains with, and fingerprints of its code. None of it is imported."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from dtrain.doctor.asked import Asked
from dtrain.doctor.diagnosis import OK, PROBLEM, Diagnosis

_CUDA = re.compile(r"^cuda\b.*?=\s*'([\d.]+)'", re.MULTILINE)
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "runs"}
_MOST_ENTRIES = 50_000


def versions(_asked: Asked) -> Diagnosis:
    """Return the versions of Python, dtrain and torch."""
    found = installed()
    fact = ", ".join(f"{name} {value}" for name, value in found.items())
    if found["torch"] == "missing":
        return Diagnosis("versions", PROBLEM, fact, "pip install torch")
    return Diagnosis("versions", OK, fact)


def installed() -> dict[str, str]:
    """Return the versions of Python, dtrain and torch here."""
    from dtrain import __version__

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "missing"
    return {"Python": platform.python_version(), "dtrain": __version__, "torch": torch}


def torch_cuda() -> str | None:
    """Return the version of CUDA that torch is built for. None for a torch for the CPU."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = _CUDA.search(text)
    return found[1] if found else None


def fingerprint(directory: Path) -> str:
    """Return a short text that is the same where all Python files of a directory are the same."""
    files = _python_files(directory)
    if files is None:
        return "not compared, there are too many files"
    digest = blake2b(digest_size=6)
    for path in sorted(files):
        digest.update(path.encode() + b"\0")
        try:
            digest.update((directory / path).read_bytes() + b"\0")
        except OSError as error:
            digest.update(str(error.errno).encode())
    return digest.hexdigest()


def own_fingerprint() -> str:
    """Return the fingerprint of dtrain's own code."""
    return fingerprint(Path(__file__).resolve().parents[1])


def _python_files(directory: Path) -> list[str] | None:
    """Return relative paths. None if there are too many files: data may be beside the code."""
    found: list[str] = []
    todo, seen = [""], 0
    while todo:
        folder = todo.pop()
        with contextlib.suppress(OSError), os.scandir(directory / folder) as entries:
            for entry in entries:
                path, seen = os.path.join(folder, entry.name), seen + 1
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _SKIPPED and not entry.name.startswith("."):
                        todo.append(path)
                elif entry.name.endswith(".py"):
                    found.append(path)
                if seen > _MOST_ENTRIES:
                    return None
    return found
