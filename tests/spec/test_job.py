from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError

from jobsched import load
from jobsched.spec.job import (
    ArraySpec,
    JobSpec,
    Replicas,
    RestartPolicy,
    RestartScope,
    RoleSpec,
    restart_policy,
    training_roles,
)
from tests.spec import strategies


def a_job(**fields: object) -> JobSpec:
    return JobSpec.model_validate({"roles": {"worker": {"command": "true"}}} | fields)


@pytest.mark.parametrize(
    ("written", "bounds"),
    [
        (4, (4, 4, 4)),
        ("4", (4, 4, 4)),
        ("2..4", (2, 4, 4)),
        ({"min": 2, "max": 8, "prefer": 6}, (2, 8, 6)),
        ({"min": 2, "max": 8}, (2, 8, 8)),
        ({"prefer": 3}, (1, 3, 3)),
        ({"max": 3}, (1, 3, 3)),
        ({"min": 3}, (3, 3, 3)),
        ({}, (1, 1, 1)),
    ],
)
def test_replicas(written: object, bounds: tuple[int, int, int]) -> None:
    replicas = Replicas.model_validate(written)
    assert (replicas.min, replicas.max, replicas.prefer) == bounds
    assert replicas.elastic == (replicas.min != replicas.max)


@pytest.mark.parametrize(
    "written", [0, -1, 10_001, True, 2.0, "4..2", "many", {"min": 3, "max": 2}, {"min": "2"}, {"least": 1}, None]
)
def test_replica_nonsense(written: object) -> None:
    with pytest.raises(ValidationError):
        Replicas.model_validate(written)


@pytest.mark.parametrize(
    ("written", "indices", "parallel"),
    [
        ("0-3", (0, 1, 2, 3), 0),
        ("5,1,3", (1, 3, 5), 0),
        ("0-5%2", (0, 1, 2, 3, 4, 5), 2),
        (3, (0, 1, 2), 0),
        ("7", (7,), 0),
        ({"indices": [9, 1, 1], "max_parallel": 1}, (1, 9), 1),
        (" 0 - 1 , 4 % 2 ", (0, 1, 4), 2),
    ],
)
def test_arrays(written: object, indices: tuple[int, ...], parallel: int) -> None:
    array = ArraySpec.model_validate(written)
    assert (array.indices, array.max_parallel) == (indices, parallel)
    assert ArraySpec.model_validate(str(array)) == array


@pytest.mark.parametrize(
    "written",
    [
        "",
        "x",
        "3-1",
        "-5",
        "0-",
        "1,,2",
        "0-100000",
        "0-99999,100000",
        0,
        -3,
        100_001,
        True,
        1.0,
        {},
        {"indices": []},
        "0-9%x",
        "0-9%",
        "0-9%-1",
        pytest.param("0" + " " * 100_000 + "x", id="spaces"),
        pytest.param(",".join(["0-99999"] * 100_000), id="the same again and again"),
    ],
)
def test_array_nonsense(written: object) -> None:
    with pytest.raises(ValidationError):
        ArraySpec.model_validate(written)


