"""`verify` names Keras's BatchNormalization as it names torch's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.verification.judge import Judge
from dtrain.verification.layouts import Layout
from dtrain.verification.rules import BATCH_NORM
from support.warm_runner import WarmRunner, of_one

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")  # here, so that ranks are forked with it

BUILD = """
import keras
import numpy as np

def build():
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model, {"x": x, "y": x.sum(axis=1, keepdims=True)}
"""
JOB = """
name: keras
task: built.py:build
train: {global_batch_size: 10, steps: 4}
"""


def test_batch_normalization_is_named(tmp_path: Path) -> None:
    (tmp_path / "built.py").write_text(BUILD)
    (tmp_path / "job.yaml").write_text(JOB)
    runner = WarmRunner(tmp_path / "job.yaml", keep=tmp_path)
    finding = of_one(Judge(runner), Layout("ddp", procs=2)).finding
    assert finding is not None
    assert finding.rule == BATCH_NORM
    assert "batch_normalization) normalises over each process's own samples" in finding.likely_cause
    assert "LayerNormalization" in finding.likely_cause
    said = "".join(path.read_text() for path in tmp_path.rglob("events.jsonl"))
    assert '"event": "batch_norm"' in said, "a launch by itself says it too"
