"""The secret of one attempt, by which its agents know one another; see `sealed`."""

from __future__ import annotations

import contextlib
import os
import secrets

from dtrain.run import files
from dtrain.run.rundir import RunDir

BYTES = 32


def of_attempt(run: RunDir, attempt: int) -> bytes:
    """The token of an attempt, made by whichever host asks for it first.

    It is worth nothing once the attempt has ended: the next one has another.

    Raises:
        OSError: it can be neither read nor written.
    """
    path = run.token(attempt)
    with contextlib.suppress(FileNotFoundError):
        return _read(run, attempt)
    files.make_parent(path)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)  # a rename would replace what another host has just read
    finally:
        aside.unlink(missing_ok=True)
    return _read(run, attempt)


def _read(run: RunDir, attempt: int) -> bytes:
    path = run.token(attempt)
    try:
        token = bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError:
        token = b""
    if len(token) != BYTES:
        raise OSError(0, "is damaged", str(path))
    return token
