"""`python -m dtrain.node RUN_DIR --node-rank K`: one node of a run (or several, simulated).

A reader (see `node.placement`) finds out which node it is. The default is `--placement argv`, which
reads --node-rank.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from dtrain.node.placement.base import Arguments, PlacementReader


def main(argv: Sequence[str] | None = None) -> None:
    """Serve this host's nodes until they have ended; never returns."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.node", description=main.__doc__)
    parser.add_argument("run_dir", help="run directory with resolved.yaml and plan.json")
    parser.add_argument("--placement", default="argv", help="how this process finds its node rank")
    parser.add_argument("--placement-args", help="data for that placement, as JSON")
    parser.add_argument("--node-rank", type=int, action="append")
    parser.add_argument("--parent", type=int, help="pid of the parent to die with")
    parser.add_argument("--listen-fd", type=int, help="socket on which node 0 serves the store")
    argv = sys.argv[1:] if argv is None else argv
    arguments = cast("Arguments", parser.parse_args(argv))

    from dtrain.errors import DtrainError, format_error
    from dtrain.procs import DEFERRED_SIGNALS, die_with_parent

    if arguments.parent:
        die_with_parent(arguments.parent)
    # a stop signal during the imports is delivered when agents can receive it, see ForkServer.serve
    signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED_SIGNALS)
    try:
        status = _serve(arguments, argv)
    except DtrainError as error:
        print(format_error(error), file=sys.stderr)
        status = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a clean shutdown of torch takes a second


def _serve(arguments: Arguments, argv: Sequence[str]) -> int:
    """Serve the nodes that the reader assigns to this process. Return the exit code."""
    from dtrain.node.hashing import take_hash_seed
    from dtrain.run.rundir import RunDir

    run = RunDir(arguments.run_dir)
    take_hash_seed(run, ["-P", "-m", "dtrain.node", *argv], keep_fd=arguments.listen_fd)
    inherited = dict(os.environ)
    from dtrain.forking import ONE_THREAD

    os.environ.update(ONE_THREAD)
    from dtrain import catalog
    from dtrain.launch_plan import LaunchPlan

    reader: PlacementReader = catalog.load("placement", arguments.placement)(arguments, inherited)
    reader.begin(run)
    node = reader.join(LaunchPlan.read(run))

    from dtrain.node.agent_process import run_agent
    from dtrain.node.fork_server import ForkServer

    agent = partial(run_agent, inherited=dict(node.environ))
    server = ForkServer(node.plan, node.node_ranks, agent, reader.is_superseded)
    status = server.serve(listen_fd=node.listen_fd)
    return reader.finish(status, server.asked_to_stop)


if __name__ == "__main__":
    main()
