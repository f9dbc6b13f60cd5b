"""A line of progress in the output of a notebook's cell, rewritten in place.

There rich draws its bar with ipywidgets, which may be missing. Any front end can rewrite an output
that has a name.
"""

from __future__ import annotations

import sys
from typing import Any

from dtrain.plainjson import numbers

_WIDTH = 30


def is_here() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


class NotebookBar:
    """The notebook's counterpart of a terminal's `_Bar`. The lines come below it."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._output: Any = None

    def start(self, total_steps: int | None) -> None:
        """Begin, or begin again after a restart."""
        self._total = total_steps
        self._show(0, "")

    def metrics(self, line: dict[str, Any]) -> None:
        """Move to the step of a line of metrics.jsonl."""
        if self._output is None or line["split"] != "train":
            return
        loss = numbers(line).get("loss")
        self._show(line["step"], "" if loss is None else f"epoch {line['epoch']}  loss {loss:.4f}")

    def show(self, bars: str) -> None:
        """Show nothing. A cell gets the bars that rank 0 draws itself when they are complete."""

    def print(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        """Keep the last state on display."""

    def _show(self, step: int, text: str) -> None:
        from IPython.display import display

        filled = 0 if not self._total else min(_WIDTH, _WIDTH * step // self._total)
        bar = f"{'━' * filled}{' ' * (_WIDTH - filled)}"
        shown = {"text/plain": f"step {step}/{self._total or '?'} {bar} {text}".rstrip()}
        if self._output is None:
            self._output = display(shown, raw=True, display_id=True)
        else:
            self._output.update(shown, raw=True)
