"""The `options:` of a profile: a launcher's own settings."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, ValidationError

from dtrain.errors import PlanError
from dtrain.job.spec import Model


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["on", "off"], BeforeValidator(_switch)]
"""YAML 1.1 reads `on` as a boolean."""


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
            raise PlanError(f"launcher {cls.launcher!r}, {where}: {first['msg']}")
        known = list(cls.model_fields)
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        has = f"it has: {', '.join(known)}" if known else "it has none"
        raise PlanError(f"launcher {cls.launcher!r} has no option {name!r}{hint} ({has})")
