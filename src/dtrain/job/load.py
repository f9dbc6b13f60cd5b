"""Combine job.yaml, a profile's defaults and flags into one checked `JobSpec`.

Each value keeps its source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import ValidationError

from dtrain.environ import may_contain_secret
from dtrain.errors import JobError, Problem
from dtrain.job import accelerate
from dtrain.job.errors import Area, explain, submodel
from dtrain.job.located import Keys, Located, SourceLocation, dotted, shown_path
from dtrain.job.model import Model
from dtrain.job.references import outside_problems
from dtrain.job.spec import JobSpec, cross_problems
from dtrain.job.yaml_reader import in_file, read_text, read_yaml
from dtrain.run import files
from dtrain.run.remote.store import is_url

AnyModel = TypeVar("AnyModel", bound=Model)


@dataclass(frozen=True)
class LoadedJob:
    """A job that has passed every check that can run before anything starts."""

    spec: JobSpec
    text: str
    """The text of job.yaml as given."""
    path: Path
    sources: dict[str, str]
    """The dotted name of each field, with the source of its value: `job.yaml:7`,
    `--set train.epochs=3`, `--nodes`, `profile slurm (launchers/slurm.yaml:4)`, `default`."""


def flag(spelling: str, value: Any) -> Located:
    """Return a value given by a flag, for `load_job(flags=...)`: `flag("--nodes", "2:4")`."""
    return Located.of(value, SourceLocation(spelling))


def load_job(
    path: str | Path,
    overrides: Sequence[str] = (),
    profile_launch: Mapping[str, Located] | None = None,
    flags: Mapping[str, Located] | None = None,
    job_dir: Path | None = None,
    text: str | None = None,
    root: Located | None = None,
) -> LoadedJob:
    """Read and check a job. The precedence is flag > --set > job.yaml > profile > default.

    The config file of Accelerate that a job names comes between job.yaml and the profile.

    Args:
        path: the job file.
        overrides: `FIELD=VALUE` texts of `--set`, values read as YAML.
        profile_launch: the profile's `launch:` section (`LoadedProfile.launch`).
        flags: the dotted name of each field → `flag(spelling, value)`.
        job_dir: the directory that `task`, `data.paths` and `checkpoint.init_from` are relative
            to. None means that of the job file.
        text: the text of the job, where there is no such file.
        root: the parsed text, with locations that the user knows. None means that it is read from
            the text.

    Raises:
        JobError: every problem of the file, the flags and what they name, sorted by location.
    """
    path = Path(path)
    shown = shown_path(path)
    text = read_text(path, shown) if text is None else text
    problems: list[Problem] = []
    if root is None:
        root, problems = read_root(text, shown, JobSpec)
    for override in overrides:
        written, bad = _override(override)
        problems += bad
        root = written.merge_over(root) if written else root
    for field, value in (flags or {}).items():
        root = value.nest(_keys_of(field)).merge_over(root)
    config, bad = accelerate.launch_section(root, job_dir or path.parent)
    problems += bad
    profile = Located(dict(profile_launch or {}), root.place).nest(("launch",))
    root = root.merge_over(config.merge_over(profile) if config else profile)
    root = numbers_as_text(root)
    spec, wrong = validate(root, JobSpec)
    problems += wrong
    problems += _between_fields(root)
    problems += outside_problems(root, job_dir or path.parent)
    if problems or spec is None:
        raise JobError(sort_problems(problems, shown))
    spec = _with_absolute_path(spec, job_dir or path.parent)
    values = spec.to_plain()
    sources = sources_of(spec, root)
    sources = {name: source for name, source in sources.items() if name.split(".")[0] in values}
    return LoadedJob(spec, text, path, sources)


def _with_absolute_path(spec: JobSpec, folder: Path) -> JobSpec:
    """Return the job with a path that workers find, wherever they are started."""
    given = spec.checkpoint.init_from
    if given is None or is_url(given):
        return spec
    checkpoint = spec.checkpoint.model_copy(update={"init_from": str(folder.absolute() / given)})
    return spec.model_copy(update={"checkpoint": checkpoint})


def read_job(path: Path) -> JobSpec:
    """Read a job from a run directory. The files that it names are not checked.

    Raises:
        JobError: the file is missing or has problems; every problem is reported.
        DamagedError: the file is not text.
    """
    shown = shown_path(path)
    root, problems = read_root(files.read_text(path) or "", shown, JobSpec)
    spec, wrong = validate(root, JobSpec)
    if problems or spec is None:
        raise JobError(sort_problems([*problems, *wrong, *_between_fields(root)], shown))
    return spec


def _between_fields(root: Located) -> list[Problem]:
    return [
        root.place_of(keys).problem(dotted(keys), message, code=code)
        for keys, message, code in cross_problems(root.plain())
    ]


def read_root(
    text: str, shown: str, model: type[Model], origin: str = ""
) -> tuple[Located, list[Problem]]:
    """Return the top section of a YAML file, and the problems of the YAML.

    Raises:
        JobError: there is no top section to validate.
    """
    root, problems = read_yaml(text, in_file(shown, origin))
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    if root is None and not problems:
        problems = [
            SourceLocation(shown).problem(
                "", f"empty; needed are: {', '.join(required)}", code="yaml.empty"
            )
        ]
    elif root is not None and not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else "one value"
        problems.append(
            root.place.problem(
                "", f"expected `name: value` lines; found {kind}", code="yaml.not-a-section"
            )
        )
    if root is None or not isinstance(root.value, dict):
        raise JobError(problems)
    return _open_empty_sections(root, model), problems


def validate(
    root: Located, model: type[AnyModel], listed: str = "", area: Area = "job"
) -> tuple[AnyModel | None, list[Problem]]:
    """Return the written values as a spec, or every problem of single fields.

    The arguments are those of `explain`.
    """
    try:
        return model.model_validate(root.plain()), []
    except ValidationError as error:
        return None, explain(error, root, model, listed, area)


def sort_problems(problems: Sequence[Problem], first: str) -> list[Problem]:
    """Return problems without duplicates, sorted by location; those in the file `first` come
    first."""
    return sorted(
        dict.fromkeys(problems),
        key=lambda p: (p.file != first, p.file, p.line or 0, p.column or 0, p.field),
    )


def sources_of(spec: Model, root: Located) -> dict[str, str]:
    """Map each dotted leaf field to the source of its value, `default` where nothing is written."""
    return dict(_sources(spec, root, ()))


def _sources(value: Any, written: Located | None, keys: Keys) -> Iterator[tuple[str, str]]:
    if isinstance(value, Model):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, dict) and value:
        parts = value
    else:
        yield dotted(keys), written.place.source if written else "default"
        return
    for name, part in parts.items():
        yield from _sources(part, written.get((name,)) if written else None, (*keys, name))


def _open_empty_sections(root: Located, model: type[Model]) -> Located:
    """Read an empty `eval:` (for example, one with all lines commented out) as an empty section."""
    inside = dict(root.value)
    for name, field in model.model_fields.items():
        part = inside.get(name)
        kind = get_origin(field.annotation) or field.annotation
        if part is None or not isinstance(kind, type):
            continue
        if part.value is None and issubclass(kind, Model | dict):
            part = replace(part, value={}, raw=None)
        if isinstance(part.value, dict) and (section := submodel(field)):
            part = _open_empty_sections(part, section)
        inside[name] = part
    return replace(root, value=inside)


def _override(text: str) -> tuple[Located | None, list[Problem]]:
    """Parse `train.epochs=3` into a value nested at its field."""
    field, equals, value = text.partition("=")
    keys = field_keys(field.strip())
    secret = field.startswith("launch.env.") or may_contain_secret(text)
    shown = field if secret else text
    place = SourceLocation(f"--set {shown}")
    if (
        not equals
        or not field.isprintable()
        or not all(keys[:2])
        or not (keys[-1] or keys[:2] == ("launch", "env"))
    ):
        return None, [
            place.problem(
                "", "expected FIELD=VALUE, for example train.epochs=3", code="usage.set-syntax"
            )
        ]
    written, problems = read_yaml(value, lambda _: place)
    if problems:
        return None, problems
    written = written or Located(None, place)
    return replace(written, key=place).nest(keys), []


def field_keys(field: str) -> tuple[str, ...]:
    """Split the name of a field as a user writes it. `virtual-shards` is `virtual_shards`."""
    keys = _keys_of(field)
    if keys[0] == "args" or keys[:2] == ("launch", "env"):  # those names are the user's own
        return keys
    return tuple(key.replace("-", "_") for key in keys)


def _keys_of(field: str) -> tuple[str, ...]:
    """Split `train.epochs` into keys. The name of an environment variable may contain dots."""
    return tuple(field.split(".", 2 if field.startswith("launch.env.") else -1))


def numbers_as_text(root: Located) -> Located:
    """Return the job with environment variables as text: `FLAG: 010` means the letters 010."""
    env = root.get(("launch", "env"))
    if env is None or not isinstance(env.value, dict):
        return root
    kept = {
        name: replace(part, value=part.raw)
        for name, part in env.value.items()
        if isinstance(part.value, int | float) and not isinstance(part.value, bool) and part.raw
    }
    return replace(env, value=kept).nest(("launch", "env")).merge_over(root) if kept else root
