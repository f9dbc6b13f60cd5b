"""Find, extend and merge profiles: `launchers/NAME.yaml`, the facts of one cluster or machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, get_origin

from pydantic import ValidationError

from dtrain import catalog
from dtrain.assets import asset_dir
from dtrain.errors import JobError, Problem, quoted
from dtrain.job.launcher_options import LauncherOptions
from dtrain.job.load import (
    numbers_as_text,
    read_root,
    sort_problems,
    sources_of,
    validate,
)
from dtrain.job.located import Located, SourceLocation, did_you_mean, shown_path
from dtrain.job.model import Model
from dtrain.job.spec import ProfileSpec
from dtrain.job.units import found
from dtrain.job.yaml_reader import Locate, read_text, read_yaml

OptionsModel = TypeVar("OptionsModel", bound=LauncherOptions)
Layer = tuple[Path, Located, list[Problem]]


@dataclass(frozen=True)
class LoadedProfile:
    """A profile merged over those it extends."""

    spec: ProfileSpec
    name: str
    chain: list[Path]
    """The files of the profile: its own file, the file which that extends, and so on."""
    sources: dict[str, str]
    """The source of each dotted field: `profile slurm (launchers/slurm.yaml:4)`, or `default`."""
    launch: Mapping[str, Located]
    """The values of the `launch:` section with their locations, for `load_job`."""
    options: Mapping[str, Located] = field(default_factory=dict)
    """The values of the `options:` section with their locations, for `checked_options`."""


def load_profile(
    name: str,
    job_dir: str | os.PathLike[str],
    asked_by: str | None = None,
    *,
    of_project: bool = True,
) -> LoadedProfile:
    """Find a profile by name, and merge it over those it extends.

    A file that extends its own name extends the next file of that name along the search path.

    Args:
        name: the name given with `--launcher`.
        job_dir: the job file's directory.
        asked_by: the source of the name, for errors. None means `--launcher`.
        of_project: whether profiles of the current and of the job's directory count.

    Raises:
        JobError: there is no such profile, or its files have problems, sorted by location.
    """
    folders = search_path(Path(job_dir))[0 if of_project else -2 :]
    layers = list(
        _layers(name, SourceLocation(asked_by or f"--launcher {name}"), folders, folders, [])
    )
    root = layers[-1][1]
    for _, nearer, _ in layers[-2::-1]:
        root = nearer.merge_over(root)
    root = numbers_as_text(root)
    spec, problems = validate(root, ProfileSpec, area="profile")
    problems += [problem for _, _, of_file in layers for problem in of_file]
    launcher, known = root.get(("launcher",)), catalog.names("launcher")
    if launcher and isinstance(launcher.value, str) and launcher.value not in known:
        message = f"unknown; known: {', '.join(known)}{did_you_mean(launcher.value, known)}"
        problems.append(
            launcher.place.problem("launcher", message, code="profile.unknown-launcher")
        )
    if problems or spec is None:
        raise JobError(sort_problems(problems, shown_path(layers[0][0])))
    section = root.get(("launch",))
    launch = section.value if section else {}
    section = root.get(("options",))
    options = section.value if section and isinstance(section.value, dict) else {}
    return LoadedProfile(
        spec, name, [path for path, _, _ in layers], sources_of(spec, root), launch, options
    )


def parse_options(texts: Iterable[str], model: type[LauncherOptions]) -> dict[str, Located]:
    """Read the texts of `-o NAME=VALUE`; values are YAML.

    A dot leads into a section, for example `labels.zone=a`. In a section, NAME alone means true,
    and a repeated name makes a list. A repeated option makes a list too if the option is a list.

    Raises:
        JobError: every text that cannot be read, and every option given twice.
    """
    given = Located({}, SourceLocation("-o"))
    problems: list[Problem] = []
    for text in texts:
        name, equals, value = text.partition("=")
        head, dot, entry = name.partition(".")
        place = SourceLocation(f"-o {name}")
        keys = (head.replace("-", "_"), *([entry] if dot else []))
        if not all(keys) or not (equals or dot) or not name.isprintable():
            problems.append(
                SourceLocation("-o").problem(
                    "", f"{quoted(text)} is not NAME=VALUE", code="option.syntax"
                )
            )
            continue
        written, bad = read_yaml(value if equals else "true", _at(place))
        problems += bad
        written, before = written or Located(None, place), given.get(keys)
        if dot and before:
            listed = before.value if isinstance(before.value, list) else [before]
            written = Located([*listed, written], place)
        elif not dot and _is_list(model, keys[0]) and not isinstance(written.value, list):
            listed = before.value if before else []
            written = Located([*listed, written], place)
        elif before:
            problems.append(place.problem("", "given twice", code="option.given-twice"))
        given = replace(written, key=place).nest(keys).merge_over(given)
    if problems:
        raise JobError(problems)
    found: dict[str, Located] = given.value
    return found


def _at(place: SourceLocation) -> Locate:
    return lambda _mark: place


def _is_list(model: type[Model], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is not None and get_origin(field.annotation) is list


def checked_options(
    profile: LoadedProfile, flags: Mapping[str, Located], model: type[OptionsModel]
) -> tuple[OptionsModel, dict[str, str]]:
    """Return a launcher's options, from a profile and flags, with the location of each.

    For a section (for example `slurm:`), the locations of its entries are included:
    `slurm.nodelist`.

    Raises:
        JobError: every option that is unknown or wrong, with its location.
    """
    here = SourceLocation(f"--launcher {profile.name}")
    given = {name: part for name, part in profile.options.items() if part.value is not None}
    root = Located(dict(flags), here).merge_over(Located(given, here))
    options, problems = validate(root, model, model.listed(), area="option")
    if problems or options is None:
        problems = problems or _between_options(root, model)
        raise JobError(sort_problems(problems, shown_path(profile.chain[0])))
    # a mapping in a flag (for example `labels`) is merged over the profile's; the flag is its
    # source
    written = {name: flags.get(name, part) for name, part in root.value.items()}
    sources = {name: place_text(part.place) for name, part in written.items()}
    for name, part in root.value.items():
        if isinstance(part.value, dict):
            sources |= {f"{name}.{key}": place_text(one.place) for key, one in part.value.items()}
    return options, sources


def _between_options(root: Located, model: type[Model]) -> list[Problem]:
    """Return the problems between options that are each valid alone."""
    try:
        model.model_validate(root.plain())
    except ValidationError as error:
        conflicts = [detail["msg"].removeprefix("Value error, ") for detail in error.errors()]
        return [root.place.problem("", text, code="option.conflict") for text in conflicts]
    return []


def place_text(place: SourceLocation) -> str:
    """Return `launchers/slurm.yaml:9:14`, or a flag."""
    return str(place.problem("", "")).removesuffix(": ")


def search_path(job_dir: Path) -> list[Path]:
    """Return the directories that may contain profiles, nearest first, without duplicates."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    home = config if os.path.isabs(config) else os.path.expanduser("~/.config")
    folders: dict[str, Path] = {}
    for folder in (
        Path("launchers"),
        job_dir / "launchers",
        Path(home, "dtrain", "launchers"),
        asset_dir("launchers"),
    ):
        folders.setdefault(os.path.realpath(folder), folder.absolute())
    return list(folders.values())


