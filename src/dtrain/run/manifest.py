"""The manifest of a checkpoint: its files, with the size and the digests of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from dtrain.errors import CheckpointError, DamagedError
from dtrain.run import files

NAME = "manifest.json"
FORMAT = 2


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
    about: dict[str, Any]
    """Facts for people: time, versions, world size."""
    files: dict[str, Entry]
    digest: str
    """The digest of the manifest itself, without this field."""

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def text_of(save: str, about: Mapping[str, Any], entries: Mapping[str, Entry]) -> str:
    """Return the text of a manifest; the arguments are the fields of `Manifest`."""
    plain: dict[str, Any] = {
        "format": FORMAT,
        "save": save,
        "about": dict(about),
        "files": {name: asdict(entry) for name, entry in entries.items()},
    }
    plain["digest"] = digest_of(plain)
    return json.dumps(plain, indent=1) + "\n"


def digest_of(plain: Mapping[str, Any]) -> str:
    """Return the digest of a manifest, which is JSON."""
    bare = {key: value for key, value in plain.items() if key != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(bare, sort_keys=True).encode())


def parse(text: str | bytes) -> Manifest:
    """Parse a manifest from its text, and verify it by its own digest.

    Raises:
        CheckpointError: it is not a manifest. The error gives the reason.
    """
    try:
        plain = files.parse_as(dict[str, Any], text, NAME)
        if plain.get("digest") != digest_of(plain):
            raise DamagedError(NAME, "its own digest does not match")
        if plain.get("format") != FORMAT:
            raise CheckpointError(
                f"its format is {plain.get('format')!r:.40}; this version of dtrain reads format "
                f"{FORMAT}",
                code="checkpoint.other-format",
            )
        manifest = files.parse_as(Manifest, json.dumps(plain), NAME)
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


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint from its directory.

    Raises:
        CheckpointError: it is missing, damaged or cannot be read.
    """
    try:
        text = files.read_text(folder / NAME)
    except DamagedError as error:
        raise CheckpointError(
            f"{NAME} is damaged: {error.why}", code="checkpoint.damaged-manifest"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{NAME} cannot be read: {error.strerror}", code="checkpoint.unreadable-file"
        ) from error
    if text is None:
        raise missing_manifest()
    return parse(text)


def missing_manifest() -> CheckpointError:
    return CheckpointError(f"{NAME} is missing", code="checkpoint.missing-manifest")


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and Path(text).name == text
