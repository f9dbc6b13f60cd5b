"""dtrain's checkpoints for a script with its own loop."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dtrain.errors import CheckpointError, UsageError
from dtrain.integrations.script.stopping import require_group
from dtrain.run.events import note_event
from dtrain.run.rundir import RUN_VARIABLE, RunDir
from dtrain.train import collectives
from dtrain.train.checkpoint.content import contribution
from dtrain.train.checkpoint.leaves import refuse_unreadable, restoring
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.state import (
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from dtrain.train.checkpoint.store import CheckpointStore, Loaded
from dtrain.train.checks.spoilt import Spoilt, and_more
from dtrain.train.checks.train_state import TrainState
from dtrain.train.seeding import RandomState

logger = logging.getLogger("dtrain.checkpoint")


class Checkpoint:
    """Saves and restores a training.

    A checkpoint is saved completely or not at all, and every byte is verified before it is used.
    All processes must call each method at the same moment.

    Args:
        model: the model; it may be wrapped in DistributedDataParallel.
        optimizer: the optimizer; its state is saved by parameter name.
        directory: where to save; None means the run directory.
        keep: how many of the newest checkpoints are kept.
        **others: anything with `state_dict()` and `load_state_dict()`: a scheduler, the sampler.

    Raises:
        UsageError: no directory is given outside of a dtrain run, or there is no process group yet.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        keep: int = 2,
        **others: Any,
    ) -> None:
        self._ranks = require_group("dtrain.checkpoint()")
        directory = directory or os.environ.get(RUN_VARIABLE)
        if directory is None:
            raise UsageError(
                "this is not a run of dtrain: pass a directory, checkpoint(directory=…)",
                code="script.no-directory",
            )
        while isinstance(model, DistributedDataParallel):
            model = model.module
        self._model = model
        self._optimizer = optimizer
        self._others = others
        self._run = RunDir(directory)
        self._run.checkpoints.mkdir(parents=True, exist_ok=True)
        self._store = CheckpointStore(self._run, self._ranks, Retention(keep))
        self._spoilt = Spoilt(TrainState(model, () if optimizer is None else (optimizer,)))

    def load(self) -> int:
        """Continue from the newest intact checkpoint; return its steps, or 0 if there is none.

        On the same number of processes, the random generators continue too.

        Raises:
            CheckpointError: no checkpoint can be used; the message gives the reason for each.
        """
        loaded = self._store.load_newest(self._apply)
        if loaded is None:
            return 0
        step = int(loaded.progress["step"])
        self._report("resumed", step, loaded.folder, rejected=loaded.rejected)
        return step

    def save(self, step: int) -> Path:
        """Write a checkpoint after `step` steps, and return its directory once it is on disk.

        Raises:
            CheckpointError: on all processes, if the checkpoint could not be written, or if a
                parameter, optimizer state or buffer has become NaN or infinite.
        """
        self._refuse_spoilt(step)
        started = time.monotonic()
        content = contribution(
            self._state(),
            {"extras": self._extras()},
            {"step": step, "script": True},
            self._ranks.rank,
            self._ranks.world_size,
        )
        about = {"time": time.time(), "torch": torch.__version__}
        saved = self._store.save(step, content, about)
        assert saved is not None
        seconds = round(time.monotonic() - started, 3)
        self._report("checkpoint_saved", step, saved.folder, bytes=saved.bytes, seconds=seconds)
        return saved.folder

    def _refuse_spoilt(self, step: int) -> None:
        everyone = collectives.gather_to_all(self._spoilt.found())
        found = next((each for each in everyone if each), None)
        if found is not None:
            raise CheckpointError(
                f"after step {step}, {found[0]} is not finite{and_more(found)}: no checkpoint is "
                "saved, and the earlier ones are intact",
                code="check.state-not-finite",
            )

    def _state(self) -> dict[str, Any]:
        optimizer = self._optimizer
        return {
            "model": model_state(self._model, keep_vars=True),
            "optimizer": None if optimizer is None else optimizer_state(self._model, optimizer),
        }

    def _extras(self) -> dict[str, Any]:
        others = {name: each.state_dict() for name, each in self._others.items()}
        refuse_unreadable(others, "state_dict() of dtrain.checkpoint's")
        random = collectives.gather_to_zero(RandomState.capture().to_saved())
        return {"random": random, "others": others}

    def _apply(self, loaded: Loaded) -> None:
        try:
            others, random = (loaded.tensors["extras"][name] for name in ("others", "random"))
            missing = [name for name in self._others if name not in others]
            if missing:
                raise CheckpointError(
                    f"it holds no {', '.join(missing)}", code="checkpoint.state-missing"
                )
            load_model_state(self._model, loaded.tensors["model"])
            if self._optimizer is not None:
                load_optimizer_state(self._model, self._optimizer, loaded.tensors["optimizer"])
            for name, each in self._others.items():
                with restoring(name):
                    each.load_state_dict(others[name])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"it does not fit this training: {error!r}", code="checkpoint.state-refused"
            ) from error
        if len(random) == self._ranks.world_size:
            RandomState.from_saved(random[self._ranks.rank]).restore()

    def _report(self, event: str, step: int, folder: Path, **facts: Any) -> None:
        if self._ranks.is_rank_zero:
            logger.info("%s %s, after %d steps", event, folder.name, step)
            note_event(self._run, event, step=step, checkpoint=folder.name, **facts)
