"""`dtrain launch --preflight`: the nodes check themselves and one another before workers start.

Each node makes the checks of its host and sends a report to the head. The head then connects to
each of the others, which also tells it their clocks, and looks for the log that each has opened in
the run's directory. One line per check is noted as an event. If there is a problem, the launch ends
with a record that names the node and the remedy.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from dtrain import checked, ports
from dtrain.doctor import checks, versions
from dtrain.doctor.asked import Asked
from dtrain.doctor.compared import Merged, NodeReport, Reached, merge
from dtrain.doctor.diagnosis import OK, PROBLEM, Diagnosis
from dtrain.doctor.network import name_not_known, name_of, resolve, slow_names
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import LaunchPlan
from dtrain.node import store as stores
from dtrain.node.rendezvous import NodeRendezvous
from dtrain.node.store import PeerFailed
from dtrain.plainjson import to_json
from dtrain.run import events, failures
from dtrain.waiting import poll
from dtrain.words import few

log = logging.getLogger(__name__)

_HEAD, _REPORT, _DECISION, _HEARD = (
    f"preflight/{key}" for key in ("head", "report/{}", "decision", "heard")
)
"""Keys of the store of a round."""
_ANSWER_S = 30.0
_DECIDED_S = 90.0
_AT_ONCE = 32
_MOST_SHOWN = 4
_CONNECT_S = 3.0
_SEEN_S = 2.0
"""The time in which the head must see a file of another node: directories are cached by NFS."""
_HEARD_S = 5.0


def run_preflight(plan: LaunchPlan, node_rank: int, rendezvous: NodeRendezvous) -> None:
    """Check this node and, on the head, all nodes.

    Raises:
        PeerFailed: a node has a problem. The failure record names it.
    """
    if node_rank == 0:
        _lead(plan, rendezvous)
        return
    address = ports.address_towards(plan.rdzv_host, plan.rdzv_port)
    with ports.listen(address, 0) as listener:
        _take_part(plan, node_rank, rendezvous, listener)


def _report(plan: LaunchPlan) -> NodeReport:
    """Make the checks of this node."""
    spec = JobSpec.model_validate(yaml.safe_load(plan.run.resolved.read_text(encoding="utf-8")))
    folder = Path(plan.code_dir or plan.job_dir)
    found = [*checks.run_checks(checks.HOST_CHECKS, Asked.of(plan, spec))]
    if spec.data.paths:
        found.append(checks.data(spec, Path(plan.job_dir)))
    found.append(checks.imports(spec, folder))
    code = {"dtrain": versions.own_fingerprint(), "the job": versions.fingerprint(folder)}
    found.append(Diagnosis("code", OK, ", ".join(f"{of}: {text}" for of, text in code.items())))
    return NodeReport(
        node=failures.node_name(),
        host=socket.gethostname(),
        diagnoses=found,
        versions={**versions.installed(), **{f"code of {of}": text for of, text in code.items()}},
    )


# -- the other nodes ---------------------------------------------------------------------------


def _take_part(
    plan: LaunchPlan, node_rank: int, rendezvous: NodeRendezvous, listener: socket.socket
) -> None:
    """Send the report of this node, and answer the head until it has decided."""
    report = _report(plan)
    head = poll(lambda: rendezvous.ask([_HEAD])[0], _ANSWER_S)
    if head is not None and not (answer := resolve(head)).is_known:
        report.diagnoses.append(name_not_known(report.host, head, answer))
    address, port = listener.getsockname()[:2]
    nonce = secrets.token_hex(8)
    report = replace(report, address=address, port=port, nonce=nonce)
    rendezvous.tell(_REPORT.format(node_rank), to_json(asdict(report)))
    listener.settimeout(stores.wait_s(plan.nodes))
    deadline = time.monotonic() + _DECIDED_S
    while (decision := rendezvous.ask([_DECISION])[0]) is None:
        if time.monotonic() > deadline:
            raise PeerFailed(f"the head has not ended the preflight within {_DECIDED_S:.0f} s")
        with contextlib.suppress(OSError):  # no connection yet, or not one of the head
            connection, _ = listener.accept()
            with connection:
                connection.sendall(f"{nonce} {time.time():.6f}\n".encode())
    if decision:
        rendezvous.add(_HEARD)
        raise PeerFailed.from_json(decision)


# -- the head ------------------------------------------------------------------------------------


def _lead(plan: LaunchPlan, rendezvous: NodeRendezvous) -> None:
    """Gather the reports, look at each of the other nodes, and decide for all."""
    began = time.monotonic()
    rendezvous.tell(_HEAD, socket.gethostname())
    reports = {0: _report(plan)}
    ranks = [member.node_rank for member in rendezvous.members]
    _gather(rendezvous, ranks, reports)
    others = [rank for rank in reports if rank != 0]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda rank: _reach(plan, rank, reports[rank]), others)
        reached = dict(zip(others, found, strict=True))
    names = {rank: _name(plan, rank, reports) for rank in ranks}
    merged = merge(reports, reached, names)
    for line in merged:
        events.note_event(plan.run, "preflight", **asdict(line.diagnosis))
    log.info("preflight: %d checks in %.1f s", len(merged), time.monotonic() - began)
    failed = _failure(plan, merged, names)
    rendezvous.tell(_DECISION, "" if failed is None else failed.to_json())
    if failed is not None:  # the head ends last, because the others read its store
        poll(lambda: rendezvous.add(_HEARD, 0) >= len(others), _HEARD_S)
        raise failed


def _gather(rendezvous: NodeRendezvous, ranks: list[int], reports: dict[int, NodeReport]) -> None:
    """Add the reports of the other nodes, as far as they come in time."""

    def come() -> bool:
        missing = [rank for rank in ranks if rank not in reports]
        texts = rendezvous.ask([_REPORT.format(rank) for rank in missing])
        for rank, text in zip(missing, texts, strict=True):
            if text is not None:
                reports[rank] = _parsed(text)
        return len(reports) == len(ranks)

    poll(come, _ANSWER_S, stores.wait_s(len(ranks)))


def _parsed(text: str) -> NodeReport:
    try:
        return checked.read(NodeReport, text)
    except ValueError as error:
        raise PeerFailed(f"the report of another node is not valid: {error}") from error


def _name(plan: LaunchPlan, rank: int, reports: Mapping[int, NodeReport]) -> str:
    return reports[rank].node if rank in reports else plan.node_names[rank]


def _reach(plan: LaunchPlan, rank: int, other: NodeReport) -> Reached:
    """Connect to another node, read its clock, and look for its log in the run's directory."""
    error, ahead_s, within_s = "", 0.0, 0.0
    try:
        ahead_s, within_s = _clock_of(other)
    except (OSError, ValueError) as failure:
        error = f"{other.address}:{other.port}: {failure}"
    seen = None
    if not plan.run_url:
        seen = poll(plan.run.agent_log(plan.attempt, rank).exists, _SEEN_S)
    return Reached(error, ahead_s, within_s, seen, _names(other))


