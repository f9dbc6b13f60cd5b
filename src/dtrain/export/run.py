"""Exports a run to a file: checkpoint, model, a real batch, the format, the comparison."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.errors import CheckpointError, UsageError
from dtrain.export import formats
from dtrain.export.model import Trained, trained_model
from dtrain.job.load import read_job
from dtrain.launch_plan import LaunchPlan
from dtrain.run.events import accepted_job
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.loop.task_state import FINAL


@dataclass(frozen=True)
class Exported:
    """The written file, and its comparison with the model."""

    path: Path
    checkpoint: str
    """The name of the checkpoint."""
    proof: str
    """The result of the comparison, in words."""
    rejected: dict[str, str]
    """Newer checkpoints that could not be used: name → reason."""

    def lines(self) -> list[str]:
        passed_over = [f"{name} is not used: {why}" for name, why in self.rejected.items()]
        size = self.path.stat().st_size / 1e6
        wrote = f"wrote {self.path} from {self.checkpoint}, {size:.1f} MB"
        return [*passed_over, wrote, f"checked: {self.proof}"]


def export(
    run: RunDir,
    to: str,
    step: int | None = None,
    output: Path | None = None,
    *,
    averaged: bool = False,
) -> Exported:
    """Write a run's model in a format, after a check that it is the same model.

    Args:
        run: its directory, which is only read.
        to: a name of `catalog.EXPORTS`.
        step: the checkpoint of that step. None means the newest intact one.
        output: the file. None means `<run>-<step>` with the format's suffix, in this directory.
        averaged: take the weights that `dtrain.EMA` has averaged.

    Raises:
        CheckpointError: the run has no checkpoint, or none that can be used.
        UsageError: the format or a package for it is missing, or the model does not allow it.
        DtrainError: the exported model differs from the trained one.
    """
    fact = catalog.EXPORTS.get(to)
    if fact is None:
        raise UsageError(
            f"no format {to!r}; known: {', '.join(catalog.EXPORTS)}", code="export.unknown-format"
        )
    problem = fact.needs.problem(f"--to {to}")
    if problem is not None:
        raise UsageError(problem, code="plan.missing-package")
    folder, tensors, rejected = _newest(run, step)
    number = int(folder.name.removeprefix("step-"))
    target = output or Path(f"{run.id}-{number}{fact.suffix}")
    if not target.parent.is_dir():
        raise UsageError(
            f"--output: there is no directory {target.parent}", code="export.no-directory"
        )
    about = {"run": run.id, "step": str(number)}
    state = _averaged(tensors) if averaged else _final(tensors)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
        written = Path(aside) / target.name
        if to == "safetensors":
            proof = formats.safetensors(state, written, about)
        else:
            proof = formats.of_model(to)(_model(run, state), written)
        for path in Path(aside).iterdir():  # ONNX keeps large weights in a second file
            shutil.move(path, target.parent / path.name)
    return Exported(target, folder.name, proof, rejected)


def _final(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the weights as training would leave them if it ended with this checkpoint.

    Keras may then replace them by averages or by the best ones.
    """
    final = tensors.get("kept", {"states": {}})["states"].get(FINAL, {"weights": {}})
    return {**tensors["model"], **final["weights"]}


def _averaged(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the first average of the whole model."""
    for owner, state in tensors.get("kept", {"states": {}})["states"].items():
        if owner.startswith("EMA.") and state["weights"].keys() == tensors["model"].keys():
            weights: dict[str, Any] = state["weights"]
            return weights
    raise UsageError(
        "--averaged: the checkpoint holds no averaged model; only a task with dtrain.EMA has one",
        code="export.no-average",
    )


def _model(run: RunDir, state: dict[str, Any]) -> Trained:
    plan = LaunchPlan.read(run)
    spec = read_job(accepted_job(run))
    if not spec.task:
        raise UsageError(
            "this run is of a script, and only that can build its model; use --to safetensors",
            code="export.script-format",
        )
    return trained_model(spec, plan.code_dir or plan.job_dir, state)


def _newest(run: RunDir, step: int | None) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Return (directory, tensors, rejected) of a step's checkpoint, or of the newest intact one."""
    remote = RemoteCheckpoints.of(run)
    here = run.checkpoints.glob("step-????????*") if remote is None else remote.folders()
    found = sorted(here, reverse=True)
    folders = [folder for folder in found if folder.name.removeprefix("step-").isdecimal()]
    if not folders:
        raise UsageError(
            f"run {run.id} has no checkpoint; checkpoints are saved as `checkpoint` in job.yaml "
            "sets, and at the end of training",
            code="export.no-checkpoint",
        )
    if step is not None:
        steps = [int(folder.name.removeprefix("step-")) for folder in folders]
        if step not in steps:
            listed = ", ".join(map(str, sorted(steps)))
            raise UsageError(
                f"--step {step}: run {run.id} has checkpoints of steps {listed}",
                code="export.no-such-step",
            )
        folders = [folders[steps.index(step)]]
    rejected: dict[str, str] = {}
    for folder in folders:
        try:
            if remote is not None:
                remote.fetch(folder)
            tensors, _ = read_checkpoint(folder)
        except CheckpointError as error:
            rejected[folder.name] = str(error)
            continue
        return folder, tensors, rejected
    listed = "".join(f"\n  {name}: {why}" for name, why in rejected.items())
    raise CheckpointError(
        f"no checkpoint can be used:{listed}\nthey are in {run.checkpoints}",
        code="export.no-usable-checkpoint",
    )
