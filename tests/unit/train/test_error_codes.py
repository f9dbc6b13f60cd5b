"""The code of an error reaches other processes with it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from dtrain.errors import BlamedError, CheckpointError, DtrainError
from dtrain.run.rundir import RunDir
from dtrain.train.checks.finite import NonFiniteError
from dtrain.train.checks.replicas import ReplicaError
from dtrain.train.data.loader_process import LoaderProcessError
from dtrain.train.faults import NeverMadeError
from support.checkpoints import save, store
from support.errors import raises

ERRORS = [
    (BlamedError("m", [1], 0, code="data.streams-differ"), "data.streams-differ"),
    (ReplicaError("m", [1], 0), "check.replicas-differ"),
    (ReplicaError("m", [], 1, code="check.model-differs"), "check.model-differs"),
    (NeverMadeError("m", [0], 0), "inject.never-made"),
    (NonFiniteError("m", own=True), "check.not-finite"),
    (NonFiniteError("m", own=False, code="check.state-not-finite"), "check.state-not-finite"),
    (LoaderProcessError("m"), "data.loader-process-ended"),
    (CheckpointError("m", code="checkpoint.none-loads"), "checkpoint.none-loads"),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[code for _, code in ERRORS])
def test_it_survives_pickling(error: DtrainError, code: str) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.code == code
    assert vars(copy) == vars(error)
    assert str(copy) == "m"


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no directory")
    with raises("checkpoint.cannot-write", kind=CheckpointError):
        save(store(RunDir(tmp_path)), 1, torch.zeros(1))
