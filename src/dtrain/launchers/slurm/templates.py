"""Fill templates of batch scripts. Third-party templates cannot run code on this host."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.errors import PlanError

_MAX_CHARACTERS = 4_000_000  # Slurm's own limit of a script
_MAX_ITERATIONS = 100_000  # for all loops over numbers together


def fill(path: Path, values: Mapping[str, Any]) -> str:
    """Return a template with its values filled in.

    Raises:
        PlanError: jinja2 is not installed, or the template cannot be read or filled, or it uses a
            value that is not given to it; the message names the line.
    """
    try:
        import jinja2
        from jinja2.sandbox import SandboxedEnvironment
    except ImportError:
        raise PlanError(
            "launcher 'slurm' needs jinja2: pip install 'dtrain[slurm]'",
            code="plan.missing-package",
        ) from None
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["range"] = _Range()
    try:
        text = path.read_text(encoding="utf-8")
        return _joined(environment.from_string(text).generate(values))
    except OSError as error:
        raise PlanError(
            f"template {path} cannot be read: {error.strerror}", code="slurm.template-unreadable"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError(
            f"template {path} is not UTF-8; save it as UTF-8", code="slurm.template-unreadable"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise PlanError(
            f"template {path}:{error.lineno}: {error.message}", code="slurm.template-invalid"
        ) from error
    except Exception as error:  # its expressions may raise anything
        raise PlanError(
            f"template {path}{_line(error)}: {error}", code="slurm.template-invalid"
        ) from error


class _Range:
    """A `range` for templates in which no loop runs forever."""

    def __init__(self) -> None:
        self._left = _MAX_ITERATIONS

    def __call__(self, *numbers: int) -> range:
        """Return Python's range, and raise once all of them together are too long."""
        found = range(*numbers)
        self._left -= len(found)
        if self._left < 0:
            raise ValueError(f"more than {_MAX_ITERATIONS} iterations of loops")
        return found


def _joined(parts: Any) -> str:
    text, length = [], 0
    for part in parts:
        text.append(part)
        length += len(part)
        if length > _MAX_CHARACTERS:
            raise ValueError(f"the script has more than {_MAX_CHARACTERS} characters")
    return "".join(text)


def _line(error: Exception) -> str:
    """Return `:LINE` of a template where an error was raised; jinja2 puts its lines into the
    trace."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f":{lines[-1]}" if lines else ""
