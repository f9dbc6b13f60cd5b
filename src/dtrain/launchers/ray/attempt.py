"""Run one attempt on a Ray cluster: an actor on each node, heartbeats both ways, and its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dtrain import ports
from dtrain.errors import LaunchError, first_line
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.ray import actor, package
from dtrain.launchers.ray.options import RayOptions
from dtrain.launchers.ray.placement import Placed, ResourceRequest
from dtrain.node.placement.ray import PlacementArgs
from dtrain.plainjson import to_json
from dtrain.run import events, failures, files, sync
from dtrain.run.backend_files import RayFiles
from dtrain.run.rundir import RunDir
from dtrain.run.sync import Change

_ANSWER_S = 120.0  # time for an actor's process to start, on a busy host
_BEAT_S = 1.0
_LEAVE_S = 10.0
_PACKAGES = ("dtrain.node", "torch")


@dataclass
class Outcome:
    codes: dict[int, int] = field(default_factory=dict)
    """The exit code of each node rank."""
    lost: dict[int, str] = field(default_factory=dict)
    """For each node rank without an exit code, the reason."""

    @property
    def code(self) -> int:
        return max([*self.codes.values(), *([1] if self.lost else [])])


class NodeLost(Exception):
    """An error for a node that did not answer while the attempt was starting."""

    def __init__(self, node_rank: int, why: str) -> None:
        super().__init__(why)
        self.node_rank = node_rank


class ActorGroup:
    """The actors of one attempt, sorted by node rank, that is, by the addresses of the nodes."""

    def __init__(self, plan: LaunchPlan, attempt: int, placed: Placed) -> None:
        self._plan = plan
        self._attempt = attempt
        self._options = RayOptions.of(plan.options)
        where = placement_group_table(placed.group)["bundles_to_node_id"]
        views = {node.id: node for node in placed.nodes}
        order = list(views)
        bundles = sorted(where, key=lambda bundle: order.index(where[bundle]))
        self.views = [views[where[bundle]] for bundle in bundles]
        self.names = [view.name for view in self.views]
        self.actors = [_start_actor(plan, placed, bundle) for bundle in bundles]

    def begin(self) -> None:
        """Check that every node can train, and start its process.

        Raises:
            LaunchError: a node cannot train; the message names it and the reason.
            NodeLost: a node was lost meanwhile.
        """
        probe = RayFiles(self._plan.run).probe(self._attempt)
        files.make_parent(probe / "driver")
        (probe / "driver").touch()
        wish = {
            "python": self._options.python,
            "packages": list(_PACKAGES),
            "probe": "" if self._plan.run_url else str(probe),
            "url": self._plan.run_url.rpartition("/")[0],
            "env": package.node_variables(self._plan) if self._plan.run_url else {},
        }
        looks = self._ask({k: each.look.remote(wish) for k, each in enumerate(self.actors)})
        problems = _problems(self._plan, self.names, list(looks.values()), probe)
        if problems:
            raise LaunchError(problems, code="ray.node-unsuitable")
        host, port = self._rendezvous()
        placement_args = PlacementArgs(self._attempt, tuple(self.names), host, port)
        events.note_event(
            self._plan.run, "attempt_started", attempt=self._attempt, nodes=self.names
        )
        folders = self._settled()
        started = {r: self._start(r, look, folders[r], placement_args) for r, look in looks.items()}
        self._ask(started)

    def watch(self, stops: Callable[[], int], troubled: Callable[[], bool]) -> Outcome:
        """Follow all nodes to their end.

        Args:
            stops: returns the number of stop requests. The first one is clean, the second one is
                immediate.
            troubled: returns whether the cluster itself is lost.
        """
        watch = _Watch(self, self._plan.stop_timeout_s + 5, self._options.lost_after)
        return watch.run(stops, troubled)

    def take_changes(self, changes: list[Change]) -> None:
        """Copy changes from a node with a local run directory into the driver's run directory."""
        run = self._plan.run
        for change in changes:
            if Path(change["name"]).parent.name == run.failures(0).name:
                change["bytes"] = failures.with_log_in(run, change["bytes"])
        sync.apply_changes(run.path, changes, append_lines=True)

    def record_lost(self, outcome: Outcome) -> None:
        """Write a failure record for every node that was lost."""
        procs = self._plan.procs_per_node
        for rank, why in outcome.lost.items():
            first, last = rank * procs, (rank + 1) * procs - 1
            ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
            failures.record_node(
                self._plan.run,
                self._attempt,
                f"the node was lost, and with it {ranks}: {why}",
                kind="node_lost",
                node_rank=rank,
                node=self.names[rank],
                log=self._plan.run.agent_log(self._attempt, rank),
            )

    def record_silent(self, outcome: Outcome) -> None:
        """Write a record of the first node that failed, if no node has written one."""
        run = self._plan.run
        failed = [rank for rank, code in sorted(outcome.codes.items()) if code != 0]
        if not failed or failures.read_all(run, self._attempt):
            return
        rank, code = failed[0], outcome.codes[failed[0]]
        log = run.host_log(self._attempt, rank)
        how = f"the node process {failures.describe_exit(code)}"
        failures.record_node(
            run,
            self._attempt,
            f"{how}: {files.last_line(log) or 'no word'}",
            exit_code=code,
            node_rank=rank,
            node=self.names[rank],
            log=log,
        )

    def end(self) -> None:
        """Kill the actors, together with the processes that they started."""
        if self._plan.run_url:
            left = [each.leave.remote() for each in self.actors]
            ray.wait(left, num_returns=len(left), timeout=_LEAVE_S)
        for each in self.actors:
            ray.kill(each)

    def _rendezvous(self) -> tuple[str, int]:
        """Open the port on node 0. Return its address and port."""
        alone = len(self.actors) == 1
        host = "127.0.0.1" if alone else self.views[0].address
        key = f"{self._plan.run_id}/{self._attempt}"
        candidates = list(islice(ports.candidates(key), 64))
        for address in (host, ""):  # Ray may know the node by an address that is not its own
            port = self._ask({0: self.actors[0].listen.remote(address, candidates)})[0]
            if port:
                break
        else:
            raise LaunchError(
                f"no free port on {self.names[0]} among {len(candidates)} tried",
                code="launch.no-free-port",
            )
        return host, int(port)

    def _settled(self) -> dict[int, RunDir]:
        """Return each node's run directory: the shared one, or one that is created on the node."""
        if not self._plan.run_url:
            return dict.fromkeys(range(len(self.actors)), self._plan.run)
        data = ray.put(package.for_node(self._plan, self._attempt))
        made = {k: a.settle.remote(self._plan.run_id, data) for k, a in enumerate(self.actors)}
        return {rank: RunDir(path) for rank, path in self._ask(made).items()}

    def _start(
        self, rank: int, look: dict[str, Any], run: RunDir, placement_args: PlacementArgs
    ) -> Any:
        argv = [look["python"], "-P", "-m", "dtrain.node", str(run.path), "--node-rank", str(rank)]
        argv += ["--placement", "ray", "--placement-args", to_json(asdict(placement_args))]
        log = run.host_log(self._attempt, rank)
        lost_after = self._options.lost_after
        return self.actors[rank].start.remote(argv, os.getcwd(), str(log), lost_after)

    def _ask(self, refs: dict[int, Any]) -> dict[int, Any]:
        found = {}
        deadline = time.monotonic() + _ANSWER_S
        for rank, ref in refs.items():
            try:
                found[rank] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
            except GetTimeoutError:
                raise NodeLost(rank, f"no answer for {_ANSWER_S:.0f} s") from None
            except RayError as error:
                raise NodeLost(rank, first_line(error)) from None
        return found


