"""README's matrix, as launches and refusals show it: every cell is tried."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dtrain import catalog
from support import JOBS, ROOT
from support.launch import TINY, dtrain, events, the_run

LIT = JOBS / "lightning_slow.yaml"
PLAIN = ("--set", "task=lightning_shapes.py:Plain")
SCRIPT = ROOT / "examples" / "script" / "job.yaml"
FIRST_OF_TWO = ("--node-rank", "0", "--rdzv-endpoint", "127.0.0.1:29400")
README = (ROOT / "README.md").read_text()

Rows = dict[str, list[str]]
"""The cells of each trainer, in the order of the strategies."""


def documented(launcher: str) -> Rows:
    """The rows of a launcher in README."""
    rows = [line.split("|")[1:-1] for line in README.splitlines() if f" | `{launcher}` |" in line]
    return {row[0].replace("`", "").strip(): [cell.strip() for cell in row[2:]] for row in rows}


def shown(cwd: Path, launcher: str, profile: str, *, nodes: int = 2) -> Rows:
    """What comes of trying: two ranks of each layout are compared with a single process.

    Args:
        cwd: an empty directory.
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
    rows["lightning, own loops"] = own_loops(cwd, launcher, profile, nodes)
    return {**rows, catalog.SCRIPT: [by_itself(cwd, profile, nodes)] * len(catalog.STRATEGIES)}


def verified(cwd: Path, strategies: str, *arguments: str) -> set[tuple[str, str]]:
    """The trainers and strategies that were launched and are the same training."""
    trainers = ("--trainer", "native,lightning")
    layouts = the_same(cwd, "--strategy", strategies, *trainers, *arguments, TINY)
    return {(layout["trainer"], layout["strategy"]) for layout in layouts}


def the_same(cwd: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    """The layouts of a verify; all are the same training."""
    done = dtrain(
        "verify", "--json", "--only", "--steps", "2", *arguments,
        cwd=cwd, timeout=400, env={"TMPDIR": str(cwd)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    layouts: list[dict[str, Any]] = json.loads(done.stdout)["layouts"]
    return layouts


def own_loops(cwd: Path, launcher: str, profile: str, nodes: int) -> list[str]:
    """The cells of a LightningModule under Lightning's own loops."""
    one = ("--launcher", profile, "--strategy", "single")
    several = ("--strategy", "ddp,fsdp", "--nodes", str(nodes), "--procs", str(2 // nodes))
    profiles = ("--launcher", profile)
    layouts = the_same(cwd, *one, *PLAIN, LIT) + the_same(cwd, *profiles, *several, *PLAIN, LIT)
    trained = {("lightning", layout["strategy"]) for layout in layouts if layout["own_loops"]}
    own = ("--set", "lightning.step=lightning")
    return [cell("lightning", each, launcher, trained, LIT, *own) for each in catalog.STRATEGIES]


def cell(
    trainer: str,
    strategy: str,
    launcher: str,
    trained: set[tuple[str, str]],
    job: Path = TINY,
    *settings: str,
) -> str:
    """One cell; what is not `yes` must be refused with a sentence that README has."""
    layout = ("--set", f"trainer={trainer}", "--set", f"strategy={strategy}", *settings, job)
    if (trainer, strategy) not in trained:
        return "no" if is_refused("--launcher", launcher, *layout) else "not launched, not refused"
    two = ("--nodes", "2", *(FIRST_OF_TWO if launcher == "torchrun" else ()))
    return "one node" if is_refused("--launcher", launcher, *two, *layout) else "yes"


def is_refused(*arguments: str | Path) -> bool:
    """Whether the planner refuses it, in README's words."""
    done = dtrain("plan", *arguments, cwd=ROOT)
    if done.returncode == 0:
        return False
    assert done.returncode == 2, done.stderr
    text = done.stderr.strip().removesuffix("  [plan.unsupported-combination]")
    parts = re.split(": strategy: |: lightning.step: ", text, maxsplit=1)
    assert len(parts) == 2, done.stderr
    assert parts[1] in README, done.stderr
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
