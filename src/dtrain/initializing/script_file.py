"""Read a shell script that starts a training, with its #SBATCH lines if it is a batch script."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from dtrain.errors import UsageError
from dtrain.initializing import shell
from dtrain.initializing.existing import Existing
from dtrain.initializing.launch_line import Start, find_start, note_variable, read_start
from dtrain.job.located import shown_path
from dtrain.launchers.slurm.options import FLAGS, own_flag_problem

_SHORT = {
    "-A": "account", "-C": "constraint", "-D": "chdir", "-G": "gpus", "-J": "job-name",
    "-N": "nodes", "-a": "array", "-c": "cpus-per-task", "-d": "dependency", "-e": "error",
    "-i": "input", "-n": "ntasks", "-o": "output", "-p": "partition", "-q": "qos", "-t": "time",
    "-w": "nodelist", "-x": "exclude",
}  # fmt: skip
_SILENT = {"set", "fi", "done", "then", "else", "do", "}", "{", "true", ":", "exit", "wait"}
"""Words of a shell that do nothing by themselves."""
_LOGS = "the output of each rank is in its log: see `dtrain logs`"


Place = Callable[[int], str]
"""The place of a line, for messages."""


def read_script(path: Path, folder: Path) -> Existing:
    """Return what a shell script or a batch script says. Errors are those of `read_commands`."""
    shown = shown_path(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    return read_commands(text, shown, lambda line: f"{shown}:{line}", folder, path.parent)


def read_commands(text: str, shown: str, at: Place, folder: Path, beside: Path) -> Existing:
    """Return what the lines of a script say.

    Args:
        text: the lines.
        shown: the name of the script, for messages.
        at: makes the place of a line.
        folder: the directory of job.yaml.
        beside: a directory in which the program may be, if it is not in the current one.

    Raises:
        UsageError: not exactly one of its commands starts a training.
    """
    found = Existing()
    sbatch = _Sbatch(found)
    for number, name, value in _sbatch_options(text):
        found.launcher = "slurm"
        sbatch.note(at(number), name, value)
    directories = [Path(), beside]
    start, place = _start(text, shown, at, found, sbatch.variables(), directories)
    if found.launcher == "slurm" or start.by_srun:
        found.launcher = "slurm"
        for name, value in _options(start.srun):
            sbatch.note(place, name, value, of_srun=True)
        sbatch.finish(each_is_a_task=start.kind != "torchrun")
    base = next((each for each in directories if _has(each, start)), Path())
    read_start(start, found, place, folder, base)
    return found


def _has(base: Path, start: Start) -> bool:
    return any(word.endswith(".py") and (base / word).is_file() for word in start.words)


def _start(
    text: str,
    shown: str,
    at: Place,
    found: Existing,
    variables: dict[str, str],
    directories: list[Path],
) -> tuple[Start, str]:
    """Return the command that starts the training, and its place; note all others.

    Directories to which the script changes are added to `directories`.
    """
    starts: list[tuple[Start, shell.Command]] = []
    for command in shell.commands(text):
        words = shell.expanded(command, {**os.environ, **variables})
        start = find_start(words)
        if start is not None:
            starts.append((start, command))
        elif all(shell.assignment(word) for word in words):
            variables |= dict(filter(None, map(shell.assignment, words)))
        elif words[0] == "cd" and len(words) == 2:
            directories.append(directories[-1] / os.path.expanduser(words[1]))
            why = "the processes run in the directory in which you launch"
            found.leave_out(at(command.line), command.shown, why)
        else:
            _note_command(found, at(command.line), command, words, variables)
    best = [each for each in starts if each[0].kind == "torchrun"] or starts
    best = [each for each in best if each[0].by_srun] or best
    if not best:
        text = f"{shown} has no command with torchrun, srun or python that starts a training"
        raise UsageError(text, code="init.no-command")
    if len(best) > 1:
        listed = "".join(f"\n  {at(each.line)}: {each.shown}" for _, each in best)
        raise UsageError(
            f"several commands start a training; give one of them, in quotes, to --from:{listed}",
            code="init.several-commands",
        )
    for start, command in starts:
        if start is not best[0][0]:
            found.leave_out(at(command.line), command.shown, "run it before the launch")
    start, command = best[0]
    if command.redirection:
        found.leave_out(at(command.line), command.redirection, _LOGS)
    return start, at(command.line)


def _note_command(
    found: Existing, place: str, command: shell.Command, words: list[str], variables: dict[str, str]
) -> None:
    """Carry over what sets up the environment, or say that it is not carried over."""
    first, *rest = words
    is_slurm = found.launcher == "slurm"
    if first == "export" and rest:
        for name, value in filter(None, map(shell.assignment, rest)):
            variables[name] = value
            note_variable(found, place, name, value)
        for name in (each for each in rest if not shell.assignment(each) and each in variables):
            note_variable(found, place, name, variables[name])
    elif first in ("module", "ml") and is_slurm and {*rest[:1]} <= {"load", "add", "purge"}:
        found.options.setdefault("modules", []).extend(rest[1:])
    elif first in ("source", ".") and is_slurm and rest and rest[0].endswith("/bin/activate"):
        venv = rest[0].removesuffix("/bin/activate")
        found.options["venv"] = os.path.abspath(os.path.expanduser(venv))
    elif words[:2] == ["conda", "activate"] and is_slurm and len(words) == 3:
        found.options["conda"] = words[2]
    elif first == "tee":
        found.leave_out(place, command.shown, _LOGS)
    elif first not in _SILENT:
        instead = "put it into `setup` of the profile if the nodes need it"
        why = instead if is_slurm else "run it before the launch if the training needs it"
        found.leave_out(place, command.shown, why)


def _sbatch_options(text: str) -> list[tuple[int, str, str | None]]:
    """Return the options of the #SBATCH lines, which end at the first command."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#SBATCH"):
            try:
                words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError:
                words = line.split()[1:]
            found += [(number, name, value) for name, value in _options(words)]
        elif line.strip() and not line.startswith("#"):
            break
    return found


