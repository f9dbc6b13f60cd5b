"""The driver process of a launch from Python, which does the work of `dtrain launch` in a shell.

`drive` handles signals in the main thread of its process and forks nothing that has threads. A
notebook or a user's script cannot offer that. `dtrain.api` starts this module, which imports what
it needs while the caller plans the launch. The caller then sends it the plan.

stdin: one line of JSON, a `LaunchRequest`, or nothing when there is nothing to launch. stdout: JSON
lines, see `Reports`. stderr: a traceback, if there is one; after the attempt has begun, stderr is
`RunDir.driver_log`. When the requesting process is gone, the run is ended cleanly.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass, replace
from typing import Any

from dtrain import checked, errors
from dtrain.errors import DtrainError
from dtrain.forking import Channel
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers import base
from dtrain.launchers.local import LocalLauncher
from dtrain.launchers.supervise import drive
from dtrain.launchers.warm import WarmClient
from dtrain.plainjson import to_json
from dtrain.run import files


@dataclass(frozen=True)
class LaunchRequest:
    """A launch request. It holds the values of secret variables and is never written to a disk."""

    plan: LaunchPlan
    job: dict[str, Any]
    """The result of `JobSpec.to_plain`."""
    job_text: str
    detach: bool = False

    def to_line(self) -> bytes:
        plain = {**vars(self), "plan": self.plan.to_json()}
        return json.dumps(plain).encode() + b"\n"  # args may be infinite, which `to_json` rejects


class Reports:
    """A console for the driver, which reports to the requesting process in lines of JSON.

    The lines are `{"message": TEXT}`, and `{"started": true}` once nodes are started. The last line
    is `{"ended": CODE}` or `{"error": MESSAGE, "code": CODE, "kind": CLASS, "exit_code": N}`, with
    a class of `dtrain.errors`. They go to a file, so that nothing waits for a reader.
    """

    def __init__(self, plan: LaunchPlan, parent: int) -> None:
        self._plan = plan
        self._parent = parent
        self._started = False
        self._stop_requested = False

    def begin(self, text: str) -> None:
        log = self._plan.run.driver_log(self._plan.attempt, self._plan.node_ranks)
        files.make_parent(log)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, sys.stderr.fileno())
        os.close(fd)
        self.say(text)

    def tick(self) -> None:
        if not self._started:
            self._started = True
            report(started=True)
        if os.getppid() != self._parent and not self._stop_requested:
            self._stop_requested = True
            self.say("the process that launched this run has ended")
            os.kill(os.getpid(), signal.SIGTERM)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        report(message=text)

    def width(self) -> int | None:
        return None

    def paint(self, text: str, _colour: str | None) -> str:
        return text

    def close(self) -> None:
        """Do nothing. The process that shows the run reads its directory."""


def report(**values: Any) -> None:
    """Report one message to the requesting process."""
    os.write(sys.stdout.fileno(), to_json(values).encode() + b"\n")


def main() -> int:
    """Drive the launch that stdin requests. Return the exit code of the run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--warm", type=int, help="socket of the warm server that forks the nodes")
    arguments = parser.parse_args()
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):  # the job was refused, or the requesting process was killed
        return 0
    request = checked.read(LaunchRequest, line)
    launcher = base.load(request.plan.launcher)
    if arguments.warm is not None:
        launcher = LocalLauncher(WarmClient(Channel(socket.socket(fileno=arguments.warm))).spawn)
    options = launcher.options_model.of(request.plan.options)
    plan = replace(request.plan, options=options)
    job = JobSpec.model_validate(request.job)
    reports = Reports(plan, arguments.parent)
    try:
        code = drive(launcher, plan, job, request.job_text, reports, detach=request.detach)
        report(ended=code)
        return code
    except DtrainError as error:
        kinds = [
            each.__name__ for each in type(error).__mro__ if each.__module__ == errors.__name__
        ]
        report(error=str(error), code=error.code, kind=kinds[0], exit_code=error.exit_code)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
