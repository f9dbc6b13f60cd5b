"""JSON without NaN and infinity, as every reader takes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import Loss
from dtrain.cli import status
from dtrain.launchers import summary
from dtrain.plainjson import numbers, to_json
from dtrain.run.progress import Progress
from dtrain.run.rundir import RunDir
from support.trainings import Regression, job, train


def strict(text: str) -> Any:
    """As a reader that knows JSON alone."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_null_stands_for_what_is_no_number() -> None:
    inf = float("inf")
    given = {"a": [1.5, float("nan"), (inf,)], 1: {"b": -inf}, "n": None, "t": "NaN", "x": True}
    expected = {"a": [1.5, None, [None]], "1": {"b": None}, "n": None, "t": "NaN", "x": True}
    assert strict(to_json(given)) == strict(to_json(given, indent=2)) == expected
    assert math.isnan(numbers({"a": None})["a"])


class Undefined(Regression):
    """Its metrics are no numbers, and its loss is none in the last steps."""

    def loss(self, model: nn.Module, batch: Any) -> Loss | torch.Tensor:
        value = super().loss(model, batch)
        return value * (math.nan if len(self.seen) > 8 else 1.0)  # type: ignore[operator]

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"nothing": math.nan, "much": -math.inf, "one": 1.0}


@pytest.fixture(autouse=True)
def _caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it for good


def test_all_files_of_a_training(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "eval": {"every_steps": 4},
        "checkpoint": {"every_steps": 4},
        "checks": {"on_nan": "warn"},
    }
    spec = job("single", {"held_out": 5}, **sections)
    train(spec, tmp_path, kind=Undefined)
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("events.jsonl", "metrics.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            strict(line)
    for path in tmp_path.glob("checkpoints/*/*.json"):
        strict(path.read_text())
    assert lines[-1]["nothing"] is lines[-1]["much"] is None
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_json(tmp_path / "metrics.jsonl", lines=True)
    assert frame["loss"].dtype == float
    assert math.isnan(frame[frame.step == 10].iloc[0]["loss"])
    metrics = summary._metrics(Progress.read(RunDir(tmp_path)), "eval")
    assert "nothing nan  much nan  one 1" in status._text("eval", metrics, {})
    again = train(job("single", {"held_out": 5}, train={"steps": 8}, **sections), tmp_path)
    assert again.result is not None
    metrics = again.result.metrics
    assert (str(metrics["nothing"]), metrics["much"], metrics["one"]) == ("nan", -math.inf, 1.0)
