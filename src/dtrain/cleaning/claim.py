"""Hold a run that has ended, so that no command resumes it meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dtrain.errors import DtrainError
from dtrain.launchers import status
from dtrain.run.attempts import Handle, Held
from dtrain.run.remote import runs as remote
from dtrain.run.rundir import RunDir


@contextlib.contextmanager
def held(run: RunDir) -> Iterator[Handle | None]:
    """Claim the next attempt of a run within the `with` block, as a resume would.

    Yields:
        The handle of the newest attempt before. None if no command has begun one.

    Raises:
        Held: another command drives the run.
        RemoteStoreError: the URL of the run does not answer.
    """
    before = Handle.read(run)
    if status.state_of(run)[0] == "running":
        raise Held(run, before)
    attempt = status.next_attempt(run)
    handle = Handle.of_this_process("local", attempt)
    handle.claim(run)
    try:
        try:
            remote.claim(run, run.handle(attempt))
        except FileExistsError:
            raise Held(run, remote.holder(run, attempt)) from None
        try:
            remote.send_heartbeat(run)
            yield before
        finally:
            with contextlib.suppress(DtrainError):
                remote.release(run, run.handle(attempt))
    finally:
        with contextlib.suppress(OSError):  # the run may be gone
            run.handle(attempt).unlink()
            run.attempt(attempt).rmdir()
