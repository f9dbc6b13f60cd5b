"""Every code of an error, problem, verdict and finding, with its cause and its remedy.

docs/errors.md is made from these tables. A code is `area.what`, in lower case with hyphens; it
never changes its meaning, so scripts may depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.codes.entry import Entry
from dtrain.codes.launch import LAUNCH
from dtrain.codes.training import TRAINING

CODES: Mapping[str, Entry] = {**LAUNCH, **TRAINING}
"""Code → what it means."""
