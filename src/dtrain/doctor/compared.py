"""Compares what the nodes of a launch have found, and finds out which node is different."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dtrain import checked
from dtrain.doctor.diagnosis import CHECK_CODES, OK, PROBLEM, SEVERITY, WARNING, Diagnosis, Status
from dtrain.doctor.network import open_ports
from dtrain.words import few

WRONG_CLOCK_S, LATE_CLOCK_S = 60.0, 1.0
"""Seconds between clocks. The verdict orders failures by the clocks of their nodes. Munge, which
authenticates Slurm's messages, and S3 refuse messages that are minutes old."""

_MOST_BAD, _MOST_OK = 4, 2
"""The most different facts that a line shows."""


@dataclass(frozen=True)
class NodeReport:
    """What one node found, and what the head found about it."""

    __pydantic_config__ = checked.CONFIG

    node: checked.Name
    """Its name in the launch."""
    host: checked.Name
    """Its own name."""
    diagnoses: list[Diagnosis]
    versions: dict[str, checked.Text]
    """What all nodes must have in common."""
    address: checked.Name = ""
    """Where it waits for the head's connection."""
    port: checked.Port | None = None
    nonce: checked.Name = ""
    """The text with which it answers there."""


@dataclass(frozen=True)
class Reached:
    """What the head found about another node."""

    error: str = ""
    """Why it cannot be reached; empty if it can."""
    ahead_s: float = 0.0
    """How far its clock is ahead of the head's."""
    within_s: float = 0.0
    """The error of that measurement."""
    shares_directory: bool | None = None
    """Whether the head sees its file in the run's directory. None if it need not."""
    name: Diagnosis | None = None
    """What is wrong with its name on the head; None if nothing is."""


@dataclass(frozen=True)
class Merged:
    """What a check found on all nodes: one line, and the nodes that have a problem."""

    diagnosis: Diagnosis
    nodes: dict[int, Diagnosis] = field(default_factory=dict)
    """The findings that are not `ok`, by node rank."""


def merge(
    reports: Mapping[int, NodeReport], reached: Mapping[int, Reached], names: Mapping[int, str]
) -> list[Merged]:
    """Return one line for each check, in the order of `CHECK_CODES`.

    Args:
        reports: the reports of all nodes that answered.
        reached: what the head found about the others.
        names: the name of each node that takes part, by rank.
    """
    by_check: dict[str, dict[int, Diagnosis]] = {name: {} for name in CHECK_CODES}
    for rank, report in reports.items():
        for diagnosis in (*report.diagnoses, *_of_versions(rank, reports)):
            _keep_worst(by_check.setdefault(diagnosis.check, {}), rank, diagnosis)
    for rank, found in reached.items():
        for diagnosis in _of_reached(found):
            _keep_worst(by_check[diagnosis.check], rank, diagnosis)
    for rank in names:
        if rank not in reports:
            by_check["answer"][rank] = Diagnosis(
                "answer",
                PROBLEM,
                "has not answered its checks in time",
                "look at that host: a disk or a name server that hangs stops every process",
            )
    return [_line(found, names) for found in by_check.values() if found]


def _keep_worst(of_nodes: dict[int, Diagnosis], rank: int, new: Diagnosis) -> None:
    old = of_nodes.get(rank)
    if old is None or SEVERITY[new.status] > SEVERITY[old.status]:
        of_nodes[rank] = new


def _line(found: Mapping[int, Diagnosis], names: Mapping[int, str]) -> Merged:
    """Return one check's line. A fact that all nodes share is written once."""
    worst: Status = max((each.status for each in found.values()), key=SEVERITY.__getitem__)
    bad = {rank: each for rank, each in found.items() if each.status == worst != OK}
    first = next(iter((bad or found).values()))
    facts: dict[str, list[int]] = {}
    for rank, each in (bad or found).items():
        facts.setdefault(each.fact, []).append(rank)
    if len(facts) == 1 and len(bad or found) == len(names):
        text = first.fact if len(names) == 1 else f"{first.fact}; on all nodes"
    else:
        parts = [f"{_named(ranks, names)}: {fact}" for fact, ranks in facts.items()]
        most = _MOST_BAD if bad else _MOST_OK
        more = [f"and {len(parts) - most} more"] if len(parts) > most else []
        text = "\n".join([*parts[:most], *more])
    not_ok = {rank: each for rank, each in found.items() if each.status != OK}
    return Merged(replace(first, fact=text), not_ok)


def _named(ranks: Sequence[int], names: Mapping[int, str]) -> str:
    """Return names of nodes. Those of simulated nodes on one host may be the same."""
    same = Counter(names.values())
    return few(names[rank] if same[names[rank]] == 1 else f"node {rank}" for rank in ranks)


def _of_versions(rank: int, reports: Mapping[int, NodeReport]) -> Iterable[Diagnosis]:
    """Yield what a node has in another version than most nodes, or than the first of two halves."""
    own = reports[rank].versions
    for name, version in own.items():
        count = Counter(report.versions.get(name, "") for report in reports.values())
        usual = count.most_common(1)[0][0]
        if version == usual:
            continue
        if name == "Python" and version.rpartition(".")[0] == usual.rpartition(".")[0]:
            yield Diagnosis("versions", WARNING, _differs(name, version, usual), _SAME)
        elif name.startswith("code"):
            yield Diagnosis("code", PROBLEM, _differs(name, version, usual), _SAME_CODE)
        else:
            yield Diagnosis("versions", PROBLEM, _differs(name, version, usual), _SAME)


_SAME = "install the same there, or use one environment on a shared file system"
_SAME_CODE = "copy the code there, or keep it on a shared file system"


def _differs(name: str, version: str, usual: str) -> str:
    return f"{name} {version}, and {usual} on the other nodes"


def _of_reached(found: Reached) -> Iterable[Diagnosis]:
    """Yield the checks that need the head and another node."""
    if found.name is not None:
        yield found.name
    if found.error:
        fact = f"it reaches the head, but the head does not reach it: {found.error}"
        yield Diagnosis("ports", PROBLEM, fact, open_ports())
    else:
        yield Diagnosis("ports", OK, "reached from the head, and reaches it")
        ahead, within = found.ahead_s, found.within_s
        by = f"{abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} the head's"
        fact = f"its clock is {by} (±{within:.3f} s)"
        remedy = "timedatectl set-ntp true; `chronyc tracking` shows the state"
        off = abs(ahead) - within
        status = PROBLEM if off > WRONG_CLOCK_S else WARNING if off > LATE_CLOCK_S else OK
        yield Diagnosis("clock", status, fact, "" if status == OK else remedy)
    if found.shares_directory is False:
        fact = "the head does not see what it writes to the run's directory"
        remedy = "--runs DIR on a file system that all nodes share"
        yield Diagnosis("shared", PROBLEM, fact, remedy)
    elif found.shares_directory:
        yield Diagnosis("shared", OK, "the head sees what it writes to the run's directory")
