"""Ids of runs: how dtrain makes one, and which ids a user may give.

An id is the name of a directory, an argument of commands, and part of comments of batch scripts.
"""

from __future__ import annotations

import re
import secrets

LONGEST = 200
"""The most bytes of an id or a name. File names that contain one may have 255."""


def new(name: str) -> str:
    """Return `<name>-<6 random characters>`, a valid file name, host name label and Slurm name."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[: LONGEST - 50] or "run"
    alphabet = "abcdefghjkmnpqrstuvwxyz23456789"  # no characters that look similar
    return f"{slug}-{''.join(secrets.choice(alphabet) for _ in range(6))}"


def problem(run_id: str) -> str | None:
    """Return why a text cannot be the id of a run. None when it can."""
    if not run_id or not run_id.isprintable():
        return "it must be printable text"
    if "/" in run_id or run_id.startswith((".", "-")):
        return "it is the name of a directory, without /, and begins with neither . nor -"
    if run_id == "last":
        return "that word means the newest run"
    if len(run_id.encode()) > LONGEST:
        return f"it has more than {LONGEST} bytes"
    return None
