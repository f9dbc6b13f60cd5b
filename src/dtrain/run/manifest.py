"""The manifest of a checkpoint: its files, with the size and the digests of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import CheckpointError, DamagedError
from dtrain.run import files

NAME = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint."""

    bytes: int
    blocks: list[str]
    """The xxh3-128 of each block of the file. All blocks but the last have the same size."""


@dataclass(frozen=True)
class Manifest:
    format: int
    save: str
    """A random name of this save. At a URL, the files are in a directory of this name."""
    files: dict[str, Entry]
    digest: str
    """The digest of the manifest itself, without this field."""


def parse(text: str | bytes) -> Manifest:
    """Parse a manifest from its text.

    Raises:
        CheckpointError: it is not a manifest. The error gives the reason.
    """
    try:
        manifest = files.parse_as(Manifest, text, NAME)
    except DamagedError as error:
        raise CheckpointError(
            f"{NAME} is damaged: {error.why}", code="checkpoint.damaged-manifest"
        ) from None
    wrong = [name for name in (*manifest.files, manifest.save) if not _is_name(name)]
    if wrong:
        raise CheckpointError(
            f"{NAME} is damaged: {wrong[0][:200]!r} is the name of no file",
            code="checkpoint.damaged-manifest",
        )
    return manifest


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and Path(text).name == text
