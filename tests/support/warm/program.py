"""`dtrain` and `python -m dtrain.node` for other programs: the warm server runs what is asked.

`program.py ADDRESS dtrain ARGUMENTS…` stands for the command in a shell,
`program.py ADDRESS dtrain.node ARGUMENTS…` for a node that Slurm or Ray starts. It passes signals
on, and ends as what it asked for does, which runs in the namespaces of this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

from wire import exit_code, request

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, module: str, arguments: list[str]) -> NoReturn:
    files = {0: 0, 1: 1, 2: 2}
    if "--listen-fd" in arguments:
        number = int(arguments[arguments.index("--listen-fd") + 1])
        files[number] = number
    if "--parent" in arguments:  # it is not our parent's child; it dies with us, and we with that
        at = arguments.index("--parent")
        _die_with_parent(int(arguments[at + 1]))
        del arguments[at : at + 2]
    connection, _ = request(address, module, arguments, cwd=os.getcwd(), env=os.environ,
                            files=files, enter=True)  # fmt: skip
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(
                number,
                lambda number, _frame: connection.send(json.dumps({"signal": number}).encode()),
            )
    code = exit_code(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def _die_with_parent(pid: int) -> None:
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != pid:
        os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
