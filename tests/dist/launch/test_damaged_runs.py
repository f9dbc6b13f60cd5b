"""Whatever stands in a run's directory, each command says one clear thing about it, and ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.main import main
from dtrain.run.rundir import RunDir
from support.launch import OFTEN, TINY, dtrain, the_run

SEED, TRIALS = 20261128, 1500
COMMANDS = (
    ("runs",), ("runs", "--json"), ("status", "{}"), ("status", "--json", "{}"), ("logs", "{}"),
    ("logs", "--json", "{}"), ("why", "{}"), ("why", "--json", "{}"), ("cancel", "{}"),
    ("resume", "--dry-run", "{}"), ("compare", "two", "{}"), ("compare", "--json", "{}", "two"),
    ("runs", "--where", "train.loss<3", "--columns", "run,state,why,set,metric,args.at,step"),
    ("runs", "--sort", "-train.loss", "--since", "1d"), ("clean", "--dry-run", "--failed"),
)  # fmt: skip
ABSURD = (
    None, True, -1, 10**30, 1e308, float("nan"), "", "x" * 100_000, "\x1b[2J\n", [], {}, [[]] * 999,
    "../../x",
)  # fmt: skip


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of two ranks that has saved, failed, and has a neighbour."""
    folder = tmp_path_factory.mktemp("damaged")
    fails = ("--set", "args.misbehave=raise", "--set", "args.at=4", "--max-restarts", "1")
    done = dtrain("launch", "--run-id", "one", "--procs", "2", *fails, *OFTEN, TINY, cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    run = the_run(folder)
    shutil.copytree(run.path, run.path.with_name("two"))
    return run


def call(*arguments: str) -> tuple[int, str]:
    """A command in this process, bounded; its exit code and all that it printed."""
    printed = io.StringIO()
    out, err = sys.stdout, sys.stderr
    signal.alarm(20)
    try:
        sys.stdout = sys.stderr = printed
        main(list(arguments))
        code: Any = 0
    except SystemExit as error:
        code = error.code
    finally:
        signal.alarm(0)
        sys.stdout, sys.stderr = out, err
    return int(code or 0), printed.getvalue()


def values(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in some JSON."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from values(value[key])


def one_value(data: bytes, draw: random.Random) -> bytes:
    """JSON with one value absurd or missing; of lines, all of them."""
    lines = []
    for line in data.splitlines() if data.count(b"\n{") else [data]:
        try:
            parsed = json.loads(line)
        except ValueError:
            return data[::-1]
        container, key = draw.choice([*values(parsed)] or [(parsed, "x")])
        if isinstance(container, dict) and draw.random() < 0.3:
            container.pop(key, None)
        else:
            container[key] = draw.choice(ABSURD)
        lines.append(json.dumps(parsed).encode())
    return b"\n".join(lines) + b"\n"


TEXTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    lambda data, draw: b"",
    lambda data, draw: data[: len(data) // 2],
    lambda data, draw: bytes(len(data)),
    lambda data, draw: draw.choice([b"null", b"[]", b"5", b'"x"', b"{}", b"true", b"[{}]"]),
    lambda data, draw: b"[" * 100_000,
    lambda data, draw: b'{"a":' * 50_000,
    lambda data, draw: b"9" * 5_000,
    lambda data, draw: b"NaN",
    lambda data, draw: data.replace(b"e", b"\xe9"),
    lambda data, draw: b"\x00\x1b[31m\n" * 50,
    one_value,
    one_value,
    one_value,
    one_value,
)


def as_folder(path: Path) -> None:
    path.mkdir()


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.symlink_to(path)


@contextlib.contextmanager
def damaged(path: Path, draw: random.Random) -> Iterator[str]:
    """A file of a run while it holds something else; what."""
    data = path.read_bytes()
    path.unlink()
    kind = draw.choice([*range(len(TEXTS)), as_folder, as_pipe, as_loop, "missing"])
    try:
        if isinstance(kind, int):
            path.write_bytes(TEXTS[kind](data, draw))
        elif callable(kind):
            kind(path)
        yield str(kind)
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif kind != "missing":
            path.unlink()
        path.write_bytes(data)


def small_files(run: RunDir) -> list[Path]:
    """All that a command may read, but the model and the code."""
    found = [path for path in sorted(run.path.rglob("*")) if path.is_file()]
    return [path for path in found if "code" not in path.parts and "checkpoints" not in path.parts]


def test_no_file_of_a_run_breaks_a_command(
    failed: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(SEED)
    paths = small_files(failed)
    assert len(paths) > 12
    seen: dict[int, int] = {}
    for trial in range(TRIALS):
        path, words = draw.choice(paths), draw.choice(COMMANDS)
        command = [word.format(failed.id) for word in words]
        with damaged(path, draw) as kind:
            where = f"trial {trial}: {path.relative_to(failed.path)} as {kind}, {command}"
            try:
                code, printed = call(*command, "--runs", str(failed.path.parent))
            except BaseException as error:
                raise AssertionError(
                    f"{where} ends with {type(error).__name__}: {error}"
                ) from error
        seen[code] = seen.get(code, 0) + 1
        assert code in (0, 1, 2), where
        assert words[0] == "logs" or len(printed) < 30_000, (
            f"{where} prints {len(printed)} characters"
        )
        if words[0] == "runs":
            assert "two" in printed or "--where" in words, where
            assert code == 0, where
        elif words[0] == "clean":
            assert code == 0, where
        elif code and (words[0] != "compare" or "dtrain:" in printed):
            assert printed.count("\n") <= 20, where
            assert failed.id in printed, f"{where}: {printed[:300]}"
    assert set(seen) == {0, 1, 2}, seen


def test_a_damaged_run_is_a_row(failed: RunDir) -> None:
    folder = str(failed.path.parent)
    handle = failed.handle(0)
    data = handle.read_bytes()
    try:
        handle.write_bytes(data[:40])
        code, printed = call("runs", "--json", "--runs", folder)
        rows = {row["id"]: row for row in json.loads(printed)}
        assert (code, rows["one"]["state"], rows["two"]["state"]) == (0, "damaged", "failed")
        assert str(handle) in rows["one"]["reason"]
        code, printed = call("status", "one", "--runs", folder)
        assert (code, printed.count("\n")) == (1, 1)
        assert str(handle) in printed
    finally:
        handle.write_bytes(data)
