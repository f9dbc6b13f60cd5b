"""The answer to a command line with options of torchrun that dtrain does not have."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from dtrain.errors import UsageError, shortened
from dtrain.launchers.torchrun_options import ANSWERS


def answer(unknown: str, given: Sequence[str], job_at: int | None, path: str) -> UsageError | None:
    """Return the answer to all options of torchrun in a command line.

    Args:
        unknown: the option that dtrain does not know.
        given: the command line, without the command.
        job_at: the position of JOB in it. None if it is not there.
        path: the command: `dtrain launch`.

    Returns:
        The answer, with the corrected command line. None if `unknown` is not torchrun's.
    """
    if unknown not in ANSWERS:
        return None
    end = len(given) if job_at is None else job_at
    kept, notes, endpoint = list[str](), list[str](), dict[str, str]()
    words = iter(given[:end])
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        found = ANSWERS.get(name)
        if found is None:
            kept.append(word)
            continue
        if found.has_value and not equals:
            value = next(words, "")
        if name.startswith("--master"):
            endpoint[name] = value
        elif found.instead:
            kept += shlex.split(found.instead.format(shlex.quote(value)))
        notes.append(f"  {shortened(f'{name} {value}'.strip(), 40)}: {found.why}")
    if "--master-addr" in endpoint and "torchrun" not in kept and _has_nodes(kept):
        address, port = endpoint["--master-addr"], endpoint.get("--master-port", "29500")
        kept += ["--launcher", "torchrun", "--rdzv-endpoint", f"{address}:{port}"]
    program = [*given[end : end + 1]]
    arguments = [*given[end + 1 :]]
    if arguments and arguments[0] != "--":
        arguments.insert(0, "--")
    line = shlex.join([*path.split(), *kept, *program, *arguments])
    return UsageError(
        "\n".join(["options of torchrun that dtrain does not have:", *notes, f"write: {line}"]),
        code="usage.option-of-torchrun",
    )


def _has_nodes(words: Sequence[str]) -> bool:
    return any(word.partition("=")[0].replace("_", "-") == "--node-rank" for word in words)
