"""The config file of Hugging Face Accelerate: the number of processes that it asks for.

The file's other settings become variables of each worker there, by Accelerate itself.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dtrain.errors import JobError, Problem, quoted
from dtrain.job.located import Located, SourceLocation, shown_path
from dtrain.job.yaml_reader import in_file, read_text, read_yaml

FIELD = "accelerate_config"
_ORIGIN = "accelerate config"
_CODE = "job.accelerate-config"
_ON_GPUS = ("MULTI_GPU", "FSDP")
_KNOWN = ("NO", "MULTI_CPU", *_ON_GPUS)
"""The values of distributed_type that need nothing but a process group."""


def launch_section(root: Located, folder: Path) -> tuple[Located | None, list[Problem]]:
    """Return what the config file that a job names says about its `launch:` section.

    Args:
        root: the job as written.
        folder: the directory of job.yaml, to which the path is relative.

    Returns:
        The section's fields at their places in the config file, None without such a file; and the
        problems of the file.
    """
    written = root.get((FIELD,))
    if written is None or not isinstance(written.value, str):
        return None, []
    if importlib.util.find_spec("accelerate") is None:
        text = "needs accelerate: pip install accelerate"
        return None, [written.place.problem(FIELD, text, code="plan.missing-package")]
    path = folder / written.value
    shown = shown_path(path)
    try:
        config, problems = read_yaml(read_text(path, shown), in_file(shown, _ORIGIN))
    except JobError as error:
        return None, list(error.problems)
    if problems:
        return None, problems
    if config is None or not isinstance(config.value, dict):
        text = "this is not a config file of `accelerate config`: it has no settings"
        return None, [SourceLocation(shown).problem("", text, code=_CODE)]
    problems = _kind_problems(config)
    fields = {} if problems else _sizes(config, problems)
    return Located({"launch": Located(fields, config.place)}, config.place), problems


def _kind_problems(config: Located) -> list[Problem]:
    place = config.get(("compute_environment",))
    if place is not None and place.value != "LOCAL_MACHINE":
        text = f"{quoted(str(place.value))}: dtrain starts what LOCAL_MACHINE starts"
        return [place.place.problem("compute_environment", text, code=_CODE)]
    kind = config.get(("distributed_type",))
    if kind is None or kind.value not in _KNOWN:
        found = "missing" if kind is None else quoted(str(kind.value))
        text = f"{found}: dtrain starts {', '.join(_KNOWN)}"
        spot = config.place if kind is None else kind.place
        return [spot.problem("distributed_type", text, code=_CODE)]
    return []


def _sizes(config: Located, problems: list[Problem]) -> dict[str, Located]:
    processes, machines = (
        _count(config, name, problems) for name in ("num_processes", "num_machines")
    )
    if processes is None or problems:
        return {}
    nodes = 1 if machines is None else machines.value
    if processes.value % nodes:
        text = f"{processes.value} processes cannot be divided equally among {nodes} machines"
        problems.append(processes.place.problem("num_processes", text, code=_CODE))
        return {}
    per_node = Located(processes.value // nodes, processes.place)
    found = {"procs_per_node": per_node}
    if machines is not None:
        found["nodes"] = machines
    cpu = config.get(("use_cpu",))
    if _plain(config, "distributed_type") in _ON_GPUS and not (cpu and cpu.value):
        found["gpus_per_node"] = per_node
    return found


def _count(config: Located, name: str, problems: list[Problem]) -> Located | None:
    given = config.get((name,))
    if given is None or given.value is None:
        return None
    if not isinstance(given.value, int) or isinstance(given.value, bool) or given.value < 1:
        text = f"expected a whole number from 1; found {quoted(str(given.value))}"
        problems.append(given.place.problem(name, text, code=_CODE))
        return None
    return Located(given.value, given.place)


def _plain(config: Located, name: str) -> Any:
    found = config.get((name,))
    return None if found is None else found.plain()
