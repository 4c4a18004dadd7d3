from __future__ import annotations

import json

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings

from jobsched import load
from jobsched.spec import document
from jobsched.spec.schema import job_schema
from tests.fuzz_specs import seeds
from tests.spec import strategies

SCHEMA = job_schema()
ACCEPTS = jsonschema_rs.validator_for(SCHEMA).is_valid


def test_it_is_a_valid_schema_and_plain_json() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert jsonschema_rs.meta.is_valid(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert load.json_schema() == SCHEMA


@pytest.mark.parametrize("number", range(len(seeds())))
def test_every_example_and_template_is_accepted(number: int) -> None:
    assert ACCEPTS(document.parse(seeds()[number], "")[0].plain)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.jobs)
def test_what_the_loader_accepts_the_schema_accepts(fields: dict[str, object]) -> None:
    spec = load.load_job_dict(fields)
    assert ACCEPTS(fields)
    assert ACCEPTS(spec.model_dump(mode="json"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "a"},
        {"command": ""},
        {"command": "a", "gpus": 1},
        {"command": "a", "gpu": {"typ": "h100"}},
        {"command": "a", "cpu": []},
        {"roles": {"w": {}}},
        {"roles": {"w": {"command": "a"}}, "gpu": 1},
        {"command": "a", "priority": "very high"},
        {"command": "a", "array": {}},
        {"command": "a", "replicas": {"min": 0}},
        {"command": "a", "replicas": "x"},
        {"command": "a", "success": "cheif"},
        [],
        "a",
        {"apiVersion": "v1", "kind": "TrainingJob", "spec": {"command": "a"}},
        {"kind": "TrainingJob", "spec": {"command": "a"}},
        {"apiVersion": "jobsched.dev/v1alpha1", "kind": "TrainingJob", "spec": {"comand": "a"}},
    ],
)
def test_what_editors_should_underline(fields: object) -> None:
    assert not ACCEPTS(fields)


def test_defaults_and_descriptions_are_for_people() -> None:
    defs = SCHEMA["$defs"]
    assert isinstance(defs, dict)
    properties = defs["Job"]["properties"]
    assert properties["start_timeout"]["default"] == "10m"
    assert defs["Checkpoint"]["properties"]["grace"]["default"] == "30s"
    assert "h100:8" in properties["gpu"]["description"]
    for name, kind in defs.items():
        for field, schema in kind.get("properties", {}).items():
            assert name == "WrappedJob" or "description" in schema, f"{name}.{field}"
