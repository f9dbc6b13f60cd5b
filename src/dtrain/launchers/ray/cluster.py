"""`python -P -m dtrain.launchers.ray.cluster`: the nodes of a Ray cluster, for `dtrain doctor`.

`check` starts it, because only a process of its own imports Ray. It reads the address from its
arguments and prints the result as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dtrain import catalog, ports
from dtrain.codes import CODES
from dtrain.doctor.diagnosis import OK, PROBLEM, WARNING, Diagnosis
from dtrain.environ import inherited_env
from dtrain.errors import DtrainError
from dtrain.launch_plan import LaunchPlan
from dtrain.launchers.ray import driver, job
from dtrain.launchers.ray.options import RayOptions
from dtrain.launchers.ray.placement import NodeView, ResourceRequest, cluster_nodes, shortage
from dtrain.procs import die_with_parent
from dtrain.words import counted

_ANSWER_S = 60


def check(plan: LaunchPlan) -> Diagnosis:
    """Return whether the cluster answers and has what a plan asks for."""
    options = RayOptions.of(plan.options)
    if missing := catalog.problem_of("launcher", "ray"):
        return Diagnosis("ray", PROBLEM, missing, "pip install 'dtrain[ray]'")
    if options.address is None:
        return Diagnosis("ray", OK, "each launch starts a cluster on this machine")
    try:
        if options.submit == "job":
            job.client(options)
            return Diagnosis("ray", OK, f"the dashboard at {job.url(options)} takes jobs")
        nodes = nodes_of(options.address)
    except DtrainError as error:
        entry = CODES.get(error.code)
        remedy = entry.remedy if entry else ""
        return Diagnosis("ray", PROBLEM, str(error), remedy, error.code)
    request = ResourceRequest.of(plan)
    able = [sum(not node.lacks(request, now=now) for node in nodes) for now in (False, True)]
    fact = f"{counted(len(nodes), 'node')} at {options.address}; asked for: {request}"
    if able[0] < request.min_nodes and not options.autoscale:
        remedy = "ask for less with --nodes, --procs or --gpus, or add nodes: ray start --address"
        return Diagnosis("ray", PROBLEM, shortage(request, nodes), remedy)
    if able[1] < request.min_nodes:
        return Diagnosis("ray", WARNING, f"{fact}; they are in use, so it waits", "ray status")
    return Diagnosis("ray", OK, fact)


def most_at_once(plan: LaunchPlan, nodes: Sequence[NodeView], runs: int) -> int:
    """Return how many of `runs` runs like a plan the whole cluster has place for; 0 for none.

    Each run needs its nodes on different nodes of the cluster.
    """
    request = ResourceRequest.of(plan)
    able = [node for node in nodes if not node.lacks(request, now=False)]
    needs = {name: need for name, need in request.per_node.items() if need}
    places = [min(int(node.total[name] / need) for name, need in needs.items()) for node in able]
    fitting = (
        count
        for count in range(runs, 0, -1)
        if sum(min(place, count) for place in places) >= count * request.min_nodes
    )
    return next(fitting, 0)


def nodes_of(address: str) -> list[NodeView]:
    """Return the nodes of a cluster that answer. Ray lists a dead one for a while.

    Raises:
        DtrainError: it does not answer, or refuses the connection.
    """
    if address != "auto":
        driver.check_listening(address)
    command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), address]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, env=inherited_env(),
            check=False,
        )  # fmt: skip
        answer = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise driver.connection_error(address, error) from None
    if "error" in answer:
        raise DtrainError(answer["error"], code=answer["code"])
    nodes = [NodeView(**each) for each in answer["nodes"]]
    return [node for node in nodes if node.answers()]


def found_address() -> str | None:
    """Return RAY_ADDRESS, or the address of the head that `ray start` has started on this host.

    Ray keeps that address in a file, which stays there after the end of the head.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given and given != "auto":
        return given
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        written = Path(temporary, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    return written if ports.is_listening(written) else None


def main() -> None:
    """Print the nodes of the cluster at the address that is the second argument."""
    parent, address = sys.argv[1:]
    die_with_parent(int(parent))
    import ray

    try:
        ray.init(address=address, namespace="dtrain", log_to_driver=False, logging_level="ERROR")
        print(json.dumps({"nodes": [asdict(node) for node in cluster_nodes()]}))
    except Exception as error:
        found = driver.connection_error(address, error)
        print(json.dumps({"error": str(found), "code": found.code}))


if __name__ == "__main__":
    main()
