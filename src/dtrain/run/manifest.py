"""The manifest of a checkpoint: its files, with the size and the digest of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import CheckpointError, DamagedError
from dtrain.run import files

NAME = "manifest.json"


@dataclass(frozen=True)
class Entry:
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    format: int
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
    wrong = [name for name in (*manifest.files, manifest.digest) if not _is_name(name)]
    if wrong:
        raise CheckpointError(
            f"{NAME} is damaged: {wrong[0][:200]!r} is the name of no file",
            code="checkpoint.damaged-manifest",
        )
    return manifest


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and Path(text).name == text
