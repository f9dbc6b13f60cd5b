"""The lists of checks, and what runs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dtrain.doctor import gpus, host, network, versions
from dtrain.doctor.asked import Asked
from dtrain.doctor.diagnosis import OK, PROBLEM, WARNING, Diagnosis
from dtrain.errors import JobError
from dtrain.job.imports import refuse_missing
from dtrain.job.spec import JobSpec
from dtrain.words import counted

Check = Callable[[Asked], Diagnosis]

HOST_CHECKS: Mapping[str, Check] = {
    "versions": versions.versions,
    "cores": host.cores,
    "numa": host.numa,
    "gpus": gpus.gpus,
    "driver": gpus.driver,
    "shm": host.shm,
    "ulimits": host.ulimits,
    "disk": host.disk,
    "fsync": host.fsync,
    "names": network.names,
    "interface": network.interface,
}
"""The checks of each host, before a launch and in it."""

ALONE_CHECKS: Mapping[str, Check] = {
    "shared": host.shared,
    "ports": network.own_ports,
    "clock": host.clock,
}
"""Checks of a host that knows no other yet. In a launch, hosts are compared instead."""


def run_checks(checks: Mapping[str, Check], asked: Asked) -> Iterator[Diagnosis]:
    """Yield what the checks find. A check that fails itself is a warning, not an error."""
    for name, check in checks.items():
        try:
            yield check(asked)
        except Exception as error:
            yield Diagnosis(name, WARNING, f"not checked: {type(error).__name__}: {error}")


def data(spec: JobSpec, folder: Path) -> Diagnosis:
    """Return whether this host can read the files and directories that the job names.

    Args:
        spec: the job.
        folder: the directory to which `data.paths` are relative.
    """
    paths = [folder / path for path in spec.data.paths]
    missing = [str(path) for path in paths if not path.exists()]
    closed = [str(path) for path in paths if path.exists() and not os.access(path, os.R_OK)]
    empty = [str(path) for path in paths if path.is_dir() and not any(path.iterdir())]
    if missing:
        remedy = "copy or mount the data there, or correct data.paths"
        return Diagnosis("data", PROBLEM, f"missing: {', '.join(missing)}", remedy)
    if closed:
        remedy = f"chmod a+rX {closed[0]}"
        return Diagnosis("data", PROBLEM, f"not readable: {', '.join(closed)}", remedy)
    if empty:
        return Diagnosis("data", WARNING, f"empty: {', '.join(empty)}", f"ls -la {empty[0]}")
    return Diagnosis("data", OK, f"{counted(len(paths), 'path')} readable")


def imports(spec: JobSpec, folder: Path) -> Diagnosis:
    """Return whether the modules that the job's own files import exist here. None is imported."""
    try:
        refuse_missing(spec, folder)
    except JobError as error:
        return Diagnosis("task", PROBLEM, str(error), "install the package on this host")
    return Diagnosis("task", OK, "every module that its files import is installed")
