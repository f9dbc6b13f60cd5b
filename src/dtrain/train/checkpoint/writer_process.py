"""`python -m dtrain.train.checkpoint.writer_process`: writes the checkpoints of one rank.

The rank copies its part into memory that both processes share, and trains on. This process verifies
that the copy is the state of the training, writes it, and fsyncs it. It does not import torch, so
it starts in a tenth of a second. It ends with its rank.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.forking import Channel
from dtrain.procs import die_with_parent, ignore_stops
from dtrain.run.manifest import Entry
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.directory import CheckpointDirectory, Failure
from dtrain.train.checkpoint.headers import Described, header
from dtrain.train.checkpoint.proof import require_same
from dtrain.train.checkpoint.retention import Retention


def send(channel: Channel, message: dict[str, Any], *files: int) -> None:
    """Send a message of any length, in a file in memory, and other descriptors.

    Raises:
        ConnectionError: the other process has ended.
        OSError: the message cannot be sent for another reason.
    """
    fd = os.memfd_create("dtrain-message", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        file.write(json.dumps(message).encode())
        file.flush()
        channel.send({}, [file.fileno(), *files])


def receive(channel: Channel, wait_s: float | None) -> tuple[dict[str, Any] | None, list[int]]:
    """Return the next message and the other descriptors; None if none came in `wait_s` seconds.

    Raises:
        EOFError: the other process has ended.
    """
    arrived, files = channel.receive_with_files(wait_s)
    if arrived is None:
        return None, files
    with os.fdopen(files[0], "rb") as file:
        file.seek(0)
        message: dict[str, Any] = json.loads(file.read())
    return message, files[1:]


class _Server:
    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._inode = 0
        self._directory: CheckpointDirectory | None = None

    def answer(self, request: dict[str, Any], files: list[int]) -> dict[str, Any]:
        """Do what the rank asks for. Return the result, or why it failed."""
        for fd in files:
            self._map(fd)
        folder = Path(request["folder"])
        try:
            if self._directory is None:
                retention = Retention(**request["retention"])
                self._directory = CheckpointDirectory(RunDir(request["run"]), retention)
            directory = self._directory
            if "pieces" in request:
                pieces = [Described(*each) for each in request["pieces"]]
                content = self._content(pieces)
                written = directory.write(folder, request["save"], request["rank"], content)
                return {"written": asdict(written)}
            entries = {name: Entry(**each) for name, each in request["entries"].items()}
            texts, about = request["texts"], request["about"]
            directory.commit(folder, request["save"], entries, texts, about)
        except Exception as error:  # the rank has to know of any error
            return {"failed": asdict(Failure.of(folder, error))}
        return {}

    def _map(self, fd: int) -> None:
        """Map the memory with the copy, unless it is mapped already."""
        inode = os.fstat(fd).st_ino
        if inode != self._inode:
            self._memory, self._inode = mmap.mmap(fd, 0, prot=mmap.PROT_READ), inode
        os.close(fd)

    def _content(self, pieces: list[Described]) -> Iterator[Any]:
        """Yield the bytes of a part's file. Each piece is verified before it is written."""
        assert self._memory is not None
        memory = memoryview(self._memory)
        yield header(pieces)
        start = 0
        for piece in pieces:
            data = memory[start : start + piece.bytes]
            require_same(data, piece)
            yield data
            start += piece.bytes


def main() -> None:
    """Serve the rank at the other end of the socket until it is closed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--parent", type=int, required=True, help="pid of the rank to die with")
    parser.add_argument("--socket", type=int, required=True, help="socket for the requests")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    ignore_stops()  # its rank decides
    channel = Channel(socket.socket(fileno=arguments.socket))
    server = _Server()
    while True:
        try:
            request, files = receive(channel, None)
            if request is not None:
                send(channel, server.answer(request, files))
        except (EOFError, ConnectionError):
            sys.exit(0)


if __name__ == "__main__":
    main()