class _Watch:
    """A watcher that exchanges heartbeats with every node until all have ended."""

    def __init__(self, group: ActorGroup, grace_s: float, lost_after_s: float) -> None:
        """Prepare.

        Args:
            group: the actors to watch.
            grace_s: the time that nodes have to exit after one has failed or all are asked to stop.
            lost_after_s: the time without a heartbeat after which a node is lost.
        """
        self._group = group
        self._actors = group.actors
        self._outcome = Outcome()
        self._lost_after_s = lost_after_s
        self._grace_s = grace_s
        self._beats: dict[Any, int] = {}
        self._good = dict.fromkeys(range(len(self._actors)), time.monotonic())
        self._asked = 0
        self._deadline = float("inf")

    def run(self, stops: Callable[[], int], troubled: Callable[[], bool]) -> Outcome:
        for rank in range(len(self._actors)):
            self._send(rank)
        while len(self._outcome.codes) + len(self._outcome.lost) < len(self._actors):
            waiting = [ref for ref, rank in self._beats.items() if rank not in self._outcome.lost]
            ready, _ = ray.wait(waiting, timeout=0.1) if waiting else ([], [])
            for ref in ready:
                self._hear(self._beats.pop(ref), ref)
            self._give_up_on_the_silent()
            self._pass_on(stops())
            if troubled():
                self._kill()
                return self._outcome
            if time.monotonic() > self._deadline:
                self._kill()
        return self._outcome

    def _send(self, rank: int) -> None:
        self._beats[self._actors[rank].beat.remote(_BEAT_S)] = rank

    def _hear(self, rank: int, ref: Any) -> None:
        try:
            code, changes = ray.get(ref)
        except ActorUnavailableError as error:
            if self._group.views[rank].answers():
                time.sleep(0.1)  # Ray reports the actor's end next; do not ask in a tight loop
                self._send(rank)
            else:
                self._lose(rank, f"its raylet is gone ({first_line(error)})")
        except RayError as error:
            gone = not self._group.views[rank].answers()
            why = "its raylet is gone" if gone else "its actor was killed"
            self._lose(rank, f"{why} ({first_line(error)})")
        else:
            self._good[rank] = time.monotonic()
            self._group.take_changes(changes)
            if code is None:
                self._send(rank)
                return
            self._outcome.codes[rank] = code
            if code != 0:  # the agents ask one another to end, and most have
                self._deadline = min(self._deadline, time.monotonic() + self._grace_s)

    def _give_up_on_the_silent(self) -> None:
        """Mark silent nodes as lost, for example after a cut cable. They have ended their workers
        by now."""
        limit = time.monotonic() - self._lost_after_s - 2 * _BEAT_S
        for rank in set(self._beats.values()) - set(self._outcome.lost):
            if self._good[rank] < limit:
                self._lose(rank, f"no word from it for {self._lost_after_s + 2 * _BEAT_S:.0f} s")

    def _lose(self, rank: int, why: str) -> None:
        self._outcome.lost[rank] = why
        self._kill()  # the work of the others is lost; end it early to restart early

    def _pass_on(self, asked: int) -> None:
        if asked > self._asked == 0:
            self._asked = asked
            self._deadline = min(self._deadline, time.monotonic() + self._grace_s)
            self._signal(signal.SIGTERM)
        elif asked > max(1, self._asked):
            self._asked = asked
            self._kill()

    def _kill(self) -> None:
        self._deadline = time.monotonic() + 5
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for rank, each in enumerate(self._actors):
            if rank not in self._outcome.codes and rank not in self._outcome.lost:
                each.signal.remote(int(number))


