"""Options of torchrun that dtrain does not have, and what does the same in dtrain."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.errors import UsageError, shortened


@dataclass(frozen=True)
class Answer:
    """What to write instead of an option of torchrun."""

    why: str
    instead: str = ""
    """The options of dtrain, with `{}` for the value. Empty means none."""
    has_value: bool = True


_LOGS = "every rank has one log with its stdout and stderr: see `dtrain logs`"
_ONE_PROGRAM = "dtrain runs every script in the interpreter that it has forked"
ANSWERS = {
    "--rdzv-backend": Answer("there is one rendezvous, dtrain's own, on a TCPStore"),
    "--rdzv-id": Answer("a run has an id, with or without", "--run-id {}"),
    "--rdzv-conf": Answer("the time that nodes wait is `--set launch.join_timeout=300s`"),
    "--master-addr": Answer("the address of node 0 is `--launcher torchrun --rdzv-endpoint`"),
    "--master-port": Answer("launcher local finds a free port; others have `--rdzv-endpoint`"),
    "--local-addr": Answer("a node uses the address from which it reaches node 0"),
    "--monitor-interval": Answer("a rank that ends is noticed at once"),
    "--start-method": Answer("ranks are forked from a process that has imported torch"),
    "--event-log-handler": Answer("events are in events.jsonl in the run directory"),
    "--role": Answer("all ranks have one role"),
    "--run-path": Answer(_ONE_PROGRAM, has_value=False),
    "--log-dir": Answer("logs are in the run directory", "--runs {}"),
    "--redirects": Answer(_LOGS),
    "-r": Answer(_LOGS),
    "--tee": Answer(_LOGS),
    "--local-ranks-filter": Answer("rank 0 is shown; the others: `dtrain logs --rank N`"),
    "--duplicate-stdout-filters": Answer("search in `dtrain logs`"),
    "--duplicate-stderr-filters": Answer("search in `dtrain logs`"),
    "--logs-specs": Answer(_LOGS),
    "--numa-binding": Answer("not done; wrap the program: --no-python numactl -- …"),
    "--signals-to-handle": Answer("SIGTERM, SIGINT, SIGHUP and SIGUSR2 are passed on"),
    "--virtual-local-rank": Answer("not done; set CUDA_VISIBLE_DEVICES in the program"),
    "--shutdown-timeout": Answer("seconds need a unit", "--set launch.stop_timeout={}s"),
}


def answer(unknown: str, given: Sequence[str], job_at: int | None, path: str) -> UsageError | None:
    """Return the answer to all options of torchrun in a command line.

    Args:
        unknown: the option that dtrain does not know.
        given: the command line, without the command.
        job_at: the position of JOB in it. None if it is not there.
        path: the command: `dtrain launch`.

    Returns:
        The answer, with the corrected command line. None if `unknown` is not torchrun's.
    """
    if unknown not in ANSWERS:
        return None
    end = len(given) if job_at is None else job_at
    kept, notes, endpoint = list[str](), list[str](), dict[str, str]()
    words = iter(given[:end])
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        found = ANSWERS.get(name)
        if found is None:
            kept.append(word)
            continue
        if found.has_value and not equals:
            value = next(words, "")
        if name.startswith("--master"):
            endpoint[name] = value
        elif found.instead:
            kept += shlex.split(found.instead.format(shlex.quote(value)))
        notes.append(f"  {shortened(f'{name} {value}'.strip(), 40)}: {found.why}")
    if "--master-addr" in endpoint and "torchrun" not in kept and _has_nodes(kept):
        address, port = endpoint["--master-addr"], endpoint.get("--master-port", "29500")
        kept += ["--launcher", "torchrun", "--rdzv-endpoint", f"{address}:{port}"]
    program = [*given[end : end + 1]]
    arguments = [*given[end + 1 :]]
    if arguments and arguments[0] != "--":
        arguments.insert(0, "--")
    line = shlex.join([*path.split(), *kept, *program, *arguments])
    return UsageError(
        "\n".join(["options of torchrun that dtrain does not have:", *notes, f"write: {line}"]),
        code="usage.option-of-torchrun",
    )


def _has_nodes(words: Sequence[str]) -> bool:
    return any(word.partition("=")[0].replace("_", "-") == "--node-rank" for word in words)
