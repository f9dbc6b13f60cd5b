"""Options of torchrun that dtrain does not have, and what does the same in dtrain."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What to write instead of an option of torchrun."""

    why: str
    instead: str = ""
    """The options of dtrain, with `{}` for the value. Empty means none."""
    has_value: bool = True


_LOGS = "every rank has one log with its stdout and stderr: see `dtrain logs`"
ANSWERS = {
    "--rdzv-backend": Answer("there is one rendezvous, dtrain's own, on a TCPStore"),
    "--rdzv-id": Answer("every run has an id", "--run-id {}"),
    "--rdzv-conf": Answer("the time that nodes wait for one another is `launch.join_timeout`"),
    "--master-addr": Answer("`--launcher torchrun --rdzv-endpoint HOST:PORT` names node 0"),
    "--master-port": Answer("a free port is found, or `--rdzv-endpoint HOST:PORT` names it"),
    "--local-addr": Answer("a node uses the address from which it reaches node 0"),
    "--monitor-interval": Answer("a rank that ends is noticed at once"),
    "--start-method": Answer("ranks are forked from a process that has imported torch"),
    "--event-log-handler": Answer("events are in events.jsonl in the run directory"),
    "--role": Answer("all ranks have one role"),
    "--run-path": Answer("every script runs in the process that was forked", has_value=False),
    "--log-dir": Answer("logs are in the run directory", "--runs {}"),
    "--redirects": Answer(_LOGS),
    "-r": Answer(_LOGS),
    "--tee": Answer(_LOGS),
    "--local-ranks-filter": Answer("the console shows rank 0; `dtrain logs --rank N` the others"),
    "--duplicate-stdout-filters": Answer("search in the output of `dtrain logs`"),
    "--duplicate-stderr-filters": Answer("search in the output of `dtrain logs`"),
    "--logs-specs": Answer(_LOGS),
    "--numa-binding": Answer("dtrain binds nothing; `--no-python numactl` can start a program"),
    "--signals-to-handle": Answer("SIGTERM, SIGINT, SIGHUP and SIGUSR2 are passed on"),
    "--virtual-local-rank": Answer("LOCAL_RANK is the number of the GPU", has_value=False),
    "--shutdown-timeout": Answer("the time to end after a signal", "--set launch.stop_timeout={}s"),
}
