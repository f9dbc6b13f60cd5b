"""`Cluster`: what tests and the commands use."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.enter import enter, environment
from cluster.processes import alive, wait_until
from cluster.spec import ClusterError, Files, Spec, State

_START_S = 240.0
_STOP_S = 40.0


class CommandError(ClusterError):
    """A command in the cluster failed."""

    def __init__(self, done: subprocess.CompletedProcess[str], host: str) -> None:
        output = (done.stdout or "") + (done.stderr or "")
        command = " ".join(map(str, done.args))
        super().__init__(f"`{command}` on {host} ended with {done.returncode}:\n{output.rstrip()}")
        self.returncode = done.returncode
        self.output = output


class Cluster:
    """A Slurm cluster of its own, on this machine; a context manager.

    Args:
        directory: For all its files; removed at the end, unless `keep` is set. Its path must be
            short. None: a new one in /tmp.
        options: The fields of `Spec`: nodes, gpus_per_node, accounting, mode, …

    Attributes:
        spec: What was asked for; once started, with the mode and ports that were chosen.
    """

    def __init__(self, directory: str | Path | None = None, **options: Any) -> None:
        self.spec = Spec(**options)
        self.files = Files.at(directory or f"/tmp/dtrain-slurm-{secrets.token_hex(4)}")
        self._keeper: subprocess.Popen[str] | None = None

    @classmethod
    def attach(cls, directory: str | Path) -> Cluster:
        """To one that somebody else started, and that ends with them."""
        files = Files.at(directory)
        state = State.load(files)
        if not alive(state.keeper):
            raise ClusterError(f"the cluster in {files.root} has ended")
        if not state.ready:
            raise ClusterError(f"the cluster in {files.root} is still starting")
        return cls(files.root, **dataclasses.asdict(state.spec))

    def start(self) -> Self:
        """Up, with all nodes idle, when this returns: 1 to 3 s, with accounting 5 to 15."""
        if self._keeper is not None:
            raise ClusterError("this cluster was started already")
        spec = json.dumps(dataclasses.asdict(self.spec))
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "cluster.keeper", str(self.files.root), spec, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to handle
            cwd=Path(__file__).resolve().parents[1],
            text=True,
        )
        try:
            self._wait_for_word(self._keeper)
        except BaseException:
            self.stop()
            raise
        self.spec = self._state().spec
        return self

    def _wait_for_word(self, keeper: subprocess.Popen[str]) -> None:
        assert keeper.stdout is not None
        with keeper.stdout as stdout:
            line = stdout.readline()
        if not line:
            raise ClusterError("the cluster's keeper ended without a word")
        if error := json.loads(line).get("error"):
            raise ClusterError(error)

    def stop(self) -> None:
        """End everything in it and remove its directory; harmless when it has ended."""
        if self._keeper is None:
            self._order_if_running("stop")
        else:
            self._keeper.send_signal(signal.SIGTERM)
            try:
                self._keeper.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
            self._keeper = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------ use

    @property
    def nodes(self) -> list[str]:
        """Their names in Slurm."""
        return self.spec.node_names

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        host: str = "login",
        *,
        check: bool = True,
        timeout: float = 60.0,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, and hand back what it printed.

        Args:
            command: With its arguments; no shell.
            host: `login`, `ctl` or a node's name.
            check: Whether a failure is a `CommandError`.
            timeout: Seconds until it is killed, with `subprocess.TimeoutExpired`.
            cwd: Where it starts; here when not told. All hosts see the same files.
            env: Variables on top of `environment()`.
            input: What it reads.
        """
        argv = [*self.enter(host, cwd), *(os.fspath(word) for word in command)]
        done = subprocess.run(
            argv,
            env={**self.environment(), **(env or {})},
            stdin=subprocess.DEVNULL if input is None else None,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        done.args = [os.fspath(word) for word in command]
        if check and done.returncode:
            raise CommandError(done, host)
        return done

    def enter(self, host: str = "login", cwd: str | Path | None = None) -> list[str]:
        """What to put before a command to run it on a host, for `Popen` and the like."""
        return enter(self._state(), host, cwd or Path.cwd())

    def environment(self) -> dict[str, str]:
        """For a command that is started on one of the hosts: ours, and SLURM_CONF."""
        return environment(self.files)

    def outside(self) -> dict[str, str]:
        """Two variables with which this very process can call sbatch, squeue and the others.

        PATH begins with a folder where those commands are that run on the login host.
        """
        path = os.environ.get("PATH", "")
        return {"SLURM_CONF": str(self.files.slurm_conf), "PATH": f"{self.files.bin}:{path}"}

    # ------------------------------------------------------------------ look

    def node_states(self) -> dict[str, str]:
        """As sinfo tells, without its marks: idle, alloc, mixed, down, …; * for silent ones."""
        out = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]).stdout
        return {name: state for name, state in map(str.split, out.splitlines())}

    def wait_node(self, node: str, states: Iterable[str], timeout_s: float = 180.0) -> str:
        """Until it is in one of these states (`down` is also `down*`, the same and silent)."""
        wanted = set(states)

        def there() -> str | None:
            state = self.node_states()[node]
            return state if state.rstrip("*") in wanted else None

        what = f"node {node} to be {' or '.join(sorted(wanted))}"
        return wait_until(what, there, timeout_s, step_s=0.2)

    def wait_idle(self, timeout_s: float = 180.0) -> None:
        """Until every node is idle."""

        def idle() -> bool:
            return set(self.node_states().values()) == {"idle"}

        wait_until("all nodes to be idle", idle, timeout_s, step_s=0.2)

    def job(self, job_id: int | str) -> dict[str, str]:
        """All that `scontrol show job` tells of it: JobState, Reason, NodeList, Restarts, …"""
        out = self.run(["scontrol", "show", "job", str(job_id), "--oneliner"]).stdout
        return dict(pair.split("=", 1) for pair in out.split() if "=" in pair)

    def wait_job(self, job_id: int | str, states: Iterable[str], timeout_s: float = 180.0) -> str:
        """Until its JobState is one of these: RUNNING, COMPLETED, …"""
        wanted = set(states)

        def there() -> str | None:
            state = self.job(job_id)["JobState"]
            return state if state in wanted else None

        return wait_until(
            f"job {job_id} to be {' or '.join(sorted(wanted))}", there, timeout_s, 0.2
        )

    # ------------------------------------------------------------------ faults

    def power_off(self, node: str) -> None:
        """Pull its plug: its processes end, and its peers hear nothing."""
        self._order("power_off", node)

    def power_on(self, node: str) -> None:
        """Boot it again; Slurm has it back a second later."""
        self._order("power_on", node)

    def cut(self, node: str) -> None:
        """Pull its network cable: its processes go on, unheard."""
        self._order("cut", node)

    def heal(self, node: str) -> None:
        """Plug the cable in again; Slurm has the node back a second later."""
        self._order("heal", node)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL the node's daemon; its jobs go on."""
        self._order("kill_slurmd", node)

    def start_slurmd(self, node: str) -> None:
        """Start it again."""
        self._order("start_slurmd", node)

    def kill_ctl(self) -> None:
        """SIGKILL the controller; jobs go on, commands fail after 4 s.

        It forgets what it had not saved (state/job_state): up to 5 s.
        """
        self._order("kill_ctl")

    def start_ctl(self) -> None:
        """Start it again from its saved state."""
        self._order("start_ctl")

    def _state(self) -> State:
        return State.load(self.files)

    def _order_if_running(self, verb: str) -> None:
        with contextlib.suppress(ClusterError):
            keeper = self._state().keeper
            self._order(verb)
            wait_until("the cluster's end", lambda: not alive(keeper), _STOP_S)

    def _order(self, verb: str, node: str | None = None) -> None:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(60.0)
                connection.connect(str(self.files.control))
                with connection.makefile("rw") as stream:
                    stream.write(json.dumps({"verb": verb, "node": node}) + "\n")
                    stream.flush()
                    line = stream.readline()
        except (FileNotFoundError, ConnectionError):
            raise ClusterError(f"no cluster runs in {self.files.root}") from None
        if error := json.loads(line or "{}").get("error"):
            raise ClusterError(error)
