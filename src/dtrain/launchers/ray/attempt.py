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

_CALL_TIMEOUT_S = 120.0  # time for an actor's process to start, on a busy host
_HEARTBEAT_S = 1.0
_CLEAN_UP_S = 10.0
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
        request = {
            "python": self._options.python,
            "packages": list(_PACKAGES),
            "probe": "" if self._plan.run_url else str(probe),
            "url": self._plan.run_url.rpartition("/")[0],
            "env": package.node_variables(self._plan) if self._plan.run_url else {},
        }
        reports = self._get_all([each.inspect.remote(request) for each in self.actors])
        problems = _problems(self._plan, self.names, reports, probe)
        if problems:
            raise LaunchError(problems, code="ray.node-unsuitable")
        host, port = self._rendezvous()
        placement_args = PlacementArgs(self._attempt, tuple(self.names), host, port)
        events.note_event(
            self._plan.run, "attempt_started", attempt=self._attempt, nodes=self.names
        )
        run_dirs = self._run_dirs()
        started = [
            self._start(rank, report["python"], run_dirs[rank], placement_args)
            for rank, report in enumerate(reports)
        ]
        self._get_all(started)

    def watch(self, stops: Callable[[], int], is_cluster_lost: Callable[[], bool]) -> Outcome:
        """Follow all nodes to their end.

        Args:
            stops: returns the number of stop requests. The first one is clean, the second one is
                immediate.
            is_cluster_lost: returns whether the cluster itself is lost.
        """
        watch = _Watch(self, self._plan.stop_timeout_s + 5, self._options.lost_after)
        return watch.run(stops, is_cluster_lost)

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

    def record_unexplained(self, outcome: Outcome) -> None:
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
            f"{how}: {files.last_line(log) or 'it has written no output'}",
            exit_code=code,
            node_rank=rank,
            node=self.names[rank],
            log=log,
        )

    def end(self) -> None:
        """Kill the actors, together with the processes that they started."""
        if self._plan.run_url:
            removed = [each.remove_run_dir.remote() for each in self.actors]
            ray.wait(removed, num_returns=len(removed), timeout=_CLEAN_UP_S)
        for each in self.actors:
            ray.kill(each)

    def _rendezvous(self) -> tuple[str, int]:
        """Open the port on node 0. Return its address and port."""
        host = "127.0.0.1" if len(self.actors) == 1 else self.views[0].address
        key = f"{self._plan.run_id}/{self._attempt}"
        candidates = list(islice(ports.candidates(key), 64))
        for address in (host, ""):  # Ray may know the node by an address that is not its own
            (port,) = self._get_all([self.actors[0].listen.remote(address, candidates)])
            if port:
                break
        else:
            raise LaunchError(
                f"no free port on {self.names[0]} among {len(candidates)} tried",
                code="launch.no-free-port",
            )
        return host, int(port)

    def _run_dirs(self) -> list[RunDir]:
        """Return each node's run directory: the shared one, or one that is created on the node."""
        if not self._plan.run_url:
            return [self._plan.run] * len(self.actors)
        data = ray.put(package.for_node(self._plan, self._attempt))
        created = [each.create_run_dir.remote(self._plan.run_id, data) for each in self.actors]
        return [RunDir(path) for path in self._get_all(created)]

    def _start(self, rank: int, python: str, run: RunDir, placement_args: PlacementArgs) -> Any:
        argv = [python, "-P", "-m", "dtrain.node", str(run.path), "--node-rank", str(rank)]
        argv += ["--placement", "ray", "--placement-args", to_json(asdict(placement_args))]
        log = run.host_log(self._attempt, rank)
        lost_after = self._options.lost_after
        return self.actors[rank].start.remote(argv, os.getcwd(), str(log), lost_after)

    def _get_all(self, refs: Sequence[Any]) -> list[Any]:
        """Return the actors' answers; the first one is that of node 0."""
        found = []
        deadline = time.monotonic() + _CALL_TIMEOUT_S
        for rank, ref in enumerate(refs):
            try:
                found.append(ray.get(ref, timeout=max(0.1, deadline - time.monotonic())))
            except GetTimeoutError:
                raise NodeLost(rank, f"no answer for {_CALL_TIMEOUT_S:.0f} s") from None
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
        self._pending: dict[Any, int] = {}
        self._answered_at = dict.fromkeys(range(len(self._actors)), time.monotonic())
        self._forwarded = 0
        self._deadline = float("inf")

    def run(self, stops: Callable[[], int], is_cluster_lost: Callable[[], bool]) -> Outcome:
        for rank in range(len(self._actors)):
            self._send(rank)
        while len(self._outcome.codes) + len(self._outcome.lost) < len(self._actors):
            waiting = [ref for ref, rank in self._pending.items() if rank not in self._outcome.lost]
            ready, _ = ray.wait(waiting, timeout=0.1) if waiting else ([], [])
            for ref in ready:
                self._receive(self._pending.pop(ref), ref)
            self._mark_silent_as_lost()
            self._forward(stops())
            if is_cluster_lost():
                self._kill()
                return self._outcome
            if time.monotonic() > self._deadline:
                self._kill()
        return self._outcome

    def _send(self, rank: int) -> None:
        self._pending[self._actors[rank].heartbeat.remote(_HEARTBEAT_S)] = rank

    def _receive(self, rank: int, ref: Any) -> None:
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
            self._answered_at[rank] = time.monotonic()
            self._group.take_changes(changes)
            if code is None:
                self._send(rank)
                return
            self._outcome.codes[rank] = code
            if code != 0:  # the agents ask one another to end, and most have
                self._deadline = min(self._deadline, time.monotonic() + self._grace_s)

    def _mark_silent_as_lost(self) -> None:
        """Mark silent nodes as lost, for example after a cut cable. They have ended their workers
        by now."""
        limit = time.monotonic() - self._lost_after_s - 2 * _HEARTBEAT_S
        for rank in set(self._pending.values()) - set(self._outcome.lost):
            if self._answered_at[rank] < limit:
                self._lose(rank, f"no heartbeat for {self._lost_after_s + 2 * _HEARTBEAT_S:.0f} s")

    def _lose(self, rank: int, why: str) -> None:
        self._outcome.lost[rank] = why
        self._kill()  # the work of the others is lost; end it early to restart early

    def _forward(self, stops: int) -> None:
        if stops > self._forwarded == 0:
            self._forwarded = stops
            self._deadline = min(self._deadline, time.monotonic() + self._grace_s)
            self._signal(signal.SIGTERM)
        elif stops > max(1, self._forwarded):
            self._forwarded = stops
            self._kill()

    def _kill(self) -> None:
        self._deadline = time.monotonic() + 5
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for rank, each in enumerate(self._actors):
            if rank not in self._outcome.codes and rank not in self._outcome.lost:
                each.signal.remote(int(number))


