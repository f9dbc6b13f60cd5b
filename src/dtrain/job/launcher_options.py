"""The `options:` of a profile: a launcher's own settings."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import ConfigDict, ValidationError

from dtrain.errors import PlanError
from dtrain.job.errors import code_of
from dtrain.job.located import did_you_mean
from dtrain.job.spec import Model


class AnyOptions(Model):
    """Options as they are written, in a profile or in plan.json: not checked yet."""

    model_config = ConfigDict(extra="allow")

    @property
    def cores_per_node(self) -> int | None:
        """CPUs that a node has been given; None where the launcher does not say."""
        return None


class LauncherOptions(AnyOptions):
    """Base of the options of a launcher; those of one without any."""

    model_config = ConfigDict(extra="forbid")

    launcher: ClassVar[str]
    further: ClassVar[str] = ""
    """What else can be set, as the end of a sentence that lists the options."""

    @classmethod
    def listed(cls) -> str:
        """A sentence that names every option, for the error about an unknown one."""
        names = ", ".join(cls.model_fields)
        has = f"the options {names}" if names else "no options"
        return f"launcher {cls.launcher!r} has {has}{cls.further}"

    @classmethod
    def of(cls, options: AnyOptions) -> Self:
        """The options of a plan with their own type.

        Raises:
            PlanError: one is unknown or wrong.
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
            said = first["msg"].removeprefix("Value error, ")
            message = f"launcher {cls.launcher!r}, {where}: {said}"
            raise PlanError(message, code=code_of(first, "option"))
        near = did_you_mean(name, list(cls.model_fields))
        message = f"option {name}: unknown{near or f'; {cls.listed()}'}"
        raise PlanError(message, code="option.unknown-field")
