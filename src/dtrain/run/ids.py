"""Ids of runs: how one is made, and which a person may give.

An id is a folder's name and an argument of commands, and it stands in comments of batch scripts.
"""

from __future__ import annotations

import re
import secrets

LONGEST = 200
"""Bytes of an id or a name: of file names that are made of one, 255 are allowed."""


def new(name: str) -> str:
    """`<name>-<6 random characters>`, fit for a file name, a host name label and a Slurm job."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[: LONGEST - 50] or "run"
    alphabet = "abcdefghjkmnpqrstuvwxyz23456789"  # none that are read for one another
    return f"{slug}-{''.join(secrets.choice(alphabet) for _ in range(6))}"


def problem(run_id: str) -> str | None:
    """Why a text cannot be the id of a run; None when it can."""
    if not run_id or not run_id.isprintable():
        return "it must be printable text"
    if "/" in run_id or run_id.startswith((".", "-")):
        return "it is the name of a folder, without /, and begins with neither . nor -"
    if run_id == "last":
        return "that word means the newest run"
    if len(run_id.encode()) > LONGEST:
        return f"it has more than {LONGEST} bytes"
    return None
