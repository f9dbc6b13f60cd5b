"""Which arguments of Lightning's Trainer are the job's own to decide."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.catalog import LIGHTNING

_LAUNCH = "use --nodes, --procs and --gpus"
_CHECKPOINT = "use the checkpoint: section; a ModelCheckpoint of your own is kept too"
OURS = {
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


def trainer_arguments() -> list[str]:
    """The arguments of Lightning's Trainer, read from its file; none where that cannot be done."""
    spec = importlib.util.find_spec(LIGHTNING[0])
    if spec is None or spec.origin is None:
        return []
    file = Path(spec.origin).parent / "trainer" / "trainer.py"
    for node in ast.walk(ast.parse(file.read_bytes())) if os.path.isfile(file) else ():
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [each.arg for each in (*node.args.args[1:], *node.args.kwonlyargs)]
    return []


def lightning_problems(job: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """What is wrong with a job's `lightning:` section: pairs of a field and a sentence."""
    section = job.get("lightning")
    if not isinstance(section, Mapping):
        return []
    if any(section.values()) and job.get("trainer", "native") != "lightning":
        return [(("lightning",), "is for trainer lightning; set that, or leave this out")]
    given = section.get("trainer")
    return [
        (("lightning", "trainer", name), f"is decided by the job: {OURS[name]}")
        for name in (given if isinstance(given, Mapping) else ())
        if name in OURS
    ]
