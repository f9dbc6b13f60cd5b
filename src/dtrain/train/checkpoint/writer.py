"""The writer process of a rank, and the memory through which it gets the state."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from dtrain.errors import CheckpointError
from dtrain.forking import Channel
from dtrain.run.manifest import Entry
from dtrain.train.checkpoint import writer_process
from dtrain.train.checkpoint.directory import CheckpointDirectory, Failure, Written
from dtrain.train.checkpoint.headers import Described
from dtrain.train.checkpoint.parts import Image, Piece, as_bytes
from dtrain.train.digest import texts_of_each

_MADV_POPULATE_WRITE = 23
_AT_ONCE = 1 << 20
"""Bytes that are digested and then copied, while they are in the processor's cache. For fewer than
100 KB xxhash keeps the GIL, so that threads wait for one another."""


class Staging:
    """Memory that this rank shares with its writer process. It is kept, because new memory is slow.

    It is a file without a name, so that nothing of it is left when both processes have ended.

    Args:
        threads: the number of threads that copy.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.size = 0
        self.fd = -1
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._preparing: threading.Thread | None = None
        self._stream: Any = None
        self._is_pinned = False
        """Whether a GPU can copy here at full speed."""

    def prepare(self, size: int) -> None:
        """Make the memory for a first copy, in a thread: 0.5 GB take 0.4 s."""
        self._make(size)
        populate = ctypes.CDLL(None, use_errno=True).madvise  # it releases the GIL
        address, length = ctypes.c_void_p(self._memory.data_ptr()), ctypes.c_size_t(size)
        arguments = (address, length, _MADV_POPULATE_WRITE)  # no effect before Linux 5.14
        self._preparing = threading.Thread(target=populate, args=arguments, daemon=True)
        self._preparing.start()

    def copy(self, image: Image) -> list[str]:
        """Copy the pieces of a file here. Return the digests of the live tensors."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        if self.fd < 0 or image.bytes > self.size:
            self._make(max(1, image.bytes))  # mmap refuses 0 bytes
        on_gpu = any(piece.data.is_cuda for piece in image.pieces)
        return self._copy_from_gpu(image) if on_gpu else self._copy(image)

    def close(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._is_pinned:
            unpin = torch.cuda.cudart().cudaHostUnregister
            torch.cuda.check_error(int(unpin(self._memory.data_ptr())))
            self._is_pinned = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _make(self, size: int) -> None:
        self.close()
        self.fd = os.memfd_create("dtrain-checkpoint", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._memory = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
        self.size = size

    def _copy(self, image: Image) -> list[str]:
        digests = [""] * len(image.pieces)
        starts = accumulate((piece.bytes for piece in image.pieces), initial=0)
        # the threads share this iterator: a pool's task for each piece would take longer
        pieces = iter(list(zip(range(len(digests)), image.pieces, starts, strict=False)))

        def copy() -> None:
            for index, piece, start in pieces:
                digests[index] = self._copy_piece(piece, start)

        with ThreadPoolExecutor(self._threads) as pool:
            others = [pool.submit(copy) for _ in range(self._threads - 1)]
            copy()
            for each in others:
                each.result()
        return digests

    def _copy_piece(self, piece: Piece, start: int) -> str:
        source = np.frombuffer(as_bytes(piece.data), dtype=np.uint8)
        target = self._memory.numpy()[start : start + len(source)]
        digest = xxhash.xxh3_64()
        for low in range(0, len(source), _AT_ONCE):
            part = source[low : low + _AT_ONCE]
            digest.update(part.data)
            target[low : low + len(part)] = part
        return f"xxh3:{digest.intdigest():016x}"

    def _copy_from_gpu(self, image: Image) -> list[str]:
        """Copy on a stream of its own, into pinned memory; return when that is done."""
        digests = texts_of_each(piece.data for piece in image.pieces)
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if not self._is_pinned:
            pin = torch.cuda.cudart().cudaHostRegister
            torch.cuda.check_error(int(pin(self._memory.data_ptr(), self.size, 0)))
            self._is_pinned = True
        self._stream.wait_stream(torch.cuda.current_stream())
        start = 0
        with torch.cuda.stream(self._stream):
            for piece in (each for each in image.pieces if each.bytes):
                end = start + piece.bytes
                here = self._memory[start:end].view(piece.data.dtype).view(piece.data.shape)
                here.copy_(piece.data, non_blocking=True)
                start = end
        self._stream.synchronize()
        return digests


class Writer:
    """A process that writes what this rank stages, while this rank trains.

    One request is in progress at a time. `poll` or `wait` return its result.

    Args:
        directory: the checkpoints of the run.
        rank: this rank.
        threads: the number of threads that copy the state.
    """

    def __init__(self, directory: CheckpointDirectory, rank: int, threads: int) -> None:
        self._directory = directory
        self._rank = rank
        self._staging = Staging(threads)
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

    def prepare(self, size: int) -> None:
        """Prepare for a first part of a size in bytes, so that training stops for less time."""
        self._staging.prepare(size)

    def copy(self, image: Image) -> list[Described]:
        """Copy the content of this rank's part. Then the tensors may change.

        Returns:
            What `write` has to write.
        """
        return image.described(self._staging.copy(image))

    def write(self, folder: Path, save: str, pieces: list[Described]) -> None:
        """Begin to write this rank's part, which was copied.

        Raises:
            CheckpointError: the process has ended.
        """
        request = {"rank": self._rank, "pieces": pieces}
        self._send(folder, save, request, self._staging.fd)

    def commit(self, folder: Path, save: str, facts: dict[str, Any]) -> None:
        """Begin to write the manifest, of which `facts` are the arguments.

        Raises:
            CheckpointError: the process has ended.
        """
        self._send(folder, save, facts)

    def poll(self) -> Written | bool | None:
        """Return the result of the request: the part, or True; None until it is done.

        Raises:
            CheckpointError: the request failed, or the process has ended.
        """
        return self._result(0.0)

    def wait(self) -> Written | bool:
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
        directory = self._directory
        where = {"run": str(directory.run.path), "retention": asdict(directory.retention)}
        request = {**where, "folder": str(folder), "save": save, **request}
        try:
            writer_process.send(self._channel, request, *files)
        except ConnectionError:  # the process lives if it is any other OSError
            raise self._ended() from None

    def _result(self, wait_s: float | None) -> Written | bool | None:
        try:
            answer, _ = writer_process.receive(self._channel, wait_s)
        except EOFError:
            raise self._ended() from None
        if answer is None:
            return None
        if "failed" in answer:
            raise Failure(**answer["failed"]).error()
        if "written" not in answer:
            return True
        written = answer["written"]
        return Written(Entry(**written["entry"]), written["seconds"])

    def _ended(self) -> CheckpointError:
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return CheckpointError(
            f"the process that writes the checkpoints of rank {self._rank} has ended ({how})",
            code="checkpoint.writer-ended",
        )
