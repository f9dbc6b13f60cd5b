"""The files that `dtrain init` writes: task.py, job.yaml and a profile."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain.assets import asset_dir
from dtrain.errors import UsageError
from dtrain.initializing.existing import Existing
from dtrain.initializing.proposal import Proposal
from dtrain.job.located import shown_path
from dtrain.job.yaml_reader import inline_yaml

JOB = "job.yaml"
TASK = "task.py"
_WIDEST = 36
"""The width up to which comments of neighbouring lines are aligned."""

_NEW_JOB: Mapping[str, Any] = {
    "task": f"{TASK}:Spirals",
    "args": {"lr": 0.01},
    "seed": 0,
    "strategy": "ddp",
    "train": {"epochs": 10, "global_batch_size": 100},
    "eval": {"every_epochs": 5},
    "checkpoint": {"every_epochs": 5},
}

_COMMENTS = {
    "name": "runs are named NAME-ID",
    "task": "FILE:CLASS",
    "args": "arguments of the class",
    "strategy": "or single, fsdp, exact",
    "script": "every process runs it, as torchrun would",
    "module": "every process runs it, as python -m would",
    "command": "every process starts it",
    "script_args": "its arguments; `dtrain launch job.yaml -- …` replaces them",
    "train.epochs": "or steps",
    "train.global_batch_size": "samples per step, of all processes together",
    "eval.every_epochs": "or every_steps",
    "checkpoint.every_epochs": "or every_steps, or every: 10m",
    "launch.nodes": "or MIN:MAX",
    "launch.procs_per_node": "the default is one per GPU, or one",
    "launch.gpus_per_node": "0 trains on the CPU",
    "launch.env": "variables of every process",
    "options.partition": "-p",
    "options.account": "-A",
    "options.time": "-t",
    "options.address": "--address",
    "options.rdzv_endpoint": "HOST:PORT of node 0",
}
_EXAMPLES = {"procs_per_node": 2, "partition": "NAME", "account": "NAME", "time": "4h"}
"""Values in lines that are comments, because the field has no value."""
_SECTIONS = {"train", "eval", "checkpoint", "log", "lightning", "launch", "options"}


def targets(folder: Path, launcher: str, existing: Existing | None) -> list[Path]:
    """Return the files that will be written."""
    task = [folder / TASK] if existing is None else []
    return [*task, folder / JOB, folder / "launchers" / f"{launcher}.yaml"]


def refuse_existing(files: list[Path]) -> None:
    """Refuse to overwrite files.

    Raises:
        UsageError: some of them exist; the message names them.
    """
    there = [shown_path(path) for path in files if path.exists() or path.is_symlink()]
    if there:
        verb = "exists" if len(there) == 1 else "exist"
        text = f"{', '.join(there)} {verb} already; give --force to overwrite, or another directory"
        raise UsageError(text, code="init.files-exist")


def write(folder: Path, name: str, proposal: Proposal, existing: Existing | None) -> list[Path]:
    """Write the files, and return their paths."""
    texts = [_job(name, proposal, existing), _profile(proposal)]
    if existing is None:
        task = asset_dir("examples") / "start" / TASK
        texts.insert(0, task.read_text(encoding="utf-8"))
    files = targets(folder, proposal.launcher, existing)
    for path, text in zip(files, texts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return files


def name_of(folder: Path, existing: Existing | None) -> str:
    """Return a name for the job: that of the script, or of the directory."""
    given = existing.name if existing and existing.name else folder.resolve().name
    return re.sub(r"[^\w.-]+", "-", given).strip("-.") or "training"


def _job(name: str, proposal: Proposal, existing: Existing | None) -> str:
    job: dict[str, Any] = {"name": name, **(_NEW_JOB if existing is None else existing.job)}
    if existing and existing.batch_per_process is not None:
        batch = existing.batch_per_process * proposal.processes
        job["train"] = {**job["train"], "global_batch_size": batch}
    what = "How the task is trained" if "task" in job else "What every process runs"
    head = [
        f"{what}. `dtrain schema` prints all fields.",
        f"Where it runs, and on how many processes, is in launchers/{proposal.launcher}.yaml.",
    ]
    return _text(head, job)


def _profile(proposal: Proposal) -> str:
    name = proposal.launcher
    launch: dict[str, Any] = {
        "nodes": int(proposal.nodes) if proposal.nodes.isdigit() else proposal.nodes,
        "procs_per_node": proposal.procs,
        "gpus_per_node": proposal.gpus,
        **{field: value for field, value in proposal.launch.items() if value},
    }
    options = dict(proposal.options)
    if name == "slurm":
        known = ("partition", "account", "time")
        options = {field: options.get(field) for field in known} | options
    profile = {"launcher": name, "extends": name, "description": proposal.about, "launch": launch}
    flag = "" if name == "local" else f" --launcher {name}"
    head = [
        f"Where `dtrain launch{flag}` starts processes. Flags override this file.",
        f"`dtrain launchers {name}` lists all options.",
    ]
    return _text(head, profile | ({"options": options} if options else {}))


def _text(head: list[str], data: Mapping[str, Any]) -> str:
    """Return a YAML file with comments."""
    plain = {name: value for name, value in data.items() if name not in _SECTIONS}
    lines = [*(f"# {line}" for line in head), *_entries(plain, "")]
    for name in data:
        if name in _SECTIONS and data[name]:
            is_empty = all(value is None for value in data[name].values())
            title = f"# {name}:" if is_empty else f"{name}:"
            lines += ["", title, *_entries(data[name], name)]
    return "\n".join([*lines, ""])


def _entries(data: Mapping[str, Any], section: str) -> Iterator[str]:
    indent = "  " if section else ""
    entries = {name: indent + _entry(name, value) for name, value in data.items()}
    comments = {name: _COMMENTS.get(f"{section}.{name}".lstrip(".")) for name in data}
    widths = [len(text) for name, text in entries.items() if comments[name]]
    width = max((each for each in widths if each <= _WIDEST), default=0)
    for name, text in entries.items():
        comment = comments[name]
        if comment and len(text) > _WIDEST:
            yield f"{indent}# {comment}"
            yield text
        else:
            yield f"{text.ljust(width)}  # {comment}" if comment else text


def _entry(name: str, value: Any) -> str:
    if value is None:
        return f"# {name}: {_EXAMPLES[name]}"
    return f"{inline_yaml(name)}: {inline_yaml(value)}"
