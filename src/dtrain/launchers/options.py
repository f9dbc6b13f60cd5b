"""What the options of launchers have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ValidationError

from dtrain.errors import PlanError
from dtrain.job.spec import Model


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Switch = Annotated[Literal["on", "off"], BeforeValidator(_switch)]
"""YAML 1.1 reads `on` as a boolean."""


class LauncherOptions(Model):
    """The `options:` of a profile."""

    launcher: ClassVar[str]

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """The options of a plan.

        Raises:
            PlanError: one is unknown or wrong; the CLI has told it with its place before.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"]))
            where = f"option {name}" if name else "options"
            known = ", ".join(cls.model_fields)
            hint = f" (it has: {known})" if first["type"] == "extra_forbidden" else ""
            raise PlanError(f"launcher {cls.launcher!r}, {where}: {first['msg']}{hint}") from None
