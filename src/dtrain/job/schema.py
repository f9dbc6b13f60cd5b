"""The JSON Schema of job.yaml, for editors: completion, descriptions, red lines."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from dtrain import catalog
from dtrain.job.script import PROGRAMS
from dtrain.job.spec import JobSpec


class _Generator(GenerateJsonSchema):
    """A generator that omits titles, because they would repeat the names of the fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of job.yaml.

    Trainers and strategies come from the catalog.
    """
    schema = JobSpec.model_json_schema(schema_generator=_Generator)
    for kind in ("trainer", "strategy"):
        schema["properties"][kind]["enum"] = catalog.names(kind)
    schema["required"] = ["name"]
    schema["oneOf"] = [{"required": ["task", "train"]}]
    schema["oneOf"] += [{"required": [program]} for program in PROGRAMS]
    return {"$schema": _Generator.schema_dialect, **schema, "title": "job.yaml of dtrain"}