def test_a_large_array_is_small_in_json() -> None:
    spec = a_job(array="0-49999,60000-99999%100")
    assert spec.array is not None
    assert len(spec.array.indices) == 90_000
    assert len(spec.model_dump_json()) < 2_000
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"roles": {}}, "at least one role"),
        ({"roles": {"ps": {"command": "a"}}}, "role that trains"),
        ({"roles": {"worker": {}}}, "needs a command"),
        ({"roles": {"worker": {"command": "  "}}}, "needs a command"),
        ({"roles": {"worker": {"command": []}}}, "needs a command"),
        ({"roles": {"worker": {"command": ["a", None]}}}, "is not a command"),
        ({"roles": {"worker": {"command": "a\0b"}}}, "NUL"),
        ({"roles": {"worker": {"command": "a", "env": {"A": "a\0b"}}}}, "pattern"),
        ({"roles": {"worker": {"command": "a", "env": {"A": "secret://"}}}}, "reference to a secret"),
        ({"roles": {"worker": {"command": "a", "env": {"1A": "x"}}}}, "not a variable name"),
        ({"roles": {"worker": {"command": "a", "ports": {"http": 70_000}}}}, "65535"),
        ({"roles": {"worker": {"command": "a", "ports": {"a": 0, "A": 0}}}}, "upper and lower"),
        ({"roles": {"worker": {"command": "a", "ports": {"a": 80, "b": 80}}}}, "same number"),
        ({"roles": {"worker": {"command": "a", "preload": ["a b"]}}}, "Python module"),
        ({"roles": {"Worker": {"command": "a"}}}, "role name"),
        ({"roles": {"w" * 25: {"command": "a"}}}, "role name"),
        ({"roles": {"worker\n": {"command": "a"}}}, "role name"),
        ({"roles": {"chief": {"command": "a", "replicas": 2}}}, "one chief"),
        ({"roles": {f"r{i}": {"command": "a", "replicas": 5_000} for i in range(3)}}, "15,000 replicas"),
        ({"success": "chief"}, "no role 'chief'"),
        ({"roles": {"trainer": {"command": "a"}}, "success": "worker0"}, "no role 'worker'"),
        ({"name": "a\n"}, "not a name"),
        ({"labels": {"a=b": "c"}}, "label name"),
        ({"priority": "5"}, "integer"),
        ({"priority": 2**63}, "less than or equal"),
        ({"placement": {"within": "node", "spread": "node"}}, "cannot be within"),
        ({"restart": {"backoff": "1h", "backoff_max": "1m"}}, "below backoff"),
        ({"restart": {"retry_on": [200], "fail_on": [200]}}, "both"),
        ({"restart": {"retry_on": [256]}}, "255"),
    ],
)
def test_impossible_jobs(fields: Mapping[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        a_job(**fields)


def test_training_roles_put_the_chief_first() -> None:
    roles = {name: {"command": "a"} for name in ("worker", "ps", "chief", "evaluator")}
    assert training_roles(a_job(roles=roles)) == ("chief", "worker")


def test_scope_of_a_restart() -> None:
    with_servers = a_job(
        roles={
            "ps": {"command": "a"},
            "worker": {"command": "a"},
            "own": {"command": "a", "restart": {"scope": "role"}},
        }
    )
    assert restart_policy(with_servers, "ps").scope is RestartScope.REPLICA
    assert restart_policy(with_servers, "worker").scope is RestartScope.REPLICA
    assert restart_policy(with_servers, "own").scope is RestartScope.ROLE
    assert restart_policy(a_job(), "worker").scope is RestartScope.JOB
    assert restart_policy(a_job(restart={"max": 7}), "worker") == RestartPolicy(scope=RestartScope.JOB, max=7)


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        a_job().priority = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        RoleSpec(command="a").cpu = 3  # type: ignore[misc]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.jobs)
def test_every_spec_reads_back_from_its_json(fields: dict[str, object]) -> None:
    spec = load.load_job_dict(fields)
    dumped = spec.model_dump(mode="json")
    assert JobSpec.model_validate(dumped) == spec
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert load.load_job_dict(dumped) == spec


def test_a_priority_may_be_named() -> None:
    spec = JobSpec.model_validate({"priority": "high", "roles": {"worker": {"command": "x"}}})
    assert (spec.priority, spec.priority_class) == (0, "high")
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match="priority is 'high' and priority_class 'low'"):
        JobSpec.model_validate({"priority": "high", "priority_class": "low", "roles": {"worker": {"command": "x"}}})
    with pytest.raises(ValidationError, match="priority_class"):
        JobSpec.model_validate({"priority_class": "not a name!", "roles": {"worker": {"command": "x"}}})