def _names(other: NodeReport) -> Diagnosis | None:
    """Return what is wrong with the name of a node, as the head sees it. None if nothing is."""
    own, forward, back = socket.gethostname(), resolve(other.host), name_of(other.address)
    if not forward.is_known:
        return name_not_known(own, other.host, forward)
    return slow_names(own, forward, back)


def _clock_of(other: NodeReport) -> tuple[float, float]:
    """Return how far the clock of a node is ahead of this one's, and the error of that.

    Raises:
        OSError: it cannot be reached.
        ValueError: something else answers at its address.
    """
    with socket.create_connection((other.address, other.port), _CONNECT_S) as connection:
        connection.settimeout(_CONNECT_S)
        sent = time.time()
        nonce, _, its_time = connection.makefile("r").readline(100).partition(" ")
        received = time.time()
    if nonce != other.nonce:
        raise ValueError("another host or program answers at this address")
    return float(its_time) - (sent + received) / 2, (received - sent) / 2


def _failure(
    plan: LaunchPlan, merged: Sequence[Merged], names: Mapping[int, str]
) -> PeerFailed | None:
    """Return the end of a launch with a problem. The first is the cause, and names its node."""
    problems = [
        (rank, found)
        for line in merged
        for rank, found in line.nodes.items()
        if found.status == PROBLEM
    ]
    if not problems:
        return None
    rank, first = problems[0]
    others = [(names[other], each) for other, each in problems[1:]]
    same = [name for name, each in others if each == first]
    also = [f"also on {few(same)}"] if same else []
    also += [f"{name}: {each.check}: {each.fact}" for name, each in others if each != first]
    record = failures.of_node(
        "\n".join([f"{first.check}: {first.fact}", *also[:_MOST_SHOWN]]),
        node_rank=rank,
        node=names[rank],
        restart=0,
        log=plan.run.agent_log(plan.attempt, rank),
        hint=first.remedy,
        code=first.code,
    )
    return PeerFailed(f"the preflight found a problem on {names[rank]}: {first.fact}", record)