def profile_names(folders: Sequence[Path]) -> list[str]:
    """Return the name of every profile in these directories, sorted."""
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _layers(
    name: str,
    asked_by: SourceLocation,
    where: Sequence[Path],
    folders: Sequence[Path],
    above: list[Path],
) -> Iterator[Layer]:
    """Yield a profile's file and then those that it extends. `where` is searched for the first."""
    path = next((folder / f"{name}.yaml" for folder in where if _is_profile(folder, name)), None)
    if path is None:
        raise JobError([_not_found(name, asked_by, where, folders)])
    if path in above:
        circle = " → ".join(map(shown_path, [*above[above.index(path) :], path]))
        raise JobError(
            [
                asked_by.problem(
                    "extends", f"profiles extend in a circle: {circle}", code="profile.circle"
                )
            ]
        )
    shown = shown_path(path)
    root, problems = read_root(
        read_text(path, shown), shown, ProfileSpec, f"profile {Path(shown).stem}"
    )
    yield path, root, problems
    extends = root.get(("extends",))
    if extends is None or extends.value is None:
        return
    if not isinstance(extends.value, str):
        message = f"expected the name of a profile; found {found(extends.plain())}"
        raise JobError([extends.place.problem("extends", message, code="profile.wrong-type")])
    further = folders[folders.index(path.parent) + 1 :] if extends.value == name else folders
    yield from _layers(extends.value, extends.place, further, folders, [*above, path])


def _is_profile(folder: Path, name: str) -> bool:
    return os.path.basename(name) == name and os.path.isfile(folder / f"{name}.yaml")


def _not_found(
    name: str, asked_by: SourceLocation, where: Sequence[Path], all_: Sequence[Path]
) -> Problem:
    near = did_you_mean(name, [known for known in profile_names(all_) if known != name])
    searched = ", ".join(map(shown_path, where)) or "nothing, as this file is the last of its name"
    field = "" if asked_by.line is None else "extends"
    return asked_by.problem(
        field, f"there is no profile {name!r}; searched: {searched}{near}", code="profile.not-found"
    )
