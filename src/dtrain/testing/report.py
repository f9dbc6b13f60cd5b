"""Combines the outcomes of the ranks into one verdict.

It shows the rank that failed first, its own error, and the other ranks in a line.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.testing import body
from dtrain.testing.wire import Answer, Kind, RankResult
from dtrain.words import numbered


@dataclass(frozen=True)
class Verdict:
    """The reason why the ranks together did not pass."""

    kind: Kind
    """`failed`, `skipped` or `xfailed`."""
    rank: int | None
    """The first rank that did not pass. None means that time ran out without a failure."""
    headline: str
    """The verdict in one line."""
    text: str
    """The whole text: traceback or stacks, and the outcomes of the other ranks."""
    where: tuple[str, int] | None
    error: BaseException | None
    """The first rank's exception, if it could be pickled."""


def judge(answer: Answer) -> Verdict | None:
    """Return the verdict on a request; None if every rank passed."""
    results = answer.results
    if answer.timed_out_s is not None:
        return _timeout(answer)
    failures = [r for r in results if r.outcome.kind not in ("passed", "killed")]
    if not failures:
        killed = [r for r in results if r.outcome.kind == "killed"]
        return _verdict(answer, killed[0], "failed", "cancelled") if killed else None
    kinds = {r.outcome.kind for r in failures}
    # A skip in one rank and an error in another is an error of the test, or hides one.
    real = [r for r in failures if r.outcome.kind in ("failed", "died")] or failures
    # Times decide last: a connection breaks slightly before its cause, a death, is visible.
    causes = [r for r in real if not r.outcome.is_lost_connection] or real
    culprit = min(causes, key=lambda r: r.outcome.time)
    kind: Kind = "failed" if kinds & {"failed", "died"} else culprit.outcome.kind
    return _verdict(answer, culprit, kind, culprit.outcome.headline)


def trim_stack(dump: str) -> str:
    """Remove the frames below the test's body, which are dtrain's, from a faulthandler dump."""
    lines: list[str] = []
    skipping = False
    for line in dump.splitlines():
        if not line.startswith("  "):
            skipping = False
        elif body.__file__ in line:
            skipping = True
        if not skipping:
            lines.append(line)
    return "\n".join(lines).strip()


def echo(answer: Answer) -> None:
    """Print the output of the ranks, each line with its rank in front."""
    for result in answer.results:
        for text, stream in ((result.stdout, sys.stdout), (result.stderr, sys.stderr)):
            for line in text.splitlines():
                print(f"[rank {result.rank}] {line}", file=stream)


def _verdict(answer: Answer, culprit: RankResult, kind: Kind, headline: str) -> Verdict:
    outcome = culprit.outcome
    size = answer.layout.world_size
    first = f"rank {culprit.rank} of {size}"
    others = _others(answer.results, culprit)
    if outcome.kind == "died":
        text = f"{first}: {headline}\n"
    else:
        text = f"{first} {'failed first' if others else 'failed'}:\n\n{outcome.text.rstrip()}\n"
    text = "\n".join([text, *others]).rstrip() + "\n"
    return Verdict(
        kind, culprit.rank, f"rank {culprit.rank}: {headline}", text, outcome.where, _error(culprit)
    )


def _timeout(answer: Answer) -> Verdict:
    """Return the verdict with every stack, and with the first failure, if any, in a line."""
    running = [r for r in answer.results if r.outcome.kind == "killed"]
    headline = (
        f"timed out after {answer.timed_out_s:g} s: {_ranks(running)} of "
        f"{answer.layout.world_size} still running"
    )
    parts = [headline]
    for result in running:
        stack = trim_stack(result.stack) or "no stack: the process did not react"
        parts.append(f"---- rank {result.rank} ----\n{stack}")
    parts += _others([r for r in answer.results if r.outcome.kind != "killed"], None)
    passed = [r for r in answer.results if r.outcome.kind == "passed"]
    if passed:
        parts.append(f"{_ranks(passed)} passed")
    return Verdict("failed", None, headline, "\n\n".join(parts) + "\n", None, None)


def _others(results: Sequence[RankResult], culprit: RankResult | None) -> list[str]:
    """Describe the ranks that neither passed nor failed first, in a line for each kind of end.

    Ranks with the same text share a line.
    """
    ends: dict[str, list[RankResult]] = {}
    for result in results:
        if result is not culprit and result.outcome.kind != "passed":
            ends.setdefault(_end(result), []).append(result)
    return [f"{_ranks(group)}: {end}" for end, group in ends.items()]


def _end(result: RankResult) -> str:
    outcome = result.outcome
    if outcome.is_lost_connection:
        return "lost the connection to a rank that had ended"
    if outcome.kind != "killed":
        prefix = f"{outcome.kind}: " if outcome.kind in ("skipped", "xfailed") else ""
        return prefix + outcome.headline
    frames = [line for line in trim_stack(result.stack).splitlines() if line.startswith("  ")]
    return "still running, killed" + (f" at {frames[-1].strip()}" if frames else "")


def _ranks(results: Sequence[RankResult]) -> str:
    return numbered("rank", (result.rank for result in results))


def _error(result: RankResult) -> BaseException | None:
    outcome = result.outcome
    if outcome.kind in ("skipped", "xfailed"):  # pytest's own exceptions cannot be pickled
        import pytest

        own = pytest.skip.Exception if outcome.kind == "skipped" else pytest.xfail.Exception
        return own(outcome.headline)
    with contextlib.suppress(Exception):
        error = pickle.loads(outcome.value or b"")
        # A rank's SystemExit or KeyboardInterrupt must not end the caller.
        return error if isinstance(error, Exception) else None
    return None
