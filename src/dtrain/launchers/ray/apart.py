"""The driver's side of nodes that share no disk with it: what they are given, what they tell.

The driver has the run's directory, which goes to its URL from there; each node has one of its
own, made of a package, and tells what is new in it with every beat.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dtrain import checked
from dtrain.environ import MASK
from dtrain.plainjson import to_json
from dtrain.plan import LaunchPlan
from dtrain.run import files, token
from dtrain.run.failures import FailureRecord
from dtrain.run.rundir import RunDir


def variables(plan: LaunchPlan) -> dict[str, str]:
    """The job's variables, secret ones too, with which workers reach the place of runs."""
    secret = files.read_as(dict[str, str], plan.run.secret_env(plan.attempt)) or {}
    return {**{n: v for n, v in plan.worker_env.items() if v != MASK}, **secret}


def package(plan: LaunchPlan, attempt: int) -> bytes:
    """A tar file of all that a node needs to take part in an attempt.

    Files of the run's folder itself are in it: workers go on with metrics of earlier attempts.
    """
    run = plan.run
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        token.of_attempt(run, attempt)
        secret = (run.url_file, run.secret_env(attempt), run.token(attempt))
        hidden = [path for path in secret if path.exists()]
        here = [path for path in run.path.glob("[!.]*") if path.is_file()] + hidden
        for path in (*sorted(here), *sorted((run.path / "tensorboard").rglob("*"))):
            archive.add(path, str(path.relative_to(run.path)), recursive=False)
        code = run.code / f"tree-{plan.attempt}.tar"
        if code.exists():
            _add_code(archive, code)
    return buffer.getvalue()


def take_news(run: RunDir, news: list[dict[str, Any]]) -> None:
    """Put what a node has told into the driver's run directory."""
    for piece in news:
        path = run.path / piece["name"]
        if not path.resolve().is_relative_to(run.path.resolve()):
            continue
        files.make_parent(path)
        if piece.get("lines"):
            with path.open("ab") as file:
                file.write(piece["bytes"])
        elif "at" in piece:
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.seek(piece["at"])
                file.write(piece["bytes"])
        else:
            files.write_atomic(path, _relocated(piece["bytes"], path, run))


def _relocated(data: bytes, path: Path, run: RunDir) -> bytes:
    """A failure record with the path of its log here, not on the node."""
    if path.parent.name != "failures":
        return data
    try:
        record = checked.read(FailureRecord, data)
    except ValueError:
        return data  # and nobody will take it for one
    inside = record.log.partition(f"/{run.id}/")[2]
    log = str(run.path / inside) if inside else record.log
    return to_json(asdict(replace(record, log=log)), indent=2).encode()


def _add_code(archive: tarfile.TarFile, code: Path) -> None:
    with tarfile.open(code) as inner:
        for member in inner:
            content = inner.extractfile(member) if member.isfile() else None
            member.name = f"code/{member.name}"
            archive.addfile(member, content)
