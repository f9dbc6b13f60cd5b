"""`python -m dtrain.node.warm`: forks the node processes of many short launches of one job.

A node process spends 3.5 CPU seconds on `import torch` and the workers' imports (2 cores, 2026-11).
That is more than a training of five steps. This process does it once, and forks
`python -m dtrain.node` with torch already imported. Everything else is the same as in any other
launch: its arguments, environment, log and descriptors, its agents and workers, and how it ends.
This process always has one thread, so that it may fork. It trains nothing, so that no state of one
launch comes into the next.

Another process can be a client too: the driver of one run of a sweep. The nodes that it asked for
end with it. This process ends with the last client, and all that it forked ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import sys

from dtrain.forking import ONE_THREAD, Channel, Children, import_once
from dtrain.node import __main__ as node
from dtrain.procs import die_with_parent, fork_child, kill_group, outlive_parent


def main() -> None:
    """Serve the process at the other end of the socket until it is closed. Never return."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.node.warm", description=main.__doc__)
    parser.add_argument("--parent", type=int, required=True, help="pid of the parent to die with")
    parser.add_argument("--socket", type=int, required=True, help="socket for the requests")
    parser.add_argument("modules", nargs="*", help="modules to import in addition to torch")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    channel = Channel(socket.socket(fileno=arguments.socket))
    os.environ.update(ONE_THREAD)
    from dtrain.node import agent_process  # noqa: F401  as every node process does
    from dtrain.node.fork_server import WORKER_MODULES

    of_user = [module for module in arguments.modules if not module.startswith("dtrain.")]
    if import_once((*WORKER_MODULES, *arguments.modules), preload=of_user):
        sys.exit(f"{' '.join(arguments.modules)} started threads, which a fork would lose")
    outlive_parent()  # the sockets tell from now on: drivers have to end their runs first
    channel.send({"ready": os.getpid()})
    _serve(channel)
    os._exit(0)  # the kernel kills all that it forked


def _serve(channel: Channel) -> None:
    """Fork processes, pass signals on, and report how each ended, until every socket closes."""
    children = Children()
    clients = {channel}
    nodes: dict[int, Channel] = {}
    while clients:
        ready = children.wait(clients)
        for ended in children.reap():
            if (client := nodes.pop(ended.pid, None)) is not None:
                with contextlib.suppress(OSError):  # it has ended too
                    client.send({"exited": ended.pid, "code": ended.code})
        for client in [each for each in clients if each.fileno() in ready]:
            try:
                request, files = client.receive_with_files()
            except EOFError:
                clients.remove(client)
                client.close()
                for pid in [pid for pid, owner in nodes.items() if owner is client]:
                    kill_group(pid)
                continue
            if request is None:
                continue
            if "client" in request:
                clients.update(Channel(socket.socket(fileno=fd)) for fd in files)
            elif "start" in request:
                pid = _fork_node(request["start"], request["env"], *files)
                nodes[pid] = client
                with contextlib.suppress(OSError):
                    client.send({"started": pid})
            elif nodes.get(request["pid"]) is client:
                kill_group(request["pid"], request["signal"])


def _fork_node(argv: list[str], env: dict[str, str], log: int, *listener: int) -> int:
    for fd in listener:
        argv = [*argv, "--listen-fd", str(fd)]
    pid = fork_child(lambda: _become_node(argv, env), stdout=log, stderr=log, keep_fds=listener)
    for fd in (log, *listener):
        os.close(fd)
    return pid


def _become_node(argv: list[str], env: dict[str, str]) -> int:
    """Run what `python -m dtrain.node` would run after its imports."""
    import numpy as np

    os.environ.clear()
    os.environ.update(env)
    sys.argv = [node.__file__, *argv]
    random.seed()  # otherwise every launch has the same numbers, which would hide a missing seed
    np.random.seed()
    node.main(argv)
    return 0


if __name__ == "__main__":
    main()
