"""Versions of what a host trains with, and fingerprints of its code. None of it is imported."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from dtrain.doctor.asked import Asked
from dtrain.doctor.diagnosis import OK, PROBLEM, Diagnosis

_CUDA = re.compile(r"^cuda\b.*?=\s*'([\d.]+)'", re.MULTILINE)
_SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "runs"}
_MOST_FILES = 5_000


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
    digest = blake2b(digest_size=6)
    for number, path in enumerate(_python_files(directory)):
        if number >= _MOST_FILES:
            break
        digest.update(str(path.relative_to(directory)).encode() + b"\0")
        try:
            digest.update(path.read_bytes() + b"\0")
        except OSError as error:
            digest.update(str(error.errno).encode())
    return digest.hexdigest()


def own_fingerprint() -> str:
    """Return the fingerprint of dtrain's own code."""
    return fingerprint(Path(__file__).resolve().parents[1])


def _python_files(directory: Path) -> Iterator[Path]:
    for folder, inside, names in os.walk(directory):
        inside[:] = sorted(name for name in inside if name not in _SKIPPED and name[0] != ".")
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
