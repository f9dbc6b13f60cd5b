"""README's matrix, as launches and refusals show it: every cell is tried."""

from __future__ import annotations

import json
from pathlib import Path

from dtrain import catalog
from support import ROOT
from support.launch import TINY, dtrain, events, the_run

SCRIPT = ROOT / "examples" / "script" / "job.yaml"
FIRST_OF_TWO = ("--node-rank", "0", "--rdzv-endpoint", "127.0.0.1:29400")
README = (ROOT / "README.md").read_text()

Rows = dict[str, list[str]]
"""The cells of each trainer, in the order of the strategies."""


def told(launcher: str) -> Rows:
    """What README says of a launcher."""
    rows = [line.split("|")[1:-1] for line in README.splitlines() if f" | `{launcher}` |" in line]
    return {row[0].strip(" `"): [cell.strip() for cell in row[2:]] for row in rows}


def shown(cwd: Path, launcher: str, profile: str, *, nodes: int = 2) -> Rows:
    """What comes of trying: two ranks of each pair are compared with a single process.

    Args:
        cwd: an empty folder.
        launcher: by name.
        profile: the profile to launch with.
        nodes: over how many nodes the two ranks can be spread from this host.
    """
    trained = {("native", "single")} if launcher == "local" else set()  # verify's reference
    one, several = [], []
    for name, fact in catalog.STRATEGIES.items():
        (several if fact.multi_node else one).append(name)
    sizes = (["--procs", "2"], ["--nodes", str(nodes), "--procs", str(2 // nodes)])
    for strategies, size in zip((one, several), sizes, strict=True):
        trained |= verified(cwd, ",".join(strategies), "--launcher", profile, *size)
    rows = {
        trainer: [cell(trainer, strategy, launcher, trained) for strategy in catalog.STRATEGIES]
        for trainer in catalog.TRAINERS
        if trainer != catalog.SCRIPT
    }
    return {**rows, catalog.SCRIPT: [by_itself(cwd, profile, nodes)] * len(catalog.STRATEGIES)}


def verified(cwd: Path, strategies: str, *arguments: str) -> set[tuple[str, str]]:
    """The trainers and strategies that were launched and are the same training."""
    done = dtrain(
        "verify", "--json", "--only", "--steps", "2", "--trainer", "native,lightning",
        "--strategy", strategies, *arguments, TINY,
        cwd=cwd, timeout=400, env={"TMPDIR": str(cwd)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {(pair["trainer"], pair["strategy"]) for pair in json.loads(done.stdout)["pairs"]}


def cell(trainer: str, strategy: str, launcher: str, trained: set[tuple[str, str]]) -> str:
    """One cell; what is not `yes` must be refused with a sentence that README has."""
    pair = ("--set", f"trainer={trainer}", "--set", f"strategy={strategy}", TINY)
    if (trainer, strategy) not in trained:
        return "no" if is_refused("--launcher", launcher, *pair) else "not launched, not refused"
    two = ("--nodes", "2", *(FIRST_OF_TWO if launcher == "torchrun" else ()))
    return "one node" if is_refused("--launcher", launcher, *two, *pair) else "yes"


def is_refused(*arguments: str | Path) -> bool:
    """Whether the planner refuses it, in README's words."""
    done = dtrain("plan", *arguments, cwd=ROOT)
    if done.returncode == 0:
        return False
    assert done.returncode == 2, done.stderr
    _, strategy, said = done.stderr.strip().partition(": strategy: ")
    assert strategy, done.stderr
    assert said in README, done.stderr
    return True


def by_itself(cwd: Path, profile: str, nodes: int) -> str:
    """`its own`, when a script trains there, and may not name a strategy."""
    assert is_refused("--launcher", profile, "--set", "strategy=ddp", SCRIPT)
    size = ("--nodes", str(nodes), "--procs", str(2 // nodes))
    done = dtrain("launch", "--launcher", profile, *size, SCRIPT, "--", "--epochs", "1", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    run = the_run(cwd)
    assert set(run.rank_logs(0)) == {0, 1}
    assert [event["step"] for event in events(run, "checkpoint_saved")][-1] == 23
    return "its own"
