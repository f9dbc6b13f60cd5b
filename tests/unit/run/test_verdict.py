"""The verdict: the right culprit, in at most 15 lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.run import failures, verdict
from dtrain.run.failures import FailureRecord, Frame
from dtrain.run.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "digits-abc234")
    made.create()
    return made


def record(rank: int | None, **fields: object) -> FailureRecord:
    base: dict[str, object] = {
        "kind": "exception",
        "message": "boom",
        "exit_code": 1,
        "node_rank": (rank or 0) // 2,
        "node": f"node-{(rank or 0) // 2}",
        "rank": rank,
        "time": 100.0,
        "type": "ValueError",
    }
    return FailureRecord(**{**base, **fields})  # type: ignore[arg-type]


COLLATERAL = (
    "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1728.",
    "[/src/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:15260: Connection reset by peer",
    "Timed out waiting 8000ms for recv operation to complete",
    "NCCL error: remote process exited or there was a network error",
    "recvValueWithTimeout failed on SocketImpl",
)


@pytest.mark.parametrize("message", COLLATERAL)
def test_a_victim_that_died_first_is_not_the_culprit(run: RunDir, message: str) -> None:
    record(0, message=message, type="RuntimeError", time=99.0).write(run, 0)
    record(3, time=100.0).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert found.culprit.rank == 3
    assert found.collateral == [0]


TIMEOUT = "Application timeout caused pair closure"


def test_who_did_not_come_is_the_culprit_not_who_waited(run: RunDir) -> None:
    frame = Frame("/home/me/task.py", 7, "loss", "lock.acquire()")
    message = "did not reach the collective that the others waited for (10 s)"
    record(0, message=TIMEOUT, time=1.0).write(run, 0)
    record(1, kind="absent", type="", message=message, frames=[frame], time=2.0).write(run, 0)
    record(2, message=COLLATERAL[0], time=1.0).write(run, 0)
    record(3, kind="absent", type="", message=message, collateral=True).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert (found.culprit.rank, found.collateral) == (1, [0, 2, 3])
    text = verdict.render(found, run)
    assert text.startswith(f"FAILED: rank 1 on node 0 (node-0) {message}")
    assert "/home/me/task.py:7 in loss\n    lock.acquire()" in text


def test_who_still_ran_is_not_blamed_for_what_another_did(run: RunDir) -> None:
    record(0, message=TIMEOUT, time=1.0).write(run, 0)
    record(1, kind="absent", message="did not come", time=2.0).write(run, 0)
    record(3, time=3.0).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert (found.culprit.rank, found.collateral) == (3, [0])


IN_TORCH = 'Traceback:\n  File "/site-packages/torch/distributed/c10d.py", line 7, in barrier\n'
IN_HTTP = 'Traceback:\n  File "/lib/python3.11/http/client.py", line 7, in connect\n'


@pytest.mark.parametrize(
    ("why", "trace", "blamed"),
    [
        (COLLATERAL[0], IN_TORCH, 1),
        (TIMEOUT, IN_TORCH, 1),
        ("Connection refused", IN_HTTP, 0),
        ("boom", IN_TORCH, 0),
    ],
)
def test_who_left_with_status_0_is_blamed_by_those_alone_who_waited(
    run: RunDir, why: str, trace: str, blamed: int
) -> None:
    line = Frame("/home/me/train.py", 7, "main", "dist.barrier()")
    record(0, message=why, traceback=trace, frames=[line], time=2.0).write(run, 0)
    record(1, kind="early_exit", message="exited early", exit_code=0, type="", time=1.0).write(
        run, 0
    )
    found = verdict.judge(run, 0)
    assert found is not None
    assert (found.culprit.rank, found.exit_code) == (blamed, 1)
    assert found.collateral == [0][:blamed]
    assert ("rank 0 waited at me/train.py:7" in verdict.render(found, run)) == bool(blamed)


@pytest.mark.parametrize("why", [COLLATERAL[0], TIMEOUT])
def test_of_those_who_left_who_destroyed_its_group_is_the_last_to_be_blamed(
    run: RunDir, why: str
) -> None:
    left = {"kind": "early_exit", "exit_code": 0, "type": ""}
    record(0, message=why, traceback=IN_TORCH, time=3.0).write(run, 0)
    record(1, message="exited early", collateral=True, time=1.0, **left).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert found.culprit.rank == 1
    record(2, message="exited early", time=2.0, **left).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert found.culprit.rank == 2


def test_nobody_is_blamed_when_all_waited(run: RunDir) -> None:
    line = Frame("/home/me/train.py", 7, "main", "dist.recv(x, 1)")
    record(0, message=COLLATERAL[0], frames=[line], time=1.0).write(run, 0)
    record(1, message=TIMEOUT, frames=[replace(line, line=9)], time=2.0).write(run, 0)
    record(2, kind="absent", message="did not come", collateral=True, time=2.0).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert (found.culprit.rank, found.collateral) == (None, [0, 1, 2])
    head = "FAILED: the ranks waited for one another in a collective until it timed out"
    text = verdict.render(found, run)
    assert text.startswith(head)
    assert "rank 0 waited at me/train.py:7" in text
    assert "rank 1 waited at me/train.py:9" in text


def test_the_earliest_of_several_causes(run: RunDir) -> None:
    for rank, when in ((0, 3.0), (1, 1.0), (2, 2.0)):
        record(rank, time=when, message=f"boom {rank}").write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert found.culprit.rank == 1
    assert found.collateral == [0, 2]


def test_when_all_fail_alike_the_lowest_rank_speaks(run: RunDir) -> None:
    for rank, when in ((0, 3.0), (1, 1.0), (2, 2.0)):
        record(rank, time=when).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert (found.culprit.rank, found.same_failure, found.collateral) == (0, [1, 2], [])
    assert "ranks 1, 2 failed in the same way" in verdict.render(found, run)


def test_a_lost_node_comes_before_what_it_caused(run: RunDir) -> None:
    record(0, time=1.0, message="boom").write(run, 0)
    record(None, kind="node_lost", node_rank=1, node="node-1", exit_code=137, time=2.0).write(
        run, 0
    )
    found = verdict.judge(run, 0)
    assert found is not None
    assert (found.culprit.node, found.exit_code, found.collateral) == ("node-1", 137, [0])


def test_failures_that_a_restart_overcame_do_not_count(run: RunDir) -> None:
    record(0, time=1.0, restart=0).write(run, 0)
    record(2, time=9.0, restart=1).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert found.culprit.rank == 2
    assert found.restarts == 1


def test_nothing_failed(run: RunDir) -> None:
    assert verdict.judge(run, 0) is None


def test_the_block_has_at_most_15_lines(run: RunDir) -> None:
    frames = [
        Frame(f"/home/me/task_{k}.py", k, f"function_{k}", "x = " + "y" * 300) for k in range(9)
    ]
    words = [f"word-{k}" for k in range(40)]
    message = "not so:\n    " + " ".join(words) + "\nat /" + "deep/" * 40 + "end"
    record(3, frames=frames, message=message, log="/runs/x/rank-00003.log", restart=2).write(run, 0)
    for rank in range(40):
        if rank != 3:
            record(rank, message="Connection closed by peer", restart=2).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    text = verdict.render(found, run)
    lines = text.splitlines()
    assert len(lines) <= verdict.MAX_LINES
    assert all(len(line) <= 110 or "yyy" in line or "deep" in line for line in lines)
    assert text.index("not so") < text.index("deep/deep")
    assert text.split()[text.split().index("word-0") :][: len(words)] == words, "nothing is cut"
    assert lines[0] == "FAILED: rank 3 on node 1 (node-1) raised ValueError  [failure.exception]"
    assert "task_8.py:8" in text
    assert "and 27 more" in text
    assert "rank-00003.log" in text


def test_a_longer_reason_is_whole(run: RunDir) -> None:
    lines = [f"line {k}" for k in range(50)]
    record(3, frames=[Frame("/t.py", 1, "f", "f()")] * 3, message="\n".join(lines)).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    shown = verdict.render(found, run).splitlines()
    assert shown[1:3] == ["  /t.py:1 in f", "    f()"]
    assert shown[3:53] == [f"  {line}" for line in lines]


def test_the_place_at_the_end_of_what_is_wrong_is_not_cut_off(run: RunDir) -> None:
    why = "Slurm will never start the job: not so many nodes (PartitionNodeLimit)"
    message = f"{why}; sites/large.yaml:14:10: nodes: 4096; --time: time: 30 days"
    record(None, kind="agent", message=message).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    text = verdict.render(found, run, 80)
    assert message in " ".join(line.strip() for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 80


def test_what_another_try_would_meet_again_is_not_to_be_resumed(run: RunDir) -> None:
    record(1).write(run, 0)
    record(0, time=1.0, type="UsageError", message="no such parameter").write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    assert "resume" not in verdict.render(found, run)
    assert "resume" in verdict.render(verdict.Verdict(record(1)), run)


def test_kept_and_read_back(run: RunDir) -> None:
    record(1, frames=[Frame("a.py", 1, "f", "g()")]).write(run, 0)
    found = verdict.judge(run, 0)
    assert found is not None
    verdict.write(run, 0, found)
    assert verdict.read(run, 0) == found


def test_of_exception_keeps_the_users_frames() -> None:
    def users() -> None:
        raise ValueError("bad value")

    try:
        users()
    except ValueError as error:
        made = failures.of_exception(error, rank=1, node_rank=0, restart=0, log="")
    assert made.type == "ValueError"
    assert [frame.function for frame in made.frames][-1] == "users"
    assert "bad value" in made.traceback


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3), ("text", 1), (None, 0)])
def test_sys_exit_keeps_its_code(code: object, expected: int) -> None:
    made = failures.of_exception(SystemExit(code), rank=0, node_rank=0, restart=0, log="")
    assert made.exit_code == expected
    assert made.kind == "exit"


def test_a_kill_with_the_kernel_short_of_memory_is_oom() -> None:
    place = {"rank": 0, "node_rank": 0, "node": "n", "time": 1.0}
    assert failures.of_exit_status(-9, out_of_memory=True, **place).kind == "oom"
    assert failures.of_exit_status(-9, out_of_memory=False, **place).message == "killed by SIGKILL"
    assert failures.of_exit_status(-11, out_of_memory=True, **place).exit_code == 139
    assert failures.of_exit_status(3, out_of_memory=False, **place).exit_code == 3


def test_words_for_a_node_without_a_name_and_for_an_end() -> None:
    missing = record(None, kind="node_missing", node_rank=1, node="", message="node 1 did not join")
    head = verdict.render(verdict.Verdict(missing), RunDir("x")).splitlines()[0]
    assert head == "FAILED: node 1: node 1 did not join  [failure.node-missing]"
    assert failures.describe_exit(-9) == "was killed by SIGKILL"
    assert failures.describe_exit(3) == "ended with code 3"


def test_a_record_that_cannot_be_written_is_kept_aside(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "aside"))
    run.failures(0).parent.mkdir(parents=True)
    run.failures(0).write_text("a file where the directory should be")
    record(1).write(run, 0)
    assert "cannot write" in capsys.readouterr().err
    found = verdict.judge(run, 0)
    assert found is not None
    assert found.culprit.rank == 1


def test_a_terminal_folds_between_words_and_the_remedy_is_whole(run: RunDir) -> None:
    remedy = "take a scheduler that counts steps or epochs, or train with lightning.step: lightning"
    long = "/a/path/of/ninety/characters/" + "x" * 61
    culprit = record(
        1, message=f"ReduceLROnPlateau is stepped with a metric; {remedy}", hint=remedy, log=long
    )
    text = verdict.render(verdict.Verdict(culprit, collateral=[0]), run, 80)
    lines = text.splitlines()
    assert len(lines) <= verdict.MAX_LINES
    assert all(len(line) <= 80 for line in lines if long not in line)
    assert "…" not in text
    assert " ".join(text.split()).count(remedy) == 2
    assert "  rank 0 failed as a consequence" in lines
    wide = verdict.render(verdict.Verdict(culprit), run, 200).splitlines()
    assert f"  ReduceLROnPlateau is stepped with a metric; {remedy}" in wide


def test_failed_and_the_code_are_painted_and_nothing_else(run: RunDir) -> None:
    text = verdict.render(
        verdict.Verdict(record(1)), run, 80, lambda text, colour: f"<{colour}{text}>"
    )
    first, *others = text.splitlines()
    said = "rank 1 on node 0 (node-0) raised ValueError  "
    assert first == f"<redFAILED: >{said}<dim[failure.exception]>"
    assert not [line for line in others if "<" in line]


def test_a_line_for_status(run: RunDir) -> None:
    said = verdict.summary(verdict.Verdict(record(1, message="no such column\nin the file")))
    assert said == "rank 1 on node 0 (node-0) raised ValueError: no such column"
    killed = record(2, kind="signal", type="", message="was killed by SIGKILL")
    said = verdict.summary(verdict.Verdict(killed))
    assert said == "rank 2 on node 1 (node-1): was killed by SIGKILL"
