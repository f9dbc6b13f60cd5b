"""What many nodes cost: meeting, launching, files, and following a run.

Simulated nodes of this machine; prints the tables of docs/scale.md::

    python benchmarks/scale.py --nodes 8 64

Set RES_OPTIONS='timeout:1 attempts:1' where the name server is slow: torch looks up the name of
whomever it connects to.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
from launches import BIN, ENDLESS, JOB, read_json
from startup import aligned, running, scratch, wait_for

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of each name that DNS lacks

from dtrain import ports
from dtrain.console.tail import Follower
from dtrain.launchers.slurm.queue import _GROWTH, _LATEST_S, _SOONEST_S
from dtrain.node.rendezvous import NodeRendezvous
from dtrain.node.store import RendezvousSettings
from dtrain.run import verdict
from dtrain.run.failures import FailureRecord
from dtrain.run.rundir import RunDir

RANKS_PER_NODE = 8
PROCESSES = 4
AGENTS_TICK_S = 0.05
"""How often an agent looks at its workers and at the other nodes."""
WATCHED_S = 5.0


# -- rendezvous ------------------------------------------------------------------------------


def meet(nodes: int) -> list[str]:
    """Agents that find each other, and then ask the head as agents do; a line of the table."""
    context: Any = multiprocessing.get_context("fork")
    met, end = context.Queue(), context.Event()
    port = ports.free_candidate("127.0.0.1", f"scale-{nodes}")
    started = time.monotonic()
    processes = [
        context.Process(
            target=be_nodes, args=(range(first, nodes, PROCESSES), nodes, port, met, end)
        )
        for first in range(PROCESSES)
    ]
    try:
        for process in processes:
            process.start()
        all_met = max(met.get(timeout=300) for _ in range(nodes)) - started
        head, others = busy(processes[0]), [busy(process) for process in processes[1:]]
        threading.Event().wait(WATCHED_S)
        of_the_head = busy(processes[0]) - head
        usual = sum(busy(p) - b for p, b in zip(processes[1:], others, strict=True)) / len(others)
    finally:
        end.set()
        for process in processes:
            process.join(30)
    return [str(nodes), f"{all_met:.2f} s", f"{max(of_the_head - usual, 0) / WATCHED_S:.1%}"]


def busy(process: BaseProcess) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def be_nodes(ranks: range, nodes: int, port: int, met: Any, end: Any) -> None:
    def be_node(rank: int) -> None:
        settings = RendezvousSettings(
            "scale",
            "127.0.0.1",
            port,
            rank,
            f"n{rank}",
            nodes,
            nodes,
            join_timeout_s=300,
            token=b"",
        )
        rendezvous = NodeRendezvous(settings)
        rendezvous.next_rendezvous()
        met.put(time.monotonic())
        while not end.wait(AGENTS_TICK_S):
            rendezvous.num_nodes_waiting()

    threads = [threading.Thread(target=be_node, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- a whole launch --------------------------------------------------------------------------


def launch(nodes: int) -> list[str]:
    """`dtrain launch --nodes N` to its first checkpoint; a line of the table."""
    with scratch() as folder:
        run = RunDir(folder / "runs" / "scale")
        argv = [str(BIN / "dtrain"), "launch", "--nodes", str(nodes), "--procs", "1"]
        argv += ["--run-id", "scale", "--set", f"train.epochs={ENDLESS}"]
        argv += ["--set", f"train.global_batch_size={max(64, nodes)}"]
        argv += ["--set", "log.every_steps=1", "--set", "checkpoint.every_steps=2"]
        argv += ["--set", "checkpoint.keep=1000000", str(JOB)]
        with running(argv, folder, {}) as started:
            wait_for(lambda: read_json(run.metrics), f"the first step on {nodes} nodes")
            first = read_json(run.metrics)[0]["time"] - started
            wait_for(lambda: list(run.checkpoints.glob("*/manifest.json")), "a checkpoint")
            logs = sum(path.is_file() for path in run.attempt(0).rglob("*"))
            one = next(run.checkpoints.glob("*/manifest.json")).parent
            saved = sum(path.is_file() for path in one.rglob("*"))
    return [str(nodes), f"{first:.1f} s", str(logs), str(saved)]


# -- following, and the verdict --------------------------------------------------------------


def follow(nodes: int) -> list[str]:
    """The logs of a run in which every rank has failed; a line of the table."""
    ranks = nodes * RANKS_PER_NODE
    with scratch() as folder:
        run = RunDir(folder)
        run.create()
        follower: Follower[int] = Follower()
        for rank in range(ranks):
            log = run.rank_log(0, rank // RANKS_PER_NODE, rank)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("a line\n")
            follower.add(rank, log)
            FailureRecord(
                kind="exception", message="boom", exit_code=1, node_rank=rank // RANKS_PER_NODE,
                node="n", time=float(rank), log=str(log), rank=rank,
            ).write(run, 0)  # fmt: skip
        polls, began = 0, time.perf_counter()
        seen: set[int] = set()
        while len(seen) < ranks:
            seen |= {rank for rank, _ in follower.poll()}
            polls += 1
        tick = (time.perf_counter() - began) / polls
        began = time.perf_counter()
        verdict.judge(run, 0)
        judged = time.perf_counter() - began
    return [str(ranks), f"{tick * 1e3:.1f} ms", f"{polls * 0.05:.1f} s", f"{judged:.2f} s"]


def watcher_calls(seconds: float) -> int:
    """Calls of squeue by a command that follows one job that does not change."""
    calls, now, pause = 0, 0.0, _SOONEST_S
    while now < seconds:
        calls, now, pause = calls + 1, now + pause, min(pause * _GROWTH, _LATEST_S)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description="What many nodes cost.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 64])
    sizes = parser.parse_args().nodes
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n", flush=True)
    head = ["nodes", "all have met", "head busy with the others' questions"]
    print(aligned([head, *map(meet, sizes)]) + "\n", flush=True)
    head = ["nodes × 1", "command → first step", "files of an attempt", "files of a checkpoint"]
    print(aligned([head, *map(launch, sizes)]) + "\n", flush=True)
    head = ["ranks", "a look at the logs", "all logs seen after", "verdict of as many failures"]
    print(aligned([head, *map(follow, [*sizes, 1000])]) + "\n", flush=True)
    print(f"calls of squeue in the first hour, then in each: {watcher_calls(3600)}, "
          f"{watcher_calls(7200) - watcher_calls(3600)}")  # fmt: skip


if __name__ == "__main__":
    main()