def _start_actor(plan: LaunchPlan, placed: Placed, bundle: int) -> Any:
    each = dict(ResourceRequest.of(plan).each)
    cloudpickle.register_pickle_by_value(sync)
    cloudpickle.register_pickle_by_value(actor)
    return (
        ray.remote(actor.NodeActor)
        .options(
            num_cpus=each.pop("CPU"),
            num_gpus=each.pop("GPU", 0),
            memory=each.pop("memory", None),
            resources=each or None,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placed.group, placement_group_bundle_index=bundle
            ),
        )
        .remote()
    )


def _problems(
    plan: LaunchPlan, names: Sequence[str], looks: Sequence[dict[str, Any]], probe: Path
) -> str:
    """Return the reasons why these nodes cannot train; empty when they can."""
    from dtrain import __version__

    lines = []
    for name, look in zip(names, looks, strict=True):
        missing = [package for package, found in look["versions"].items() if found is None]
        if look["trouble"]:
            lines.append(f"{name}: {look['trouble']}")
        elif missing:
            lines.append(f"{name}: {look['python']} has no {' and no '.join(missing)}")
        elif look["versions"]["dtrain"] != __version__:
            lines.append(f"{name} has dtrain {look['versions']['dtrain']}, here is {__version__}")
    if lines:
        return _listed("nodes cannot train", lines, "install it there, or say which python has it")
    if len(set(torches := [look["versions"]["torch"] for look in looks])) > 1:
        lines = [f"{name} has torch {torch}" for name, torch in zip(names, torches, strict=True)]
        return _listed("the nodes have different versions of torch", lines, "make them alike")
    seen = os.listdir(probe)
    if plan.run_url:
        return ""
    blind = [name for name, look in zip(names, looks, strict=True) if look["sees_run"] not in seen]
    if blind:
        return _listed(
            f"nodes do not share the run directory {plan.run_dir}",
            [f"{name} does not see it" for name in blind],
            "say with --runs DIR which directory all nodes and this host share",
        )
    return ""


def _listed(what: str, lines: Sequence[str], advice: str) -> str:
    return "\n  ".join([f"{what}; {advice}", *lines])
