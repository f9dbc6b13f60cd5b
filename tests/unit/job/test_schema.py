import re
from collections.abc import Iterator
from typing import Any

from dtrain import catalog
from dtrain.job.schema import job_schema


def _objects(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "job", schema
    yield from schema["$defs"].items()


def test_every_field_is_described_and_no_other_key_allowed() -> None:
    schema = job_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for name, section in _objects(schema):
        assert section["additionalProperties"] is False, name
        assert section["description"], name
        for field, facts in section["properties"].items():
            reference = facts.get("$ref", "").removeprefix("#/$defs/")
            described = facts.get("description") or schema["$defs"][reference]["description"]
            assert described.endswith("."), f"{name}.{field}"


def test_names_come_from_the_catalog() -> None:
    properties = job_schema()["properties"]
    assert properties["strategy"]["enum"] == catalog.names("strategy")
    assert properties["trainer"]["enum"] == catalog.names("trainer")


def test_units_and_bounds_are_known_to_editors() -> None:
    definitions = job_schema()["$defs"]
    launch = definitions["LaunchSpec"]["properties"]
    assert launch["join_timeout"]["type"] == ["number", "string"]
    assert launch["join_timeout"]["exclusiveMinimum"] == 0
    assert definitions["CheckpointSpec"]["properties"]["keep"]["minimum"] == 1
    pattern = launch["nodes"]["anyOf"][1]["pattern"]
    assert re.search(pattern, "2:4")
    assert not re.search(pattern, "2-4")
    assert launch["env"]["additionalProperties"] == {"type": ["string", "number"]}


def test_required_fields() -> None:
    schema = job_schema()
    assert schema["required"] == ["name"]
    kinds = [["task", "train"], ["script"], ["module"], ["command"]]
    assert schema["oneOf"] == [{"required": kind} for kind in kinds]
    assert schema["$defs"]["TrainSpec"]["required"] == ["global_batch_size"]
