"""The process that owns a cluster: all daemons are its descendants, and it takes orders.

`Cluster.start` starts it. It ends, and the cluster with it, when it is told so, gets SIGTERM, or
when its starter is gone, however that ended. If it is killed itself, hosts end with the pipe that
it held, and daemons by the kernel's signal on a parent's death.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from cluster.daemons import Daemons
from cluster.needs import choose_mode, missing
from cluster.ports import choose_ports
from cluster.processes import alive, reap
from cluster.spec import ClusterError, Files, Spec, State

NODE_VERBS = ("power_off", "power_on", "cut", "heal", "kill_slurmd", "start_slurmd")
CTL_VERBS = ("kill_ctl", "start_ctl")
_SUBREAPER = 36


def main(directory: str, spec_json: str, starter: int) -> int:
    """Keep a cluster until its starter wants it no more.

    The first line of output is JSON: `{}` when the cluster is up, else `{"error": …}`.
    """
    files = Files.at(directory)
    try:
        spec = resolve(Spec(**json.loads(spec_json)))
        with _until_told(), _claimed(files, spec), _running(files, spec) as daemons:
            _say({})
            _serve(daemons, starter)
    except (ClusterError, OSError, subprocess.SubprocessError) as error:
        _say({"error": str(error)})
        return 1
    return 0


def resolve(spec: Spec) -> Spec:
    """The same with mode and ports chosen; an error where something is missing."""
    reason = missing(accounting=spec.accounting)
    if reason:
        raise ClusterError(reason)
    spec = dataclasses.replace(spec, mode=choose_mode(spec.mode))
    if spec.mode != "ports":
        return spec
    return dataclasses.replace(spec, port=choose_ports(spec.port, spec.nodes))


@contextlib.contextmanager
def _claimed(files: Files, spec: Spec) -> Iterator[None]:
    """The directory, empty at the start and gone at the end."""
    _refuse_foreign(files.root)
    _clear(files)
    try:
        for name in files.FOLDERS:
            (files.root / name).mkdir(parents=True)
        yield
    finally:
        if not spec.keep:
            _clear(files)
            with contextlib.suppress(OSError):
                files.state_json.unlink()
                files.root.rmdir()


def _refuse_foreign(root: Path) -> None:
    """Only what was a cluster's is cleared away, and only when that one has ended."""
    if root.exists() and not root.is_dir():
        raise ClusterError(f"{root} is a file: take an empty folder, or one that does not exist")
    found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if not found:
        return
    if "state.json" not in found or set(found) - {*Files.FOLDERS, "state.json", "state.new"}:
        raise ClusterError(f"{root} holds other things ({found[0]}): take an empty folder")
    if alive(State.load(Files(root)).keeper):
        raise ClusterError(f"a cluster runs in {root} already; end it with `down {root}`")


def _clear(files: Files) -> None:
    for name in files.FOLDERS:
        shutil.rmtree(files.root / name, ignore_errors=True)


@contextlib.contextmanager
def _running(files: Files, spec: Spec) -> Iterator[Daemons]:
    state = State(spec, keeper=os.getpid())
    daemons = Daemons(state, files)
    # What loses its parent becomes our child, so that all the cluster's processes stay below us.
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        state.save(files)  # it also marks the directory as ours to clear
        daemons.start()
        state.ready = True
        state.save(files)
        yield daemons
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        daemons.stop()


@contextlib.contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM leaves this block, with all the clearing up inside it."""

    def leave(*_: object) -> NoReturn:
        raise _Told

    signal.signal(signal.SIGTERM, leave)
    try:
        with contextlib.suppress(_Told):
            yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # told after the end, as after an error


class _Told(BaseException):
    """The cluster is wanted no more."""


def _serve(daemons: Daemons, starter: int) -> None:
    """Take one order after the other until the starter is gone."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(daemons.files.control))
        listening.listen()
        with contextlib.ExitStack() as stack:
            try:
                starters_end = os.pidfd_open(starter)
            except ProcessLookupError:
                return
            stack.callback(os.close, starters_end)
            while os.getppid() == starter:
                watched = [listening.fileno(), starters_end]
                ready, _, _ = select.select(watched, [], [], 1.0)
                if starters_end in ready:
                    return
                if ready:
                    _answer(listening, daemons)
                reap()


def _answer(listening: socket.socket, daemons: Daemons) -> None:
    connection, _ = listening.accept()
    with connection, connection.makefile("rw") as stream, contextlib.suppress(OSError, ValueError):
        connection.settimeout(5.0)
        order = json.loads(stream.readline())
        reply: dict[str, str] = {}
        if order["verb"] == "stop":
            raise _Told
        try:
            _obey(daemons, order["verb"], order.get("node"))
        except ClusterError as error:
            reply = {"error": str(error)}
        daemons.state.save(daemons.files)
        stream.write(json.dumps(reply) + "\n")
        stream.flush()


def _obey(daemons: Daemons, verb: str, node: str | None) -> None:
    if verb in CTL_VERBS:
        getattr(daemons, verb)()
        return
    names = daemons.state.spec.node_names
    if verb not in NODE_VERBS:
        raise ClusterError(f"no verb {verb!r}: {', '.join(NODE_VERBS + CTL_VERBS)}")
    if node not in names:
        raise ClusterError(f"no node {node!r}: there are {', '.join(names)}")
    getattr(daemons, verb)(node)


def _say(message: dict[str, str]) -> None:
    """To the starter, which reads one line; what comes later is for people."""
    try:
        os.write(sys.stdout.fileno(), f"{json.dumps(message)}\n".encode())
    except BrokenPipeError:
        print(f"slurm/cluster: {message.get('error')}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
