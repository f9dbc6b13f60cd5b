"""One checkpoint on disk: whole or not there, and every kind of damage is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.errors import CheckpointError
from dtrain.run import manifest as manifests
from dtrain.run.rundir import RunDir
from dtrain.train.checkpoint import files
from dtrain.train.checkpoint.content import read_checkpoint
from dtrain.train.checkpoint.files import remove_leftovers
from dtrain.train.checkpoint.state import load_model_state, model_state, parameters_sha256
from support.checkpoints import TENSORS as PART
from support.checkpoints import save, store, write_checkpoint
from support.errors import raises

TENSORS = {"model": {"w": torch.arange(1000.0)}, "extras": {"scheduler": None, "n": [1, 2.5]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step-00000008"
    write_checkpoint(path, TENSORS, {"step": 8}, {"world_size": 2})
    return path


def test_what_was_written_is_read(folder: Path) -> None:
    tensors, progress = read_checkpoint(folder)
    assert progress == {"step": 8}
    assert torch.equal(tensors["model"]["w"], TENSORS["model"]["w"])
    assert tensors["extras"] == TENSORS["extras"]
    assert sorted(os.listdir(folder.parent)) == [folder.name]  # nothing aside


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: _rewrite(folder / name, change)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "code", "name"),
    [
        (edit(PART, flip), "damaged-file", PART),
        (edit(PART, lambda d: d[:-1]), "damaged-file", PART),
        (edit(PART, lambda d: d + b"x"), "damaged-file", PART),
        (edit("progress.json", flip), "damaged-file", "progress.json"),
        (lambda f: (f / "state.json").unlink(), "missing-file", "state.json"),
        (lambda f: (f / "manifest.json").unlink(), "missing-manifest", "manifest.json"),
        (edit("manifest.json", lambda d: d[:50]), "damaged-manifest", "manifest.json"),
        (
            edit("manifest.json", lambda d: d.replace(b'"world_size": 2', b'"world_size": 3')),
            *("damaged-manifest", "manifest.json"),
        ),
        (edit("manifest.json", lambda d: b"[]"), "damaged-manifest", "manifest.json"),
    ],
    ids=[
        *("bit in a tensor", "short", "long", "position", "file gone", "no manifest"),
        *("half a manifest", "manifest edited", "other JSON"),
    ],
)
def test_damage(folder: Path, damage: Callable[[Path], Any], code: str, name: str) -> None:
    damage(folder)
    with raises(f"checkpoint.{code}", name, kind=CheckpointError):
        read_checkpoint(folder)


def test_every_single_byte_of_the_manifest_counts(folder: Path) -> None:
    path = folder / "manifest.json"
    good = path.read_bytes()
    for index in range(len(good)):
        path.write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
        try:
            tensors, progress = read_checkpoint(folder)
        except CheckpointError:
            continue
        # only what JSON does not read may change unseen: the blanks between values
        assert good[index : index + 1].isspace()
        assert progress == {"step": 8}
        assert torch.equal(tensors["model"]["w"], TENSORS["model"]["w"])


def test_objects_that_would_have_to_be_unpickled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    write_checkpoint(path, {"model": Path("x")}, {}, {})
    with raises("checkpoint.damaged-file", "state.json", "Weights only", kind=CheckpointError):
        read_checkpoint(path)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "FORMAT", 3)
    write_checkpoint(tmp_path / "step-00000001", {}, {}, {})
    monkeypatch.undo()
    with raises("checkpoint.other-format", "is 3", "reads format 2", kind=CheckpointError):
        read_checkpoint(tmp_path / "step-00000001")


def test_a_failed_write_leaves_the_old_one_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = store(RunDir(folder.parent.parent))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with raises("checkpoint.no-space", kind=CheckpointError):
        save(checkpoints, 8, torch.zeros(9))
    monkeypatch.undo()
    assert sorted(os.listdir(folder.parent)) == [folder.name]
    assert read_checkpoint(folder)[1] == {"step": 8}


def test_writing_again_replaces(folder: Path) -> None:
    write_checkpoint(folder, TENSORS, {"step": 9}, {})
    assert read_checkpoint(folder)[1] == {"step": 9}
    assert sorted(os.listdir(folder.parent)) == [folder.name]


def test_leftovers_are_removed(folder: Path) -> None:
    for name in (".step-00000009.aside-12ab", ".best.aside-12ab", f".{folder.name}.aside-12-old"):
        (folder.parent / name).mkdir()
    remove_leftovers(folder.parent)
    assert sorted(os.listdir(folder.parent)) == [folder.name]


def test_what_was_only_taken_away_comes_back(folder: Path) -> None:
    folder.rename(folder.with_name(f".{folder.name}.aside-12ab-old"))
    remove_leftovers(folder.parent)
    assert sorted(os.listdir(folder.parent)) == [folder.name]
    assert read_checkpoint(folder)[1] == {"step": 8}


FORGED: list[Any] = [
    {"files": None}, {"files": []}, {"files": {PART: 5}}, {"files": {PART: {}}},
    {"files": {"../../x.pt": {"bytes": 0, "blocks": []}}}, {"format": "1.5"}, {"format": 7},
    {"files": {}}, {"files": {PART: {"bytes": 10**400, "blocks": []}}},
]  # fmt: skip


@pytest.mark.parametrize("change", FORGED, ids=range(len(FORGED)))
def test_a_forged_manifest_whose_digest_fits(folder: Path, change: dict[str, Any]) -> None:
    manifest = {**json.loads((folder / "manifest.json").read_text()), **change}
    manifest["digest"] = manifests.digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


def test_a_pipe_is_not_waited_for_and_a_planted_file_is_not_read(folder: Path) -> None:
    (folder / "planted.safetensors").write_bytes(b"x")
    assert set(read_checkpoint(folder)[0]) == {"model", "extras"}
    (folder / PART).unlink()
    os.mkfifo(folder / PART)
    with raises("checkpoint.damaged-file", PART, kind=CheckpointError):
        read_checkpoint(folder)


def test_the_manifest_is_for_people_too(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["about"] == {"world_size": 2}
    assert set(manifest["files"]) == {PART, "state.json", "progress.json"}
    assert manifest["files"][PART]["bytes"] == (folder / PART).stat().st_size


def test_the_digest_of_parameters_sees_names_types_shapes_and_bytes() -> None:
    def digest(**parameters: torch.Tensor) -> str:
        model = nn.Module()
        for name, value in parameters.items():
            model.register_parameter(name, nn.Parameter(value))
        return parameters_sha256(model)

    one = digest(a=torch.zeros(2, 3), b=torch.ones(2))
    assert one == digest(b=torch.ones(2), a=torch.zeros(2, 3))  # in the order of names
    others = [
        digest(a=torch.zeros(3, 2), b=torch.ones(2)),
        digest(a=torch.zeros(2, 3), c=torch.ones(2)),
        digest(a=torch.zeros(2, 3).double(), b=torch.ones(2)),
        digest(a=-torch.zeros(2, 3), b=torch.ones(2)),
    ]
    assert len({one, *others}) == 5


def test_a_model_state_that_does_not_fit_changes_nothing() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 3)
    before = model.weight.clone()
    with raises("checkpoint.other-model", "weight is (3, 2)", "(2, 2)", kind=CheckpointError):
        load_model_state(model, model_state(other))
    assert torch.equal(model.weight, before)
