"""Codes of the launch plane: job files, profiles, flags, launchers, runs, commands."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.codes.entry import Entry

LAUNCH: Mapping[str, Entry] = {}
