"""Of all who want to drive a run, one does; and each says only how its own attempt ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.run import attempts, events
from dtrain.run.attempts import Handle, Held, Result
from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import RunDir

HERE = Handle.of_this_process("local", 0)
ELSEWHERE = replace(HERE, host="other", identity="another-boot/pid:[1]/7/9")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "a-222222")
    made.create()
    return made


def winners(tries: int, claim: Callable[[int], None]) -> list[int]:
    with ThreadPoolExecutor(tries) as threads:
        all_of_them = [threads.submit(claim, number) for number in range(tries)]
    errors = [each.exception() for each in all_of_them]
    assert all(error is None or isinstance(error, Held) for error in errors)
    return [number for number, error in enumerate(errors) if error is None]


def test_of_many_who_claim_an_attempt_one_has_it(run: RunDir) -> None:
    for attempt in range(20):
        claims = [replace(HERE, attempt=attempt, first=attempt, pid=pid) for pid in range(8)]
        (winner,) = winners(8, lambda pid, claims=claims: claims[pid].claim(run))  # type: ignore[misc]
        holder = Handle.read(run)
        assert holder is not None
        assert (holder.attempt, holder.pid) == (attempt, winner)


def test_only_the_next_attempt_can_be_claimed(run: RunDir) -> None:
    HERE.claim(run)
    for attempt in (0, 2):
        with pytest.raises(Held) as held:
            replace(HERE, attempt=attempt).claim(run)
        assert held.value.exit_code == 2
        assert f"process {os.getpid()} on {HERE.host}" in str(held.value)
    assert not run.handle(2).exists()


def test_one_command_starts_a_node_and_another_when_it_has_ended(run: RunDir) -> None:
    HERE.claim(run)
    (_,) = winners(8, lambda _: HERE.claim_node(run, 1))
    HERE.claim_node(run, 2)
    gone = replace(HERE, identity=f"{HERE.identity}0")
    gone.claim_node(run, 3)
    (_,) = winners(8, lambda _: HERE.claim_node(run, 3))


def test_a_job_goes_on_until_the_run_is_anothers(run: RunDir) -> None:
    HERE.claim(run)
    attempts.claim_for_job(run, 0, "7")
    attempts.claim_for_job(run, 3, "7")  # it was requeued three times, and ran in the last only
    assert [Handle.read(run, n) is not None for n in range(5)] == [True] * 4 + [False]
    assert attempts.newest_of(run, 0) == 3
    with pytest.raises(Held):
        attempts.claim_for_job(run, 3, "8")
    replace(HERE, attempt=4, first=4, job_id="8").claim(run)
    for attempt in (4, 5):
        with pytest.raises(Held) as held:
            attempts.claim_for_job(run, attempt, "7")
        assert "job 8" in str(held.value)
    attempts.claim_for_job(run, 5, "8")
    assert (attempts.newest_of(run, 0), attempts.newest_of(run, 4)) == (3, 5)


def test_a_job_whose_submission_was_not_written_down_is_known_once_it_runs(run: RunDir) -> None:
    HERE.claim(run)
    attempts.claim_for_job(run, 0, "7")
    holder = Handle.read(run)
    assert holder is not None
    assert holder.job_id == "7"
    with pytest.raises(Held):
        attempts.claim_for_job(run, 0, "8")


def test_a_driver_that_cannot_be_seen_lives_as_long_as_it_is_heard_of(run: RunDir) -> None:
    assert HERE.is_visible
    assert HERE.is_alive(run)
    assert not ELSEWHERE.is_visible
    assert ELSEWHERE.is_alive(run)  # nothing is known of it
    ELSEWHERE.claim(run)
    assert ELSEWHERE.is_alive(run)
    long_ago = time.time() - attempts.SILENT_S - 10
    os.utime(run.handle(0), (long_ago, long_ago))
    assert not ELSEWHERE.is_alive(run)
    events.note_event(run, "saved")  # its workers go on while it is stopped
    assert ELSEWHERE.is_alive(run)


def test_a_driver_is_heard_of_while_it_drives(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "HEARTBEAT_S", 0.01)
    HERE.claim(run)
    os.utime(run.handle(0), (1, 1))
    with attempts.sending_heartbeats(run, 0):
        deadline = time.monotonic() + 10
        while run.handle(0).stat().st_mtime == 1:
            assert time.monotonic() < deadline, "waited 10 s in vain for a beat"
            time.sleep(0.01)


def test_who_saw_the_end_says_how_it_ended(run: RunDir) -> None:
    ends = [Result(state, 0, 1.0, 2.0) for state in ("lost", "failed", "succeeded", "lost")]
    assert [end.write(run, 0) for end in ends] == [True, True, False, False]
    found = Result.read(run, 0)
    assert found is not None
    assert found.state == "failed"


def test_an_attempt_that_has_ended_takes_its_own_secrets_away(run: RunDir) -> None:
    run.secret_env(0).touch()
    assert run.secret_env(2) == run.secret_env(0)  # a job has made two attempts by itself
    run.remove_secrets(2)
    run.secret_env(3).touch()
    run.remove_secrets(2)  # by whoever settles the one before, later
    assert run.secret_env(3).exists()
    run.remove_secrets(3)
    assert not list(run.path.glob(".env*"))


def test_of_two_hosts_one_claims_an_attempt_of_a_run_at_a_url(tmp_path: Path) -> None:
    place = RemoteStore(f"file://{tmp_path}/there")
    name = "attempts/0/handle.json"
    texts = [str(number).encode() for number in range(8)]

    def claim(number: int) -> None:
        try:
            place.create_exclusive(name, texts[number])
        except FileExistsError as error:
            raise Held(RunDir(tmp_path), None) from error

    (winner,) = winners(8, claim)
    assert place.read(name) == texts[winner]
    place.create_exclusive(name, texts[winner])  # the answer was lost, it is asked again
    assert sorted(place.files()) == [name]
