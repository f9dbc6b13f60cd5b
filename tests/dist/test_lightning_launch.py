"""The Lightning example, launched: whole, with a rank that is killed, and by torchrun."""

from __future__ import annotations

from pathlib import Path

from launching import dtrain, events, kill, metrics, started, the_run, wait_for_step, worker_pids

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "lightning" / "job.yaml"
SHORT = ("--set", "train.epochs=3", "--set", "log.every_steps=1")


def test_the_example_survives_the_death_of_a_rank(tmp_path: Path) -> None:
    restarts = ("--max-restarts", "1", "--set", "checkpoint.every_steps=5")
    with started("launch", "--procs", "2", *SHORT, *restarts, EXAMPLE, cwd=tmp_path) as process:
        run = wait_for_step(tmp_path, 30)
        kill(worker_pids(run)[1])
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    (resumed,) = events(run, "resumed")
    assert resumed["step"] % 5 == 0 or resumed["step"] % 23 == 0
    (finished,) = events(run, "finished")
    assert finished["steps"] == 3 * 23
    assert set(finished["metrics"]) == {"val_loss", "val_acc"}
    assert finished["metrics"]["val_acc"] > 0.9
    assert (run.checkpoints / "best" / "manifest.json").is_file()


def test_by_torchrun(tmp_path: Path) -> None:
    launch = ("launch", "--launcher", "torchrun", "--procs", "2", "--set", "train.epochs=1")
    done = dtrain(*launch, EXAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(the_run(tmp_path), "eval")] == [23]
