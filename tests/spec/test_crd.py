"""The Kubernetes definitions: what the API server demands of every schema, that the file in the repository is what the
models give, and on a real API server, that good jobs pass and each wrong one is refused with its field named."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from jobsched import load
from jobsched.cli.main import cli
from jobsched.errors import SpecError
from jobsched.spec import document
from jobsched.spec.crd import job_crd, queue_crd
from tests.control_plane import MANIFESTS, Kubectl, cluster
from tests.fuzz_specs import seeds

__all__ = ["cluster"]

Json = dict[str, Any]
WORKER = ("roles", "worker")


def test_the_file_is_what_the_models_give() -> None:
    printed = CliRunner().invoke(cli, ["schema", "--crd"], catch_exceptions=False).stdout
    held = (MANIFESTS / "base" / "crds.yaml").read_text()
    assert held == printed, "write it anew: jobsched schema --crd > configs/manifests/base/crds.yaml"


def schema_of(definition: Json) -> Json:
    [version] = definition["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]


def parts(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    yield path, schema
    for name, part in schema.get("properties", {}).items():
        yield from parts(part, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from parts(schema[name], f"{path}[]")


@pytest.mark.parametrize("definition", [job_crd(), queue_crd()], ids=["job", "queue"])
def test_every_schema_is_structural(definition: Json) -> None:
    known = {
        "type", "description", "properties", "required", "items", "additionalProperties", "nullable", "enum", "pattern",
        "minimum", "maximum", "exclusiveMinimum", "multipleOf", "minItems", "maxItems", "minLength", "maxLength",
        "minProperties", "maxProperties", "anyOf", "not", "x-kubernetes-validations", "x-kubernetes-int-or-string",
        "x-kubernetes-preserve-unknown-fields", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
    }  # fmt: skip
    for path, schema in parts(schema_of(definition)):
        assert schema.keys() <= known, path
        free = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-int-or-string")
        assert ("type" in schema) != bool(free), path
        assert schema.get("type") in (None, "object", "array", "string", "integer", "number", "boolean"), path
        assert not ("properties" in schema and "additionalProperties" in schema), path


def test_no_field_of_a_job_is_missing() -> None:
    spec = schema_of(job_crd())["properties"]["spec"]["properties"]
    job = load.json_schema()["$defs"]["Job"]["properties"]  # type: ignore[index]
    assert set(spec) == {*job, "scale"}


# ---- a real API server ----


def a_job(**fields: Any) -> Json:
    return {"roles": {"worker": {
        "command": ["python", "train.py"], "replicas": {"min": 2, "max": 4, "prefer": 3}, "cpu": 0.5,
        "memory": "512Mi", "gpu": "any:1"}}} | fields  # fmt: skip


def with_(value: Any, *path: str, spec: Json | None = None) -> Json:
    """A good job but for one field; `...` takes the field away."""
    changed = copy.deepcopy(spec or a_job())
    part = changed
    for step in path[:-1]:
        part = part.setdefault(step, {})
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return changed


def wrapped(spec: Json, name: str = "x", kind: str = "TrainingJob") -> Json:
    return {"apiVersion": "jobsched.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


WRONG: dict[str, tuple[Json, str]] = {
    # what is wrong: (spec, the field that the answer names)
    "a field that is not there": (with_(5, "walltime"), "spec.walltime"),
    "a field that a role has not": (with_(5, *WORKER, "replica"), "spec.roles.worker.replica"),
    "text for a number": (with_("1.5", "priority"), "spec.priority"),
    "a number out of range": (with_(10_000_000, "priority"), "spec.priority"),
    "not one of the choices": (with_("cheif", "success"), "spec.success"),
    "not a signal": (with_("KILL", "checkpoint", "signal"), "spec.checkpoint.signal"),
    "not a duration": (with_("four hours", "time_limit"), "spec.time_limit"),
    "not a size": (with_("5 potatoes", *WORKER, "memory"), "spec.roles.worker.memory"),
    "a list for a size": (with_([1], *WORKER, "memory"), "spec.roles.worker.memory"),
    "a truth for a size": (with_(True, *WORKER, "memory"), "spec.roles.worker.memory"),
    "CPUs below nothing": (with_(-1, *WORKER, "cpu"), "spec.roles.worker.cpu"),
    "not GPUs": (with_("h100;8", *WORKER, "gpu"), "spec.roles.worker.gpu"),
    "no GPU": (with_("h100:0", *WORKER, "gpu"), "spec.roles.worker.gpu"),
    "a field that GPUs have not": (with_({"typ": "h100"}, *WORKER, "gpu"), "spec.roles.worker.gpu"),
    "no replica": (with_(0, *WORKER, "replicas"), "spec.roles.worker.replicas"),
    "half a replica": (with_(1.5, *WORKER, "replicas"), "spec.roles.worker.replicas"),
    "more at least than at most": (with_({"min": 4, "max": 2}, *WORKER, "replicas"), "spec.roles.worker.replicas"),
    "not a range of replicas": (with_("2-4", *WORKER, "replicas"), "spec.roles.worker.replicas"),
    "two chiefs": (with_({"command": "a", "replicas": 2}, "roles", "chief"), "spec.roles.chief.replicas"),
    "no command": (with_(..., *WORKER, "command"), "spec.roles.worker.command"),
    "an empty command": (with_([], *WORKER, "command"), "spec.roles.worker.command"),
    "a number for a command": (with_(5, *WORKER, "command"), "spec.roles.worker.command"),
    "a list in a command": (with_(["a", ["b"]], *WORKER, "command"), "spec.roles.worker.command"),
    "no role": ({"env": {}}, "spec.roles"),
    "only serving roles": ({"roles": {"ps": {"command": "a"}}}, "spec.roles"),
    "not the name of a role": ({"roles": {"Worker_1": {"command": "a"}}}, "spec.roles"),
    "roles and the shorthand": (with_(1, "cpu"), "spec.roles"),
    "the shorthand, wrong": ({"command": "a", "replicas": {"min": 3, "max": 1}}, "spec.replicas"),
    "not the name of a variable": (with_("a", "env", "1A"), "spec.env"),
    "the same in a role": (with_("a", *WORKER, "env", "a-b"), "spec.roles.worker.env"),
    "a list for a variable": (with_([1], "env", "A"), "spec.env.A"),
    "not the name of a label": (with_("a", "labels", "a b"), "spec.labels"),
    "not the name of a queue": (with_("My Queue", "queue"), "spec.queue"),
    "another name": (with_("other", "name"), "spec.name"),
    "success of a role that is not there": (with_("chief", "success"), "success"),
    "within less than spread": (with_({"within": "node", "spread": "rack"}, "placement"), "spec.placement"),
    "an exit code of none": (with_([0], "restart", "retry_on"), "spec.restart.retry_on"),
    "a port that is none": (with_({"http": 70_000}, *WORKER, "ports"), "spec.roles.worker.ports.http"),
    "not an array": (with_("a-b", "array"), "spec.array"),
    "scaled to nothing": (with_({"replicas": 0}, "scale"), "spec.scale.replicas"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_loader_refuses_it_too(what: str) -> None:
    with pytest.raises(SpecError):
        load.load_job_dict(wrapped(WRONG[what][0]))


@pytest.mark.e2e
def test_wrong_objects_are_refused_with_the_field_named(cluster: Kubectl) -> None:
    _await_policy(cluster)
    said = {what: cluster.run("apply", "--dry-run=server", "-f", "-", given=wrapped(spec))
            for what, (spec, _) in WRONG.items()}
    accepted = [what for what, done in said.items() if done.returncode == 0]
    unnamed = {what: done.stderr for what, done in said.items() if WRONG[what][1] not in done.stderr}
    assert not accepted
    assert not unnamed


GOOD: dict[str, Json] = {
    "a number of replicas": with_(3, *WORKER, "replicas"),
    "a range as text": with_("2..4", *WORKER, "replicas"),
    "the shorthand": {"command": "python train.py", "replicas": 2, "gpu": 2, "cpu": "500m"},
    "GPUs as a list": with_(["h100:8", "a100:8"], *WORKER, "gpu"),
    "GPUs as a mapping": with_({"type": ["h100"], "memory": "24GB..", "count": 0.5}, *WORKER, "gpu"),
    "GPUs with memory": with_("h100|a100(40GB..):8", *WORKER, "gpu"),
    "a slice of a GPU": with_("h100-80gb:1g.10gb:1", *WORKER, "gpu"),
    "durations": a_job(time_limit="1-12:00:00", hang_timeout=90, start_timeout="1h 30m", heartbeat_timeout=7.5),
    "an array": a_job(array="0-9,12%4"),
    "a pod": a_job(kubernetes={"pod": {"spec": {"priorityClassName": "high", "tolerations": [{"key": "a"}]}}}),
    "scaled": a_job(scale={"replicas": 4}),
}  # fmt: skip


@pytest.mark.parametrize("what", GOOD)
def test_the_loader_takes_it(what: str) -> None:
    load.load_job_dict(wrapped(GOOD[what]))


@pytest.mark.e2e
def test_what_the_loader_takes_is_accepted(cluster: Kubectl) -> None:
    examples = {f"seed {n}": document.parse(text, "")[0].plain for n, text in enumerate(seeds())}
    specs = GOOD | {name: _spec_of(plain) for name, plain in examples.items() if isinstance(plain, dict)}
    said = {what: cluster.run("apply", "--dry-run=server", "-f", "-", given=wrapped(spec))
            for what, spec in specs.items()}
    assert not {what: done.stderr for what, done in said.items() if done.returncode}


def _spec_of(plain: Json) -> Json:
    """A job file as an object's spec; anchors and names that are not this object's are the file's own."""
    spec = plain.get("spec", plain)
    return {key: value for key, value in spec.items() if not key.startswith("x-") and key != "name"}