def _options(words: list[str]) -> list[tuple[str, str | None]]:
    """Return long names and values of options of sbatch or srun."""
    found: list[tuple[str, str | None]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            taken = value if equals else None
        else:
            name, taken = _SHORT.get(word[:2], word.lstrip("-")), word[2:].lstrip("=") or None
        if taken is None and rest and not rest[0].startswith("-"):
            taken = rest.pop(0)
        found.append((name, taken))
    return found


class _Sbatch:
    """The options of a batch job, and what they mean for a launch."""

    def __init__(self, found: Existing) -> None:
        self._found = found
        self._numbers: dict[str, int] = {}

    def note(self, place: str, name: str, value: str | None, *, of_srun: bool = False) -> None:
        """Carry over one option, or say why not."""
        found, text = self._found, value or ""
        shown = f"--{name}={text}" if text else f"--{name}"
        if name in ("ntasks", "ntasks-per-node", "cpus-per-task") and text.isdigit():
            self._numbers[name] = int(text)
        elif name == "nodes" and re.fullmatch(r"\d+(-\d+)?", text):
            found.nodes = text.replace("-", ":")
        elif name == "job-name" and text:
            found.name = text
        elif name == "time" and (seconds := _seconds(text)):
            found.options["time"] = _duration(seconds)
        elif name in ("gpus-per-node", "gpus", "gpus-per-task", "gres") and self._gpus(name, text):
            pass
        elif name in FLAGS and value is not None:
            found.options[name] = value
        elif name in ("mail-user", "comment") and value is not None:
            found.options[name.removesuffix("-user")] = value
        elif name == "mail-type":
            found.leave_out(place, shown, "mails come at END, FAIL and REQUEUE")
        elif problem := own_flag_problem(name):
            found.leave_out(place, shown, problem)
        elif of_srun:
            found.leave_out(place, shown, "dtrain starts srun itself")
        elif re.fullmatch(r"[a-z][a-z0-9-]*", name):
            number = int(text) if text.isdigit() else text
            found.options.setdefault("slurm", {})[name] = True if value is None else number
        else:
            found.leave_out(place, name, "it is not known")

    def _gpus(self, name: str, text: str) -> bool:
        """Note a number of GPUs, perhaps with their type. Return whether it was one."""
        found = re.fullmatch(r"(?:gpu:)?(?:([a-zA-Z][\w.-]*):)?(\d+)", text)
        if found is None or (name == "gres") != text.startswith("gpu:"):
            return False
        self._numbers[name] = int(found[2])
        if found[1]:
            self._found.options["gres"] = f"gpu:{found[1]}:{found[2]}"
        return True

    def variables(self) -> dict[str, str]:
        """Return the variables that Slurm sets, as far as the options decide them."""
        nodes, tasks = self._found.nodes, self._numbers.get("ntasks-per-node")
        gpus = self._numbers.get("gpus-per-node", self._numbers.get("gres"))
        known = {
            "SLURM_NNODES": nodes,
            "SLURM_JOB_NUM_NODES": nodes,
            "SLURM_NTASKS_PER_NODE": tasks,
            "SLURM_GPUS_ON_NODE": gpus,
            "SLURM_GPUS_PER_NODE": gpus,
            "SLURM_CPUS_PER_TASK": self._numbers.get("cpus-per-task"),
            "SLURM_JOB_NAME": self._found.name or None,
        }
        return {name: str(value) for name, value in known.items() if value is not None}

    def finish(self, *, each_is_a_task: bool) -> None:
        """Compute the sizes of a node, once all options are known.

        Args:
            each_is_a_task: whether srun starts each process, instead of torchrun.
        """
        found, numbers = self._found, self._numbers
        nodes = int((found.nodes or "1").split(":")[-1])
        tasks = numbers.get("ntasks-per-node")
        if tasks is None and "ntasks" in numbers:
            if found.nodes is None and not each_is_a_task:
                found.nodes, nodes = str(numbers["ntasks"]), numbers["ntasks"]
            tasks = max(1, numbers["ntasks"] // nodes)
        if each_is_a_task and tasks is not None:
            found.procs = tasks
        gpus = numbers.get("gpus-per-node", numbers.get("gres"))
        if gpus is None and "gpus" in numbers:
            gpus = max(1, numbers["gpus"] // nodes)
        if gpus is None and "gpus-per-task" in numbers:
            gpus = numbers["gpus-per-task"] * (tasks or 1)
        found.gpus = gpus or 0
        if found.gpus and (found.options.get("gres") or "").startswith("gpu:"):
            kind = found.options["gres"].split(":")[1]
            found.options["gres"] = f"gpu:{kind}:{found.gpus}"
        if cpus := numbers.get("cpus-per-task"):
            found.options["cpus_per_node"] = cpus * (tasks or 1)


def _duration(seconds: int) -> str:
    """Return a duration as dtrain writes it, for example `12h30m`."""
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        number, seconds = divmod(seconds, length)
        parts.append(f"{number}{unit}" if number else "")
    return "".join(parts)


def _seconds(text: str) -> int:
    """Return the seconds of a time limit of Slurm: `30`, `30:00`, `1:30:00`, `1-12`, `1-12:30`.

    It is 0 if there is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return 0
    days, *others = found.groups()
    parts = [int(part) for part in others if part is not None]
    by_length: dict[int, tuple[int, ...]] = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}
    units = by_length[len(parts)] if days is None else (3600, 60, 1)
    seconds = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 86400 + seconds
