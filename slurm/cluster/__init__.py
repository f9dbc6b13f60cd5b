"""A real Slurm cluster of several nodes on one Linux machine, for tests and for trying things.

`Cluster` starts it, runs commands in it, breaks it, and leaves nothing behind. The same from a
shell: `python slurm/cluster up`. How it is built, from the ground up:

    spec      what was asked for, where its files are, what is running (state.json)
    processes looking at processes, waiting
    needs     what must be installed, and which mode this machine can do
    conf      the text of Slurm's configuration
    enter     the prefix that runs a command on a host
    hosts     network, process and mount namespaces, wired by a bridge
    database  mariadb and slurmdbd
    daemons   one class that starts, breaks and stops all of it
    keeper    the process that owns the daemons, and ends them when its starter is gone
    client    `Cluster`: starts a keeper and talks to it
    cli       the commands
"""

from cluster.client import Cluster, CommandError
from cluster.needs import missing
from cluster.spec import MODES, ClusterError

__all__ = ["MODES", "Cluster", "ClusterError", "CommandError", "missing"]