@pytest.mark.e2e
def test_edits_that_nobody_could_apply_are_refused(cluster: Kubectl) -> None:
    _await_policy(cluster)
    cluster("apply", "-f", "-", given=wrapped(a_job(array="0-3"), "edited"))
    try:
        again = cluster.run("apply", "-f", "-", given=wrapped(a_job(array="0-5"), "edited"))
        assert "spec.array: cannot be changed" in again.stderr
        cluster("patch", "tj/edited", "--subresource=status", "--type=merge", "-p", '{"status":{"phase":"SUCCEEDED"}}')
        late = cluster.run("patch", "tj/edited", "--type=merge", "-p", '{"spec":{"priority":5}}')
        assert "the job has ended (SUCCEEDED)" in late.stderr
        cluster("label", "tj/edited", "team=a")
    finally:
        cluster("delete", "tj/edited", "--wait=false")


@pytest.mark.e2e
def test_queues(cluster: Kubectl) -> None:
    good = {"cohort": "all", "weight": 2, "quota": {"gpus": 16, "h100": 8, "memory": "1Ti"}, "budget": {"gpu_hours": 9}}
    wrong = {"weight": (-1, "spec.weight"), "quota": ({"GPU": 8}, "spec.quota"), "qouta": ({}, "spec.qouta"),
             "budget": ({"window": "2d"}, "spec.budget.gpu_hours"), "paused": ("yes", "spec.paused")}
    cluster("apply", "--dry-run=server", "-f", "-", given=wrapped(good, "team-a", "TrainingQueue"))
    for field, (value, named) in wrong.items():
        done = cluster.run("apply", "--dry-run=server", "-f", "-", given=wrapped({field: value}, "q", "TrainingQueue"))
        assert done.returncode, field
        assert named in done.stderr


def _await_policy(cluster: Kubectl) -> None:
    """An admission policy works a moment after it was written."""
    until = time.monotonic() + 240
    wrong = wrapped(WRONG["two chiefs"][0])
    while cluster.run("apply", "--dry-run=server", "-f", "-", given=wrong).returncode == 0:
        assert time.monotonic() < until, "the admission policy does not work"
        time.sleep(0.2)
