"""What a job with a script says, and what it leaves to the script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtrain import catalog

SCRIPT_FIELDS = ("name", "script", "arguments", "launch")
"""All that such a job says."""

_ALLOWED = (*SCRIPT_FIELDS, "trainer", "strategy")  # the last two have sentences of their own
_UP_TO_THE_SCRIPT = (
    "has no meaning with a script, which sees to it by itself; leave it out, or write the training "
    "as a task"
)


def completed(job: Any) -> Any:
    """A job as written, with what only a task needs filled in where it has a script.

    So no other code has holes to look for.
    """
    if not isinstance(job, dict) or job.get("script") is None:
        return job
    train = {"steps": 1, "global_batch_size": 1}
    return {
        "task": "",
        "train": train,
        "trainer": catalog.SCRIPT,
        "strategy": catalog.OWN,
        **job,
    }


def meaningless(job: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Fields of a job with a script that would do nothing: pairs of a field and a sentence."""
    return [((field,), _UP_TO_THE_SCRIPT) for field in job if field not in _ALLOWED]
