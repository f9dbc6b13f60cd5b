"""Codes of the training plane: tasks, data, checks, checkpoints, integrations."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.codes.entry import Entry

TRAINING: Mapping[str, Entry] = {}
