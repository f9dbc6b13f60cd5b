"""Write the tensors of a checkpoint into one file, in pieces of 1 MiB, each verified."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dtrain.errors import DtrainError, UsageError, shortened
from dtrain.run.files import fsync_dir
from dtrain.train.checkpoint.headers import SAFETENSORS, StoredBytes

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
"""The formats, and the suffix of the file of each."""

Tensors = Mapping[str, StoredBytes]
_LOCAL, _CENTRAL = 30, 46  # the fixed parts of an entry in a zip file and in its directory


def write(tensors: Tensors, to: str, target: Path, about: Mapping[str, str], *, force: bool) -> int:
    """Write tensors into a file. It gets its name when it is complete.

    Args:
        tensors: the tensors by name.
        to: a format of `SUFFIXES`.
        target: the file.
        about: facts for the metadata of a safetensors file.
        force: whether to replace an existing file.

    Returns:
        The size of the file.

    Raises:
        UsageError: the file exists, its directory does not, or the format lacks a type.
        CheckpointError: a byte is damaged.
        DtrainError: the file system reported an error, or torch cannot write such a file.
    """
    if not target.parent.is_dir():
        raise UsageError(
            f"--output: there is no directory {target.parent}", code="export.no-directory"
        )
    if target.exists() and not (force and target.is_file()):
        raise UsageError(
            f"--output: {target} exists; --force replaces a file", code="export.file-exists"
        )
    writer = _safetensors if to == "safetensors" else _torch
    with _replacing(target) as path:
        writer(tensors, path, about)
        return path.stat().st_size


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield the path of a file that becomes `target` at the end."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
            path = Path(aside) / target.name
            yield path
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, target)
        fsync_dir(target.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DtrainError(
            f"cannot write {target}: {error.strerror}; nothing of it is left",
            code="export.no-space" if full else "export.cannot-write",
        ) from error


def _safetensors(tensors: Tensors, path: Path, about: Mapping[str, str]) -> None:
    unknown = {name: each.dtype for name, each in tensors.items() if each.dtype not in SAFETENSORS}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise UsageError(
            f"safetensors has no type {dtype}, which {name} has; --to torch writes it",
            code="export.unsupported-type",
        )
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    start = 0
    # the largest elements first: then each tensor is aligned, without gaps
    for name, each in (ordered := sorted(tensors.items(), key=lambda pair: -pair[1].itemsize)):
        span = [start, start + each.bytes]
        entries[name] = {
            "dtype": SAFETENSORS[each.dtype], "shape": each.shape, "data_offsets": span,
        }  # fmt: skip
        start = span[1]
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, each in ordered:
            for piece in each.pieces():
                file.write(piece.data)


# -- torch -----------------------------------------------------------------------------------


def _torch(tensors: Tensors, path: Path, _about: Mapping[str, str]) -> None:
    """Let torch write the file with empty space, and fill that. Torch does not leave checksums."""
    stored = list({id(each): each for each in tensors.values()}.values())
    number = {id(each): index for index, each in enumerate(stored)}
    request = {
        "tensors": [[each.dtype, each.shape] for each in stored],
        "names": {name: number[id(each)] for name, each in tensors.items()},
    }
    command = [sys.executable, "-P", "-m", "dtrain.checkpoints.torch_file", str(path)]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise DtrainError(
            f"torch cannot write such a file: {shortened(reason, 300)}",
            code="export.torch-failed",
        )
    with zipfile.ZipFile(path) as file:
        entries, position = file.infolist(), file.start_dir
    with path.open("r+b") as opened:
        for entry in entries:
            opened.seek(position)
            head = opened.read(_CENTRAL)
            record = entry.filename.partition("/")[2]
            if record.startswith("data/") and entry.file_size:
                _fill(opened, entry, position, stored[int(record.removeprefix("data/"))])
            position += _CENTRAL + sum(struct.unpack_from("<HHH", head, 28))


def _fill(file: BinaryIO, entry: zipfile.ZipInfo, position: int, tensor: StoredBytes) -> None:
    """Write the bytes of a tensor into its entry of a zip file, and their checksum.

    Args:
        file: the zip file.
        entry: the entry.
        position: the position of the entry in the directory of the file.
        tensor: the tensor.
    """
    file.seek(entry.header_offset)
    name, extra = struct.unpack_from("<HH", file.read(_LOCAL), 26)
    start, checksum = entry.header_offset + _LOCAL + name + extra, 0
    assert entry.file_size == tensor.bytes, entry
    file.seek(start)
    for piece in tensor.pieces():
        file.write(piece.data)
        checksum = zlib.crc32(piece.data, checksum)
    assert entry.flag_bits & 8, entry  # the checksum follows the data, after four other bytes
    for place in (start + tensor.bytes + 4, position + 16):
        file.seek(place)
        file.write(checksum.to_bytes(4, "little"))
