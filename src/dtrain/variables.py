"""Environment variables: which a launch inherits, and which are never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from dtrain.ranks import scrubbed

HASH_SEED = "PYTHONHASHSEED"
"""Makes the order of a set of texts: one for all workers of a run, or they number labels apart."""
MASK = "(set, not shown)"
"""Stands for the value of one that looks secret."""
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """An environment fit to be shown: values of names that look secret are left out."""
    return {name: MASK if _SECRET_NAME.search(name) else value for name, value in env.items()}


def secret(env: Mapping[str, str]) -> dict[str, str]:
    """Those that are never shown, with their values."""
    return {name: value for name, value in env.items() if _SECRET_NAME.search(name)}


def inherited_env(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that nodes inherit: ours, without what another launcher left in it."""
    return scrubbed(os.environ if environ is None else environ)


def hash_seed(environ: Mapping[str, str], default: str = "0") -> str:
    """The user's own PYTHONHASHSEED; `random`, as Python has it by default, counts as none."""
    own = environ.get(HASH_SEED, "")
    return own if own.isascii() and own.isdigit() else default
