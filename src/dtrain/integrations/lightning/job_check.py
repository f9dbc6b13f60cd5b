"""What of Lightning a job can be refused for without an import of it."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.errors import Problem
from dtrain.job.frameworks import JobCheck, NamedClass
from dtrain.job.located import Located, did_you_mean, dotted, shown_path
from dtrain.job.static_source import Source, is_installed

_LAUNCH = "use --nodes, --procs and --gpus"
_CHECKPOINT = "use the checkpoint: section; a ModelCheckpoint of your own is kept too"
_OURS = {
    "accelerator": _LAUNCH,
    "devices": _LAUNCH,
    "num_nodes": _LAUNCH,
    "strategy": "use strategy:",
    "plugins": "use strategy: and train.precision",
    "precision": "use train.precision",
    "max_epochs": "use train.epochs",
    "max_steps": "use train.steps",
    "accumulate_grad_batches": "use train.micro_batch_size",
    "gradient_clip_val": "use train.clip_grad_norm",
    "gradient_clip_algorithm": "use train.clip_grad_norm",
    "val_check_interval": "use eval.every_steps",
    "check_val_every_n_epoch": "use eval.every_epochs",
    "limit_val_batches": "all samples are evaluated, once",
    "limit_train_batches": "use train.steps",
    "num_sanity_val_steps": "there is none",
    "use_distributed_sampler": "samples are placed by dtrain",
    "enable_checkpointing": _CHECKPOINT,
    "callbacks": "return them from configure_callbacks() or callbacks()",
    "default_root_dir": "it is in the run's directory",
}
"""Arguments that are not the user's to give, and what to do instead."""


class LightningCheck(JobCheck):
    def between_fields(self, job: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
        section = job.get("lightning")
        if not isinstance(section, Mapping):
            return []
        if any(section.values()) and job.get("trainer", "native") != "lightning":
            return [(("lightning",), "is for trainer lightning; set that, or leave this out")]
        given = section.get("trainer")
        return [
            (("lightning", "trainer", name), f"is decided by the job: {_OURS[name]}")
            for name in (given if isinstance(given, Mapping) else ())
            if name in _OURS
        ]

    def references(self, root: Located) -> Iterator[Problem]:
        """Arguments that Lightning's Trainer does not have."""
        field = ("lightning", "trainer")
        written = root.get(field)
        given = written.value if written and isinstance(written.value, dict) else {}
        known = _trainer_arguments() if given else []
        for name in given:
            if known and name not in known and name not in _OURS:
                message = f"Lightning's Trainer has no such argument{did_you_mean(name, known)}"
                place = given[name].key or given[name].place
                yield place.problem(dotted((*field, name)), message)

    def of_class(
        self, named: NamedClass, name: str, file: Path, source: Source
    ) -> Iterator[Problem]:
        if source.derives(name, "LightningModule") and named.trainer == "native":
            strategies = ", ".join(catalog.TRAINERS["lightning"].strategies)
            near = f"trainer: lightning, which has {strategies}"
            yield named.problem(f"{name} is a LightningModule; it needs {near}")
        if named.trainer != "lightning":
            return
        yield from _package_problems(named, source, shown_path(file))
        if source.sets_on_self(name, "automatic_optimization", False):
            yield named.problem(
                f"{name} has automatic_optimization = False: it makes its own steps, and here the "
                "step is dtrain's. Run it with a Trainer of its own, as script: train.py"
            )


def _trainer_arguments() -> list[str]:
    """The arguments of Lightning's Trainer, read from its file; none where that cannot be done."""
    spec = importlib.util.find_spec(catalog.LIGHTNING[0])
    if spec is None or spec.origin is None:
        return []
    file = Path(spec.origin).parent / "trainer" / "trainer.py"
    for node in ast.walk(ast.parse(file.read_bytes())) if os.path.isfile(file) else ():
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [each.arg for each in (*node.args.args[1:], *node.args.kwonlyargs)]
    return []


def _package_problems(named: NamedClass, source: Source, shown: str) -> Iterator[Problem]:
    """Lightning is one code in two packages, and only one of them may be here."""
    imported = {module.partition(".")[0] for module in source.modules} & {*catalog.LIGHTNING}
    if imported and not any(is_installed(package) for package in imported):
        package = min(imported)
        here = [other for other in catalog.LIGHTNING if is_installed(other)]
        hint = f", or import {here[0]} instead, which is the same code" if here else ""
        pip = package.replace("_", "-")
        yield named.problem(
            f"{shown} imports {package}, which is not installed: pip install {pip}{hint}"
        )
