"""`python -m dtrain.launchers.ray.raylet`: one node of a Ray cluster on this host, for srun.

Says on standard output when it is up, and with which address; ends all of it, and removes its
files, when its standard input closes, so however its owner ends.
"""

from __future__ import annotations

import argparse
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from dtrain import ports, procs
from dtrain.launchers.ray.local_cluster import (
    UP_TEXT,
    end_descendants,
    last_words,
    ray_start,
)

UP, FAILED = "dtrain-ray-up", "dtrain-ray-failed"
_TRIES = 3  # Ray gives up on its own daemons after 30 s, which a busy host may need
_POLL_S = 0.1


def main() -> None:
    """Be one node, until standard input closes."""
    parser = argparse.ArgumentParser(prog="python -m dtrain.launchers.ray.raylet")
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument(
        "--head", metavar="HOST:PORT", help="of the cluster; without it be its head"
    )
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it is needed while workers leave in order
    procs.adopt_orphans()  # of Ray's processes
    folder = Path(tempfile.mkdtemp(prefix="dtr-", dir="/tmp"))  # short: Ray's sockets are in it
    resources = {"CPU": float(given.cpus), **({"GPU": float(given.gpus)} if given.gpus else {})}
    try:
        code = _serve(folder, resources, given.head)
    finally:
        end_descendants()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


def _serve(folder: Path, resources: dict[str, float], head: str | None) -> int:
    own = address_of_this_host(head)
    log = folder / "node.log"
    for number in range(_TRIES):
        if head is None:
            port = ports.free_candidate(own, f"{folder}/{number}")
            client = ports.free_candidate(own, f"{folder}/{number}/client")
            more = [
                *("--head", f"--port={port}", f"--ray-client-server-port={client}"),
                "--include-dashboard=false",
            ]
            address = f"{own}:{port}"
        else:
            more, address = [f"--address={head}"], head
        place = Path(tempfile.mkdtemp(prefix="t-", dir=folder))  # new for every try
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*ray_start(own, place, resources), *more],
                cwd=place,  # Ray's processes import from the folder that they are started in
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        is_up = False
        while process.poll() is None:
            if not is_up and UP_TEXT in log.read_bytes():
                is_up = True
                print(f"{UP} {address}", flush=True)
            if _is_over():
                return 0
        if is_up:
            break
        print(f"Ray did not come up, try {number + 1} of {_TRIES}: {last_words(log)}", flush=True)
        end_descendants()
    print(f"{FAILED} {last_words(log)}", flush=True)
    return 1


def _is_over() -> bool:
    """Whether standard input has closed; waits a moment for it."""
    return bool(select.select([sys.stdin], [], [], _POLL_S)[0]) and not sys.stdin.read()


def address_of_this_host(head: str | None) -> str:
    """The address by which other hosts reach this one.

    Args:
        head: HOST:PORT of another host that we are to reach; None: any other.
    """
    if head is not None:
        host, _, port = head.rpartition(":")
        return ports.address_towards(host, int(port))
    own = _resolved(socket.gethostname())
    if own is not None:
        return own
    for addresses in psutil.net_if_addrs().values():  # Debian gives a host's own name to 127.0.1.1
        for entry in addresses:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return entry.address
    return "127.0.0.1"


def _resolved(name: str) -> str | None:
    try:
        infos = socket.getaddrinfo(name, None, socket.AF_INET)
    except OSError:
        return None
    found = [str(info[4][0]) for info in infos]
    return next((address for address in found if not address.startswith("127.")), None)


if __name__ == "__main__":
    main()
