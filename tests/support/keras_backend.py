"""The backend of Keras in a test process."""

from __future__ import annotations

import os


def use_torch() -> None:
    """As a worker does, before anything imports Keras."""
    os.environ["KERAS_BACKEND"] = "torch"
