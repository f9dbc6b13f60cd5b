"""The commands: `python slurm/cluster up`, and what is done to a cluster from another shell."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cluster.client import Cluster
from cluster.needs import program
from cluster.processes import alive
from cluster.spec import MODES, ClusterError, State

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM = "python slurm/cluster"
_NOT_OPTIONS = ("function", "command")
_NODE_VERBS = {
    "power-off": "pull the node's plug: its processes end and nobody is told",
    "power-on": "boot it again",
    "cut": "pull its network cable: its processes go on, unheard",
    "heal": "plug it in again",
    "kill-slurmd": "kill its Slurm daemon; its jobs go on",
    "start-slurmd": "start that again",
}
_CTL_VERBS = {
    "kill-ctl": "kill the controller; jobs go on, commands fail",
    "start-ctl": "start it again",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command; the exit status is that of the command run, or 2 for an error told."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    asked = _parser().parse_args(words[:end], argparse.Namespace(command=words[end + 1 :]))
    try:
        return int(asked.function(asked))
    except ClusterError as error:
        print(f"slurm/cluster: {error}", file=sys.stderr)
        return 2
    except (OSError, KeyboardInterrupt) as error:
        print(f"slurm/cluster: {str(error) or 'interrupted'}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_up(commands)
    run = _add(commands, "exec", "run what follows `--` on a host of it", _exec)
    run.add_argument("--host", default="login", help="login (the default), ctl, or a node")
    _add(commands, "env", 'for `eval "$(…)"`: use it from this very shell', _env)
    _add(commands, "status", "its nodes and daemons", _status)
    _add(commands, "down", "end it", _down)
    for verb, what in _NODE_VERBS.items():
        _add(commands, verb, what, _fault, verb=verb).add_argument("node")
    for verb, what in _CTL_VERBS.items():
        _add(commands, verb, what, _fault, verb=verb, node=None)
    return parser


def _add(
    commands: Commands, name: str, what: str, function: Callable[..., int], **fixed: str | None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("directory", help="of the cluster, as `up` told it")
    parser.set_defaults(function=function, **fixed)
    return parser


def _add_up(commands: Commands) -> None:
    what = "start a cluster, and end it at Ctrl-C"
    up = commands.add_parser("up", help=what, description=what)
    up.set_defaults(function=_up)
    up.add_argument("directory", nargs="?", help="for its files; a new one in /tmp")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--gpus-per-node", type=int, default=0, help="pretended")
    up.add_argument(
        "--node",
        action="append",
        default=[],
        dest="unlike",
        metavar="'NAME CPUs=N …'",
        help="nodes that are not alike: each with what it claims, as slurm.conf says it",
    )
    up.add_argument(
        "--accounting", action="store_true", help="with a database, so that sacct works"
    )
    up.add_argument("--mode", choices=("auto", *MODES), default="auto")
    up.add_argument("--port", type=int, help="in mode ports: the first of the ports it takes")
    up.add_argument("--slurmd-timeout-s", type=int, default=10, help="until a silent node is down")
    up.add_argument("--keep", action="store_true", help="leave the directory, with the logs")


def _up(asked: argparse.Namespace) -> int:
    options = {name: value for name, value in vars(asked).items() if name not in _NOT_OPTIONS}
    _interrupt_once()
    with Cluster(options.pop("directory"), **options) as cluster:
        print(_how_to_use(cluster), flush=True)
        keeper = State.load(cluster.files).keeper
        try:
            while alive(keeper):
                signal.sigtimedwait([], 0.5)
            print("the cluster has ended", flush=True)
        except KeyboardInterrupt:
            print("\nending it", flush=True)
    return 0


def _interrupt_once() -> None:
    """SIGINT, which a shell's `&` has ignored, and SIGTERM; what comes while we end is too late."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(*_: object) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


def _how_to_use(cluster: Cluster) -> str:
    spec, directory = cluster.spec, shlex.quote(str(cluster.files.root))
    gpus = f" with {spec.gpus_per_node} pretended GPUs each" if spec.gpus_per_node else ""
    return f"""\
Slurm is up: {spec.nodes} nodes ({", ".join(spec.node_names)}){gpus}, mode {spec.mode}.
Partitions: main (the default), low (preempted by the others), high, short (2 minutes).

From another shell:
  {PROGRAM} exec {directory} -- sinfo
  {PROGRAM} exec {directory} -- bash           # a shell on the login host
  eval "$({PROGRAM} env {directory})"          # sbatch, squeue, dtrain launch … in this shell
  {PROGRAM} status {directory}                 # and power-off, cut, kill-slurmd …: see --help

Ctrl-C ends it{"" if spec.keep else " and removes " + str(cluster.files.root)}."""


def _exec(asked: argparse.Namespace) -> int:
    cluster = Cluster.attach(asked.directory)
    if not asked.command:
        raise ClusterError(f"which command? {PROGRAM} exec {asked.directory} -- sinfo")
    argv = [*cluster.enter(asked.host, Path.cwd()), *asked.command]
    os.execve(argv[0], argv, cluster.environment())


def _env(asked: argparse.Namespace) -> int:
    for name, value in Cluster.attach(asked.directory).outside().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _status(asked: argparse.Namespace) -> int:
    cluster = Cluster.attach(asked.directory)
    state = State.load(cluster.files)
    for name, pid in state.daemons.items():
        print(f"{name:16} {'runs' if alive(pid) else 'has ended':10} pid {pid}")
    done = cluster.run([program("sinfo"), "-N", "-l"], check=False)
    print(done.stdout or done.stderr, end="")
    return done.returncode


def _down(asked: argparse.Namespace) -> int:
    Cluster.attach(asked.directory).stop()
    return 0


def _fault(asked: argparse.Namespace) -> int:
    cluster = Cluster.attach(asked.directory)
    act = getattr(cluster, asked.verb.replace("-", "_"))
    act(*([asked.node] if asked.node else []))
    return 0
