"""The `options:` of a profile: settings of one launcher."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import ConfigDict, ValidationError

from dtrain.errors import PlanError
from dtrain.job.errors import code_of
from dtrain.job.located import did_you_mean
from dtrain.job.model import Model


class AnyOptions(Model):
    """Options as they are written in a profile or in plan.json, before they are checked."""

    model_config = ConfigDict(extra="allow")

    @property
    def cores_per_node(self) -> int | None:
        """The number of CPUs assigned to a node. None means that the launcher does not know."""
        return None

    @property
    def is_here(self) -> bool:
        """Whether a launcher of a cluster uses one that it starts on this host."""
        return False


class LauncherOptions(AnyOptions):
    """The base class of a launcher's options. It has no options itself."""

    model_config = ConfigDict(extra="forbid")

    launcher: ClassVar[str]
    further: ClassVar[str] = ""
    """Further settings, as the end of a sentence that lists the options."""

    @classmethod
    def listed(cls) -> str:
        """Return a sentence that names every option, for the error about an unknown one."""
        names = ", ".join(cls.model_fields)
        has = f"the options {names}" if names else "no options"
        return f"launcher {cls.launcher!r} has {has}{cls.further}"

    @classmethod
    def of(cls, options: AnyOptions) -> Self:
        """Return the options of a plan, validated as this class.

        Raises:
            PlanError: an option is unknown or wrong.
        """
        if isinstance(options, cls):
            return options
        try:
            return cls.model_validate(options.model_dump())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] != "extra_forbidden":
            where = f"option {name}" if name else "options"
            problem = first["msg"].removeprefix("Value error, ")
            message = f"launcher {cls.launcher!r}, {where}: {problem}"
            raise PlanError(message, code=code_of(first, "option"))
        near = did_you_mean(name, list(cls.model_fields))
        message = f"option {name}: unknown{near or f'; {cls.listed()}'}"
        raise PlanError(message, code="option.unknown-field")
