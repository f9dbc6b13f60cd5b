"""The writer process of a rank, and the memory through which it gets the state."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dtrain.errors import CheckpointError
from dtrain.forking import Channel
from dtrain.run.manifest import Entry
from dtrain.train.checkpoint import writer_process
from dtrain.train.checkpoint.directory import CheckpointDirectory, Failure
from dtrain.train.checkpoint.parts import Image, itemsize

_MADV_POPULATE_WRITE = 23
"""Get all pages at once: a first copy takes 1.1 s/GB instead of 1.3 (2 cores, 2026-11)."""


class Staging:
    """Memory that this rank shares with its writer process. It is kept, because new memory is slow.

    It is a file without a name, so that nothing of it is left when both processes have ended.
    """

    def __init__(self) -> None:
        self.size = 0
        self._fd = -1
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stream: Any = None
        self._is_pinned = False
        """Whether a GPU can copy here at full speed."""

    def copy(self, image: Image) -> int | None:
        """Copy the content of a file here. Return the descriptor of the memory if it is new."""
        new = image.bytes > self.size
        if new:
            self._make(image.bytes)
        self._memory[: len(image.header)] = torch.frombuffer(
            bytearray(image.header), dtype=torch.uint8
        )
        start = len(image.header)
        with self._copying(image):
            for piece in image.pieces:
                end = start + piece.bytes
                if end > start:
                    here = self._memory[start:end].view(piece.data.dtype).view(piece.data.shape)
                    here.copy_(piece.data, non_blocking=self._stream is not None)
                start = end
        return self._fd if new else None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._is_pinned:
            unpin = torch.cuda.cudart().cudaHostUnregister
            torch.cuda.check_error(int(unpin(self._memory.data_ptr())))
            self._is_pinned = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _make(self, size: int) -> None:
        self.close()
        self._fd = os.memfd_create("dtrain-checkpoint", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        mapped = mmap.mmap(self._fd, size)
        with contextlib.suppress(OSError):  # before Linux 5.14
            mapped.madvise(_MADV_POPULATE_WRITE)
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self.size = size

    @contextlib.contextmanager
    def _copying(self, image: Image) -> Iterator[None]:
        """Copy from a GPU on a stream of its own, into pinned memory; leave when it is done."""
        devices = {piece.data.device for piece in image.pieces if piece.data.is_cuda}
        if not devices:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(devices.pop())
        if not self._is_pinned:
            pin = torch.cuda.cudart().cudaHostRegister
            torch.cuda.check_error(int(pin(self._memory.data_ptr(), self.size, 0)))
            self._is_pinned = True
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


class Writer:
    """A process that writes what this rank stages, while this rank trains.

    One request is in progress at a time. `poll` or `wait` return its result.
    """

    def __init__(self, directory: CheckpointDirectory, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._staging = Staging()
        self._channel, other = Channel.pair()
        fd = other.fileno()
        name = writer_process.__name__
        arguments = ["--parent", str(os.getpid()), "--socket", str(fd)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", name, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[fd],
            start_new_session=True,  # a Ctrl-C is for the rank
        )
        other.sock.close()

    def write(self, folder: Path, save: str, image: Image) -> None:
        """Begin to write this rank's part. The tensors may change when this returns.

        Raises:
            CheckpointError: the process has ended.
        """
        fd = self._staging.copy(image)
        digests = zip(image.pieces, image.digests, strict=True)
        pieces = [[each.bytes, itemsize(each.data), live, each.key] for each, live in digests]
        request = {"rank": self._rank, "header": len(image.header), "pieces": pieces}
        self._send(folder, save, request, *([] if fd is None else [fd]))

    def commit(self, folder: Path, save: str, facts: dict[str, Any]) -> None:
        """Begin to write the manifest, of which `facts` are the arguments.

        Raises:
            CheckpointError: the process has ended.
        """
        self._send(folder, save, facts)

    def poll(self) -> Entry | bool | None:
        """Return the result of the request: the entry of the file, or True; None until it is done.

        Raises:
            CheckpointError: the request failed, or the process has ended.
        """
        return self._result(0.0)

    def wait(self) -> Entry | bool:
        """Wait for the result of the request, and return it as `poll` does."""
        result = self._result(None)
        assert result is not None
        return result

    def close(self) -> None:
        """End the process. What it has not written is lost."""
        self._channel.sock.close()
        self._process.kill()
        self._process.wait()
        self._staging.close()

    def _send(self, folder: Path, save: str, request: dict[str, Any], *files: int) -> None:
        run, keep = str(self._directory.run.path), self._directory.keep
        request = {"run": run, "keep": keep, "folder": str(folder), "save": save, **request}
        try:
            writer_process.send(self._channel, request, *files)
        except OSError:
            raise self._ended() from None

    def _result(self, wait_s: float | None) -> Entry | bool | None:
        try:
            answer, _ = writer_process.receive(self._channel, wait_s)
        except EOFError:
            raise self._ended() from None
        if answer is None:
            return None
        if "failed" in answer:
            raise Failure(**answer["failed"]).error()
        return Entry(**answer["entry"]) if "entry" in answer else True

    def _ended(self) -> CheckpointError:
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return CheckpointError(
            f"the process that writes the checkpoints of rank {self._rank} has ended ({how})",
            code="checkpoint.writer-ended",
        )
