"""`python -m dtrain.node RUN_DIR --node-rank K`: one node of a run (or several, simulated).

Without --node-rank it is a node of a batch job, and takes its place from the job step.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.node.fork_server import ForkServer
    from dtrain.plan import LaunchPlan
    from dtrain.run.rundir import RunDir


def main(argv: Sequence[str] | None = None) -> None:
    """Serve this host's nodes until they have ended; never returns."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.node", description=main.__doc__)
    parser.add_argument("run_dir", help="run directory with resolved.yaml and plan.json")
    parser.add_argument("--node-rank", type=int, action="append")
    parser.add_argument("--attempt", type=int, help="whose placement.json says where we are")
    parser.add_argument("--parent", type=int, help="pid of the parent to die with")
    parser.add_argument("--listen-fd", type=int, help="socket on which node 0 serves the store")
    arguments = parser.parse_args(argv)

    from dtrain.procs import DEFERRED_SIGNALS, die_with_parent

    if arguments.parent:
        die_with_parent(arguments.parent)
    # asked to leave while we import: heard when there is somebody to tell, see ForkServer.serve
    signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED_SIGNALS)
    from dtrain.forking import ONE_THREAD
    from dtrain.node.hashing import take_hash_seed
    from dtrain.run.rundir import RunDir

    if not arguments.node_rank:
        _log_in(RunDir(arguments.run_dir))
    command = ["-P", "-m", "dtrain.node", *(sys.argv[1:] if argv is None else argv)]
    take_hash_seed(RunDir(arguments.run_dir), command, keep_fd=arguments.listen_fd)
    inherited = dict(os.environ)
    os.environ.update(ONE_THREAD)
    from dtrain.plan import LaunchPlan
    from dtrain.run.backend_files import RayFiles
    from dtrain.run.files import read_json

    plan = LaunchPlan.read(RunDir(arguments.run_dir))
    if arguments.attempt is None and len(arguments.node_rank or ()) == plan.nodes:
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, DEFERRED_SIGNALS
        )  # no other node waits to be told
    if arguments.attempt is not None:
        plan = plan.placed(**read_json(RayFiles(plan.run).placement(arguments.attempt)))
        inherited = _without_ray(inherited)
    if arguments.node_rank:
        server = _server(plan, arguments.node_rank, inherited)
        status = server.serve(listen_fd=arguments.listen_fd)
    else:
        status = _serve_in_job(plan, inherited)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch down in order takes a second


def _server(plan: LaunchPlan, node_ranks: list[int], inherited: dict[str, str]) -> ForkServer:
    from dtrain.node.agent_process import run_agent
    from dtrain.node.fork_server import ForkServer

    return ForkServer(plan, node_ranks, partial(run_agent, inherited=inherited))


def _log_in(run: RunDir) -> None:
    """Write to this node's log from now on; before, srun takes what we say to the job's log.

    Were it srun that opened the log, a node without the run's folder would never start, and the
    others would wait for it.
    """
    from dtrain.run.backend_files import SlurmFiles

    path = SlurmFiles(run).node_log(int(os.environ.get("SLURM_NODEID", 0)))
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        sys.exit(
            f"dtrain: {os.uname().nodename} has no run folder: is it on all nodes, at the same "
            f"path? ({error.strerror}: {path})"
        )
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _without_ray(environ: dict[str, str]) -> dict[str, str]:
    """An environment without what a raylet's own job, and Ray, have put there."""
    from dtrain.environ import inherited_env

    clean = inherited_env(environ)
    return {name: value for name, value in clean.items() if not name.startswith("RAY_")}


def _serve_in_job(plan: LaunchPlan, environ: dict[str, str]) -> int:
    """Be one node of a batch job; the exit code."""
    from dtrain.environ import inherited_env
    from dtrain.errors import LaunchError
    from dtrain.node.placement import slurm
    from dtrain.run.attempts import Held

    try:
        slurm.refuse_endless(plan)
        place = slurm.take_place(plan, environ)
    except Held as error:  # what is in the run's directory is the other's
        print(f"dtrain: {error}", file=sys.stderr)
        return error.exit_code
    except LaunchError as error:
        print(f"dtrain: {error}", file=sys.stderr)
        slurm.record(plan, int(environ.get("SLURM_NODEID", 0)), error)
        return 1
    server = _server(place.plan, [place.node_rank], inherited_env(environ))
    server.is_superseded = lambda: slurm.is_superseded(place.plan)
    listen_fd = None if place.listener is None else place.listener.detach()
    status = server.serve(listen_fd=listen_fd)
    return slurm.conclude(place, status, server.asked_to_stop)


if __name__ == "__main__":
    main()
