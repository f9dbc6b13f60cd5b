"""The base class of the models of job.yaml, profiles and launchers' options."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """The base class of every spec: unknown keys are errors, values never change, types are
    strict."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )
