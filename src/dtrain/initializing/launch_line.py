"""Read a command line that starts a training: torchrun, or Python, perhaps by srun."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import UsageError, quoted
from dtrain.initializing import shell
from dtrain.initializing.existing import Existing
from dtrain.job.units import is_number
from dtrain.launchers.torchrun_options import ANSWERS

_VALUES = {"--nnodes", "--nproc-per-node", "--max-restarts", "--node-rank", "--rdzv-endpoint"}
_FLAGS = {"--standalone", "--use-env"}
_KINDS = {"-m": "module", "--module": "module", "--no-python": "command"}
_SHORT = {"-t": "--tee"}
_WRAPPERS = {"exec", "nohup", "time"}
_OF_PYTHON_WITH_VALUE = {"-W", "-X"}
_TORCHRUN_MODULES = {"torch.distributed.run", "torch.distributed.launch"}
_NEEDS_NO_RENDEZVOUS = {"--rdzv-endpoint", "--master-addr", "--master-port", "--node-rank"}
SrunOption = Callable[[str, str | None], None]


@dataclass(frozen=True)
class Start:
    """The part of a command line that starts a training."""

    kind: str
    """`torchrun` or `python`, or `program` for another one that srun starts."""
    words: list[str]
    """The words after the program's name; for `program` with it."""
    srun: list[str]
    """The options of srun."""
    by_srun: bool
    env: dict[str, str]
    """Variables that are set in front of the command."""


def find_start(words: list[str]) -> Start | None:
    """Return how a command line starts a training; None if it does something else."""
    env: dict[str, str] = {}
    rest = list(words)
    while rest and ((set_ := shell.assignment(rest[0])) or rest[0] in _WRAPPERS | {"env"}):
        env |= dict([set_]) if set_ else {}
        rest.pop(0)
    by_srun = bool(rest) and os.path.basename(rest[0]) == "srun"
    options: list[str] = []
    if by_srun:
        rest.pop(0)
        while rest and rest[0].startswith("-"):
            options.append(rest.pop(0))
            has_value = "=" in options[-1] or (len(options[-1]) > 2 and options[-1][1] != "-")
            if not has_value and rest and not rest[0].startswith("-") and not _is_program(rest[0]):
                options.append(rest.pop(0))
    if not rest:
        return None
    kind = _kind(rest[0])
    if kind == "python":
        after = _after_options_of_python(rest[1:])
        if after[:1] == ["-m"] and after[1:2] and after[1] in _TORCHRUN_MODULES:
            return Start("torchrun", after[2:], options, by_srun, env)
        if not after or not (after[0] == "-m" or after[0].endswith(".py")):
            return None
        return Start("python", after, options, by_srun, env)
    if kind == "torchrun":
        return Start("torchrun", rest[1:], options, by_srun, env)
    if kind == "script":
        return Start("python", rest, options, by_srun, env)
    return Start("program", rest, options, True, env) if by_srun else None


def _kind(word: str) -> str:
    name = os.path.basename(word)
    if name == "torchrun":
        return "torchrun"
    if name.startswith("python"):
        return "python"
    return "script" if name.endswith(".py") else ""


def _is_program(word: str) -> bool:
    return bool(_kind(word)) or word.startswith(("./", "/")) or os.path.basename(word) == "bash"


def _after_options_of_python(words: list[str]) -> list[str]:
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in ("-c", "-m"):
        rest = rest[2:] if rest[0] in _OF_PYTHON_WITH_VALUE else rest[1:]
    return rest


def read_start(start: Start, found: Existing, place: str, folder: Path, base: Path) -> None:
    """Add to `found` what a command line says.

    Args:
        start: the command line.
        found: what is known; `launcher` is set in a batch script.
        place: the place of the command line, for messages.
        folder: the directory of job.yaml.
        base: the directory in which the command line is meant to run.
    """
    kind, rest = "script", start.words
    if start.kind == "torchrun":
        kind, rest = _options_of_torchrun(start.words, found, place)
    elif start.kind == "program":
        kind = "command"
    elif rest[0] == "-m":
        kind, rest = "module", rest[1:]
    if not rest:
        text = f"{place}: no script after torchrun's options"
        raise UsageError(text, code="init.no-command")
    program, *arguments = rest
    if kind == "script" or (kind == "command" and "/" in program):
        program = _from(folder, base, program, place)
    title = program.rpartition(".")[2] if kind == "module" else Path(program).stem
    found.name = found.name or title
    found.job[kind] = [program] if kind == "command" else program
    found.job |= {"script_args": arguments} if arguments else {}
    for word in arguments:
        if name := shell.unknown(word):
            found.leave_out(place, word, f"{name} has no value yet; set it in script_args")
    for name, value in start.env.items():
        note_variable(found, place, name, value)


def _from(folder: Path, base: Path, program: str, place: str) -> str:
    """Return the path of a script from the directory of job.yaml."""
    path = base / os.path.expanduser(program)
    if not path.is_file():
        text = f"{place}: there is no script {program} in {base}"
        raise UsageError(text, code="job.script-not-found")
    if path.is_absolute() and os.path.isabs(program):
        return program
    return os.path.relpath(path.resolve(), folder.resolve())


def _options_of_torchrun(words: list[str], found: Existing, place: str) -> tuple[str, list[str]]:
    """Read the options; return the kind of program, and the words from the program on."""
    kind, endpoint = "script", dict[str, str]()
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).partition("=")
        name = _SHORT.get(name, name if len(name) == 2 else name.replace("_", "-"))
        answer = ANSWERS.get(name)
        if name in _KINDS:
            kind = _KINDS[name]
            continue
        if name in _FLAGS or (answer and not answer.has_value):
            if answer:
                found.leave_out(place, name, answer.why)
            continue
        if name not in _VALUES and answer is None:
            text = f"{place}: {quoted(name)} is not a known option of torchrun"
            raise UsageError(text, code="init.unknown-option")
        if not equals:
            value = rest.pop(0) if rest else ""
        if name in _NEEDS_NO_RENDEZVOUS:
            endpoint[name] = value
        elif name == "--shutdown-timeout":
            found.launch["stop_timeout"] = f"{value}s"
        elif answer:
            found.leave_out(place, f"{name} {value}".strip(), answer.why)
        else:
            _note_size(found, place, name, value)
    _note_endpoint(found, place, endpoint)
    return kind, rest


def _note_size(found: Existing, place: str, name: str, value: str) -> None:
    parts = value.split(":")
    if name == "--nproc-per-node" and (is_number(value) or value in ("gpu", "cpu", "auto")):
        found.procs = int(value) if is_number(value) else value
    elif name == "--nnodes" and all(map(is_number, parts)):
        found.nodes = ":".join(dict.fromkeys(parts))
    elif name == "--max-restarts" and is_number(value):
        found.launch["max_restarts"] = int(value)
    else:
        cause = shell.unknown(value) or "it"
        found.leave_out(place, f"{name} {value}", f"{cause} has no known value here")


def _note_endpoint(found: Existing, place: str, endpoint: dict[str, str]) -> None:
    """Keep the address of node 0 if the nodes are started by hand: launcher torchrun."""
    if found.launcher == "slurm" or found.nodes in (None, "1"):
        why = (
            "the nodes of a Slurm job find one another"
            if found.launcher == "slurm"
            else "one node needs no address"
        )
        for name, value in endpoint.items():
            found.leave_out(place, f"{name} {value}", why)
        return
    if not endpoint:
        return
    found.launcher = "torchrun"
    address = endpoint.get("--rdzv-endpoint", "")
    if "--master-addr" in endpoint:
        address = f"{endpoint['--master-addr']}:{endpoint.get('--master-port', '29500')}"
    if shell.unknown(address):
        text = "it has no known value here; set rdzv_endpoint, or give --rdzv-endpoint"
        found.leave_out(place, address, text)
    elif address:
        has_port = address.rpartition(":")[2].isdigit()
        found.options["rdzv_endpoint"] = address if has_port else f"{address}:29400"
    if "--node-rank" in endpoint:
        text = "it differs on each host; give it to dtrain launch"
        found.leave_out(place, f"--node-rank {endpoint['--node-rank']}", text)


_OF_DTRAIN = {
    "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "GROUP_RANK", "NODE_RANK", "OMP_NUM_THREADS",
}  # fmt: skip


def note_variable(found: Existing, place: str, name: str, value: str) -> None:
    """Carry over an exported variable, or say why not."""
    env: dict[str, Any] = found.launch.setdefault("env", {})
    if name in _OF_DTRAIN:
        found.leave_out(place, f"{name}={value}", "dtrain sets it for each process")
    elif variable := shell.unknown(value):
        text = f"{variable} has no known value here; set it in launch.env"
        found.leave_out(place, f"{name}={value}", text)
    else:
        env[name] = value
