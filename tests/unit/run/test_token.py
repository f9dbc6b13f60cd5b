"""Each attempt has a secret of its own, the same for all who share the run directory."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtrain.run import attempts
from dtrain.run.rundir import RunDir


def test_all_hosts_of_an_attempt_have_one_and_the_next_has_another(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        tokens = set(pool.map(lambda _: attempts.token(run, 0), range(64)))
    assert len(tokens) == 1
    assert len(tokens.pop()) == attempts.TOKEN_BYTES
    assert attempts.token(run, 1) != attempts.token(run, 0)
    assert stat.S_IMODE(run.token(0).stat().st_mode) == 0o600
    assert [path.name for path in run.attempt(0).iterdir()] == [run.token(0).name]


@pytest.mark.parametrize("text", ["", "ab", "é" * 64, "zz" * 32])
def test_a_damaged_one_is_no_secret(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    attempts.token(run, 0)
    run.token(0).write_text(text, encoding="utf-8")
    with pytest.raises(OSError, match="damaged") as info:
        attempts.token(run, 0)
    assert info.value.filename == str(run.token(0))
