"""The checks of a Lightning job that need no import of Lightning."""

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
from dtrain.job.located import FieldProblem, Located, did_you_mean, dotted, shown_path
from dtrain.job.static_source import Source, is_installed

_STRATEGIES = catalog.TRAINERS["lightning"].strategies
_LAUNCH = "use --nodes, --procs and --gpus"
_CHECKPOINT = "use the checkpoint: section; a ModelCheckpoint of your own is kept too"
DECIDED_BY_JOB = {
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
    "fast_dev_run": "use train.steps",
    "overfit_batches": "use args: for a smaller data set",
    "reload_dataloaders_every_n_epochs": "a data set is made once",
    "min_epochs": "use train.early_stopping",
    "min_steps": "use train.early_stopping",
    "max_time": "the launch has a time limit",
    "limit_test_batches": "there is no test",
    "limit_predict_batches": "there is no predict",
    "inference_mode": "evaluation is under no_grad",
    "detect_anomaly": "checks.on_nan names what is not finite",
    "sync_batchnorm": "convert the model's layers in __init__",
    "limit_train_batches": "use train.steps",
    "num_sanity_val_steps": "there is none",
    "use_distributed_sampler": "samples are placed by dtrain",
    "enable_checkpointing": _CHECKPOINT,
    "callbacks": "return them from configure_callbacks() or callbacks()",
    "default_root_dir": "it is in the run directory",
}
"""Arguments that dtrain's step cannot follow, each with its replacement."""

DECIDED_FOR_LOOPS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "plugins",
    "precision",
    "max_epochs",
    "max_steps",
    "enable_checkpointing",
    "callbacks",
    "default_root_dir",
)
"""Arguments that the job decides under Lightning's own loops too."""

LOOPS_ARGUMENTS = tuple(name for name in DECIDED_BY_JOB if name not in DECIDED_FOR_LOOPS)
"""Arguments that only Lightning's own loops follow."""


class LightningCheck(JobCheck):
    def between_fields(self, job: Mapping[str, Any]) -> list[FieldProblem]:
        section = job.get("lightning")
        if not isinstance(section, Mapping):
            return []
        is_set = any(each for each in section.values() if each != "auto")
        if is_set and job.get("trainer", "native") != "lightning":
            text = "is for trainer lightning; set that, or leave this out"
            return [(("lightning",), text, "job.field-without-effect")]
        strategy = job.get("strategy", "ddp")
        if section.get("step") == "lightning" and strategy in _STRATEGIES:
            problem = catalog.own_loops_problem(strategy)
            if problem is not None:
                return [(("lightning", "step"), problem, "plan.unsupported-combination")]
        train = job.get("train")
        if section.get("step") == "lightning" and isinstance(train, Mapping):
            found = catalog.own_loops_setting_problem(train)
            if found is not None:
                return [(("train", found[0]), found[1], "plan.unsupported-combination")]
        if section.get("step") == "dtrain" and section.get("also_run"):
            text = "is for Lightning's own loops, not step: dtrain"
            return [(("lightning", "also_run"), text, "job.field-without-effect")]
        given, code = section.get("trainer"), "job.field-decided-elsewhere"
        by_step = section.get("step") == "dtrain"
        refused = DECIDED_BY_JOB if by_step else DECIDED_FOR_LOOPS
        return [
            (
                ("lightning", "trainer", name),
                f"is decided by the job: {DECIDED_BY_JOB[name]}",
                code,
            )
            for name in (given if isinstance(given, Mapping) else ())
            if name in refused
        ]

    def references(self, root: Located) -> Iterator[Problem]:
        """Yield a problem for each argument that Lightning's Trainer does not have."""
        field = ("lightning", "trainer")
        written = root.get(field)
        given = written.value if written and isinstance(written.value, dict) else {}
        known = trainer_arguments() if given else []
        for name in given:
            if known and name not in known and name not in DECIDED_BY_JOB:
                message = f"Lightning's Trainer has no such argument{did_you_mean(name, known)}"
                location = given[name].key or given[name].place
                yield location.problem(
                    dotted((*field, name)), message, code="lightning.no-such-argument"
                )

    def of_class(
        self, named: NamedClass, name: str, file: Path, source: Source
    ) -> Iterator[Problem]:
        if source.derives(name, "LightningModule") and named.trainer == "native":
            strategies = ", ".join(catalog.TRAINERS["lightning"].strategies)
            yield named.problem(
                f"{name} is a LightningModule; it needs trainer: lightning, which has {strategies}",
                code="lightning.needs-trainer",
            )
        if named.trainer != "lightning":
            return
        yield from _package_problems(named, source, shown_path(file))
        step = named.root.get(("lightning", "step"))
        if step is None or step.value != "dtrain":
            return
        if source.sets_on_self(name, "automatic_optimization", False):
            yield named.problem(
                f"{name} has automatic_optimization = False: it makes its own steps, which "
                "lightning.step: dtrain cannot run; remove that field",
                code="lightning.needs-own-loops",
            )


def trainer_arguments() -> list[str]:
    """Return the arguments of Lightning's Trainer, read from its file; empty without that file."""
    spec = importlib.util.find_spec(catalog.LIGHTNING[0])
    if spec is None or spec.origin is None:
        return []
    file = Path(spec.origin).parent / "trainer" / "trainer.py"
    for node in ast.walk(ast.parse(file.read_bytes())) if os.path.isfile(file) else ():
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [each.arg for each in (*node.args.args[1:], *node.args.kwonlyargs)]
    return []


def _package_problems(named: NamedClass, source: Source, shown: str) -> Iterator[Problem]:
    """Yield a problem if the file imports a package of Lightning that is not installed.

    Lightning is the same code in two packages, and possibly only one of them is installed.
    """
    imported = {module.partition(".")[0] for module in source.modules} & {*catalog.LIGHTNING}
    if imported and not any(is_installed(package) for package in imported):
        package = min(imported)
        here = [other for other in catalog.LIGHTNING if is_installed(other)]
        hint = f", or import {here[0]} instead, which is the same code" if here else ""
        pip = package.replace("_", "-")
        yield named.problem(
            f"{shown} imports {package}, which is not installed: pip install {pip}{hint}",
            code="job.missing-import",
        )
