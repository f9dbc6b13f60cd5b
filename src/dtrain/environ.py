"""Environment variables: which of them a launch inherits, and which are never shown."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any

from dtrain.ranks import scrubbed

HASH_SEED = "PYTHONHASHSEED"
"""It determines the order of a set of strings. All workers of a run must have the same one, or they
would number labels differently.
"""
MASK = "(set, not shown)"
"""The text that is shown in place of a secret value."""
_PACKAGES = (
    "dtrain", "torch", "numpy", "lightning", "pytorch-lightning", "keras", "transformers",
    "accelerate", "ray",
)  # fmt: skip
_NO_SECRETS = ("PWD", "OLDPWD")
_SECRET_WORD = re.compile(
    r"SECRET\w*|PASSW\w*|PASSPHRASE|CREDENTIAL\w*|CREDS?|AUTH|AUTHORIZATION|PRIVATE|BEARER|COOKIES?"
    r"|DSN|WEBHOOKS?|SAS|PASS|PGPASS|PWD|\w*(KEYS?|TOKENS?|SECRETS?|PASSWORDS?|OAUTH)"
)
"""Words of a name that make its value secret. Non-letters or case (`apiKey`) separate words."""
_SECRET_VALUE = re.compile(
    r"[a-zA-Z][\w+.-]*://[^/\s:@]*:[^/\s@]+@"  # scheme://user:password@host
    r"|[?&](sig|signature|token|access_token|password|api_?key)=[^&\s]{8}"
    r"|hooks\.slack\.com/services/\w"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?<![A-Za-z0-9])(hf_\w{16}|gh[opsur]_\w{16}|github_pat_\w{16}|glpat-[\w-]{16}|sk-[\w-]{16}"
    r"|AKIA[0-9A-Z]{12}|AIza[\w-]{20}|xox[abeoprs]-[\w-]{8}|npm_\w{20}|pypi-\w{16}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8})"
)
"""Texts that are secret by their form: URLs with a password, keys, tokens of known services."""
_DOUBTFUL_NAME = re.compile(r"(?!.*(api|access|auth|secret|private)).*(key|token)s?")
_WORD = re.compile(r"[<\[|]*[A-Za-z_. -]{0,19}[>\]|]*")
"""A natural word, not a key."""


def is_secret(name: str, value: object) -> bool:
    """Return whether a value must not be shown, because of a word of its name or its own form.

    Args:
        name: the name of a variable, an argument or an option; may be empty.
        value: a value of any type. Only strings are secret.
    """
    if not isinstance(value, str) or not value:
        return False
    return _is_secret_name(name) or _SECRET_VALUE.search(value) is not None


def _is_secret_argument(name: str, value: object) -> bool:
    """Return whether the value of an argument is secret.

    `pad_token: "[PAD]"` and `image_key: left_image` are not.
    """
    if not is_secret(name, value):
        return False
    doubtful = _DOUBTFUL_NAME.fullmatch(name.lower().lstrip("-")) is not None
    return not (doubtful and _WORD.fullmatch(str(value)))


def may_contain_secret(text: str) -> bool:
    """Return whether a text written by a person, such as `{MY_TOKEN: x}`, may contain a secret."""
    names = re.findall(r"[\w.-]+(?=[\"']?\s*[:=])", text)
    return any(map(_is_secret_name, names)) or _SECRET_VALUE.search(text) is not None


def shown(name: str, value: Any) -> Any:
    """Return a value that can be shown. Secrets in it, at any depth, are masked.

    Args:
        name: the name of the value.
        value: plain data. In a list, the item after `--api-key` has that name.
    """
    if isinstance(value, Mapping):
        return {key: shown(str(key), part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        options = [part if isinstance(part, str) and part.startswith("-") else "" for part in value]
        owners = [name, *(option or name for option in options)]
        pairs = zip(value, options, owners, strict=False)
        parts = [
            _shown_option(option) if option else shown(owner, part) for part, option, owner in pairs
        ]
        return tuple(parts) if isinstance(value, tuple) else parts
    return MASK if _is_secret_argument(name, value) else value


def _shown_option(text: str) -> str:
    """Return `--api-key=abc` without its value."""
    option, equals, value = text.partition("=")
    return f"{option}={MASK}" if equals and _is_secret_argument(option, value) else text


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment that can be shown: values that look secret are masked."""
    return {name: MASK if is_secret(name, value) else value for name, value in env.items()}


def secret(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are never shown, with their values."""
    return {name: value for name, value in env.items() if is_secret(name, value)}


def _is_secret_name(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    whole = re.findall(r"[A-Z]+", name.upper())
    return name.upper() not in _NO_SECRETS and any(
        _SECRET_WORD.fullmatch(word.upper()) for word in [*words, *whole]
    )


def inherited_env(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment that nodes inherit: this one, without another launcher's variables."""
    return scrubbed(os.environ if environ is None else environ)


def hash_seed(environ: Mapping[str, str], default: str = "0") -> str:
    """Return the user's PYTHONHASHSEED, or the default.

    `random`, which is Python's own default, counts as not set.
    """
    own = environ.get(HASH_SEED, "")
    return own if own.isascii() and own.isdigit() else default


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages here that a training may depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
