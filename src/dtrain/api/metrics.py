"""The metrics of a run as a table."""

from __future__ import annotations

import math
from typing import Any

from dtrain.errors import UsageError
from dtrain.run import files
from dtrain.run.rundir import RunDir


class Metrics(list[dict[str, Any]]):
    """A list with one dict for each line of metrics.jsonl, the oldest first.

    Each dict has `time` (seconds since 1970), `step`, `epoch`, `split` (`train`, `eval`, `validate`
    or `test`), and the measured values by name.
    """

    @classmethod
    def read(cls, run: RunDir, split: str | None = None) -> Metrics:
        """Read the metrics of a run so far, of one split or of all."""
        lines = files.read_lines(run.metrics, split=str, step=int)
        chosen = (line for line in lines if split in (None, line["split"]))
        # JSON has no NaN, so null represents it
        return cls({k: math.nan if v is None else v for k, v in line.items()} for line in chosen)

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with a row for each line.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError(
                f"to_pandas() needs pandas ({error}); install it with: pip install pandas",
                code="plan.missing-package",
            ) from None
        return pandas.DataFrame(list(self))
