"""Pack files for a Ray cluster: a job's code and plan, or a node's run directory."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

from dtrain.environ import MASK
from dtrain.errors import LaunchError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.ray.options import RayOptions
from dtrain.run import attempts, code_archive, files, snapshot
from dtrain.run.backend_files import RayFiles
from dtrain.run.remote.runs import attach, staging
from dtrain.run.remote.store import is_url
from dtrain.run.rundir import RunDir

FOLDER = ".dtrain"


def pack(plan: LaunchPlan) -> Path:
    """Create the directory to upload, and return its path.

    Raises:
        PlanError: it is larger than the limit; the message names the largest files.
        OSError: it cannot be written.
    """
    run = plan.run
    snapshot.copy_tree(plan.job_dir, run, plan.attempt)
    link = run.job_code(plan.attempt)
    tree = run.code_tree(plan.attempt)
    options = RayOptions.of(plan.options)
    code_archive.check_size(tree, options.upload_limit, options.excludes)
    inside = tree / FOLDER
    inside.mkdir()
    for path in (
        run.resolved,
        run.plan,
        *([] if run.secret_env(plan.attempt).exists() else [run.job]),
    ):
        shutil.copy2(path, inside / path.name)
    (inside / "link.json").write_text(json.dumps(os.readlink(link)), encoding="utf-8")
    return tree


def unpack(folder: Path) -> tuple[LaunchPlan, bool]:
    """Return the plan of a job on the cluster, and whether it uses the original run directory.

    Args:
        folder: `FOLDER` in the working directory of the job.

    Raises:
        LaunchError: the cluster has no location for the run directory.
    """
    text = (folder / "plan.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    original = RunDir(raw["run_dir"])
    runs = raw["run_url"].rpartition("/")[0] or raw["options"]["cluster_runs"]
    if not runs and original.plan.exists() and original.plan.read_text(encoding="utf-8") == text:
        return LaunchPlan.read(original), True
    if not runs:
        raise LaunchError(
            f"the cluster does not see the run directory {original.path}; set option "
            "cluster_runs to a directory that all nodes of the cluster share, or to a URL",
            code="ray.directory-not-shared",
        )
    url = f"{runs.rstrip('/')}/{original.id}" if is_url(runs) else ""
    root = staging(runs)  # the submitting command's own may be on this same host
    run = RunDir((root.with_name(f"{root.name}.job") if url else Path(runs)) / original.id)
    run.create()
    if url:
        attach(run, url)
    RayFiles(run).clear()
    for path in (run.job, run.resolved, run.plan):
        shutil.copy2(folder / path.name, path)
    plan = _with_code(replace(LaunchPlan.read(run), run_url=url), folder)
    files.write_json(run.plan, plan.to_json())
    if url:
        options = RayOptions.of(plan.options)
        code_archive.pack(plan.run, plan.attempt, options.upload_limit, options.excludes)
    return plan, False


def _with_code(plan: LaunchPlan, folder: Path) -> LaunchPlan:
    """Return the plan with its code on the shared disk.

    Ray keeps its own copies on each node and deletes them.
    """
    tree = plan.run.code_tree(plan.attempt)
    shutil.rmtree(tree, ignore_errors=True)
    snapshot.make_private(tree.parent)
    shutil.copytree(folder.parent, tree, ignore=shutil.ignore_patterns(FOLDER))
    link = plan.run.job_code(plan.attempt)
    link.unlink(missing_ok=True)
    link.symlink_to(json.loads((folder / "link.json").read_text(encoding="utf-8")))
    return replace(plan, job_dir=str(link), code_dir=str(link))


# -- to nodes that share no disk with the driver -------------------------------------------------


def node_variables(plan: LaunchPlan) -> dict[str, str]:
    """Return the job's variables, including secrets, with which workers access the runs URL."""
    secret = files.read_as(dict[str, str], plan.run.secret_env(plan.attempt)) or {}
    return {**{n: v for n, v in plan.worker_env.items() if v != MASK}, **secret}


def for_node(plan: LaunchPlan, attempt: int) -> bytes:
    """Return a tar file of everything that a node needs to take part in an attempt.

    It includes files of the run's directory itself, because workers append to metrics of earlier
    attempts.
    """
    run = plan.run
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        attempts.token(run, attempt)
        secret = (run.url_file, run.secret_env(attempt), run.token(attempt))
        hidden = [path for path in secret if path.exists()]
        files_of_run = [path for path in run.path.glob("[!.]*") if path.is_file()] + hidden
        for path in (*sorted(files_of_run), *sorted((run.path / "tensorboard").rglob("*"))):
            archive.add(path, str(path.relative_to(run.path)), recursive=False)
        code = run.code_tar(plan.attempt)
        if code.exists():
            _add_code(archive, code)
    return buffer.getvalue()


def _add_code(archive: tarfile.TarFile, code: Path) -> None:
    with tarfile.open(code) as inner:
        for member in inner:
            content = inner.extractfile(member) if member.isfile() else None
            member.name = f"code/{member.name}"
            archive.addfile(member, content)
