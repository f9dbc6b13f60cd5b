"""List launchers and profiles for `dtrain launchers`: every option, its value, its source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.assets import asset_dir
from dtrain.errors import DtrainError, first_line
from dtrain.job.located import Located, shown_path
from dtrain.job.model import Model
from dtrain.job.profile import (
    LoadedProfile,
    load_profile,
    place_text,
    profile_names,
    search_path,
)
from dtrain.job.spec import LaunchSpec
from dtrain.launchers import base
from dtrain.launchers.flags import FLAGS, external_flags


@dataclass(frozen=True)
class ProfileListing:
    """A profile, with the name that `--launcher` takes."""

    name: str
    launcher: str
    file: str
    description: str
    problem: str
    """The reason why it cannot be used here, with a solution; empty when it can be used."""


@dataclass(frozen=True)
class Setting:
    """One field of a profile."""

    section: str
    """The section: `launch` or `options`."""
    name: str
    kind: str
    """The kind of value: for example `text`, `number`, `duration`, or the allowed values."""
    value: str
    source: str
    """The file and line, or `default`."""
    flags: tuple[str, ...]
    """Flags of `dtrain launch` that set it, in addition to `-o`."""
    help: str


def profiles(job_dir: str | os.PathLike[str] = ".") -> list[ProfileListing]:
    """List every profile that can be named: those of this directory and the packaged ones."""
    names = profile_names(search_path(Path(job_dir)))
    return [_listing_or_problem(name, job_dir) for name in names]


def settings(
    name: str, job_dir: str | os.PathLike[str] = "."
) -> tuple[ProfileListing, list[Setting]]:
    """List every field of a profile.

    Raises:
        JobError: there is no such profile, or its files are wrong.
    """
    profile = load_profile(name, job_dir)
    model = base.load(profile.spec.launcher).options_model
    found = [
        *_settings("launch", LaunchSpec, profile),
        *_settings("options", model, profile),
    ]
    return _listing_of(profile), found


def _listing_or_problem(name: str, job_dir: str | os.PathLike[str]) -> ProfileListing:
    try:
        return _listing_of(load_profile(name, job_dir))
    except DtrainError as error:
        return ProfileListing(name, "", "", "", first_line(error))


def _listing_of(profile: LoadedProfile) -> ProfileListing:
    launcher = profile.spec.launcher
    problem = catalog.problem_of("launcher", launcher) or ""
    path = profile.chain[0]
    file = "packaged" if path.parent == asset_dir("launchers") else shown_path(path)
    return ProfileListing(profile.name, launcher, file, profile.spec.description, problem)


def _settings(section: str, model: type[Model], profile: LoadedProfile) -> Iterator[Setting]:
    located = profile.launch if section == "launch" else profile.options
    fields = model.model_json_schema().get("properties", {})
    flags = {each.option: each.names for each in (*FLAGS, *external_flags())}
    for name, schema in fields.items():
        value, source = _value(located.get(name), schema)
        yield Setting(
            section,
            name,
            _kind(schema),
            value,
            source,
            flags.get(name, ()) if section == "options" else (),
            schema.get("description", "").replace("\n", " "),
        )


def _value(part: Located | None, schema: dict[str, Any]) -> tuple[str, str]:
    """Return a field's value and its source. `default` also means a packaged profile."""
    if part is None or part.value is None:
        return _text(schema.get("default")), "default"
    value = part.raw if part.raw is not None else _text(part.plain())
    is_packaged = part.place.file.startswith(str(asset_dir("launchers")))
    return value, "default" if is_packaged else place_text(part.place)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value in (None, [], {}) else str(value)


def _kind(schema: dict[str, Any]) -> str:
    """Return a word for the type of a field, from its JSON Schema."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    for one in schema.get("anyOf", ()):
        if one.get("type") != "null":
            return _kind(one)
    kind = schema.get("type")
    if isinstance(kind, list):
        return "size" if "integer" in kind else "duration"
    names = {
        "boolean": "true or false",
        "integer": "number",
        "array": "list",
        "object": "section",
    }
    return names.get(str(kind), "text")