def _start_actor(plan: LaunchPlan, placed: Placed, bundle: int) -> Any:
    resources = dict(ResourceRequest.of(plan).per_node)
    cloudpickle.register_pickle_by_value(sync)
    cloudpickle.register_pickle_by_value(actor)
    return (
        ray.remote(actor.NodeActor)
        .options(
            num_cpus=resources.pop("CPU"),
            num_gpus=resources.pop("GPU", 0),
            memory=resources.pop("memory", None),
            resources=resources or None,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placed.group, placement_group_bundle_index=bundle
            ),
        )
        .remote()
    )


def _problems(
    plan: LaunchPlan, names: Sequence[str], reports: Sequence[dict[str, Any]], probe: Path
) -> str:
    """Return the reasons why these nodes cannot train; empty when they can."""
    from dtrain import __version__

    lines = []
    for name, report in zip(names, reports, strict=True):
        versions = report["versions"]
        missing = [package for package, found in versions.items() if found is None]
        if report["error"]:
            lines.append(f"{name}: {report['error']}")
        elif missing:
            lines.append(f"{name}: {report['python']} has no {' and no '.join(missing)}")
        elif versions["dtrain"] != __version__:
            lines.append(f"{name} has dtrain {versions['dtrain']}, this host has {__version__}")
    if lines:
        advice = "install it there, or set option python to an interpreter that has it"
        return _listed("nodes cannot train", lines, advice)
    if len(set(torches := [report["versions"]["torch"] for report in reports])) > 1:
        lines = [f"{name} has torch {torch}" for name, torch in zip(names, torches, strict=True)]
        advice = "install the same version on all nodes"
        return _listed("the nodes have different versions of torch", lines, advice)
    seen = os.listdir(probe)
    if plan.run_url:
        return ""
    unshared = [
        name
        for name, report in zip(names, reports, strict=True)
        if report["probe_file"] not in seen
    ]
    if unshared:
        return _listed(
            f"nodes do not share the run directory {plan.run_dir}",
            [f"{name} does not see it" for name in unshared],
            "use --runs DIR with a directory that all nodes and this host share",
        )
    return ""


def _listed(what: str, lines: Sequence[str], advice: str) -> str:
    return "\n  ".join([f"{what}; {advice}", *lines])
