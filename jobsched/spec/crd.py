"""jobsched's Kubernetes objects, `TrainingJob` and `TrainingQueue`, as CustomResourceDefinitions made from the models.

`jobsched schema --crd` prints them and `configs/manifests/base/crds.yaml` holds them. A structural schema has no type
that is a number or a text or an object, so such notations are open there and hemmed in by what schemas can say of
each kind of value; rules between fields are CEL, in the schema where it can see both fields, else in an admission
policy. What neither can say, `jobsched.operator` says in the object's conditions. Pure; jobsched itself never validates
with it.

Sources: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/ (structural
schemas, rules), https://kubernetes.io/docs/reference/access-authn-authz/validating-admission-policy/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

from jobsched.spec.fields import ENV_NAME, LABEL, NAME, SpecModel
from jobsched.spec.gpu import GPU_KIND, GpuRequest
from jobsched.spec.job import API_VERSION, KIND, MAX_REPLICAS, ROLE_ONLY
from jobsched.spec.queue import QueueSpec
from jobsched.spec.schema import Schema, job_schema

GROUP, VERSION = API_VERSION.split("/")
QUEUE_KIND = "TrainingQueue"
JOBS, QUEUES = "trainingjobs", "trainingqueues"
"""Plural names, as in `kubectl get`."""
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")

MOST_ENTRIES = 1_000
"""Of a map that has no limit of its own, so that rules over it have a bounded cost."""


# ---- status ----


class StatusModel(SpecModel):
    """What the operator writes; names as Kubernetes writes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, alias_generator=to_camel,
                              populate_by_name=True)


class Condition(StatusModel):
    """A fact with since-when, as every Kubernetes object has them."""

    type: str
    """Accepted | Running | Complete | Failed (jobs), Ready (queues)."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str
    """One word."""
    message: str = ""
    """A sentence."""
    last_transition_time: str
    """Since when."""
    observed_generation: int = 0
    """Edit of the object that it is about."""


class RoleStatus(StatusModel):
    """Replicas of one role."""

    wanted: int = 0
    """How many there should be."""
    running: int = 0
    """How many run."""


class JobStatus(StatusModel):
    """Where the job stands."""

    observed_generation: int = 0
    """Newest edit of the object that was acted on."""
    job_id: str = ""
    """Id of the job, as `jobsched get` takes it; of an array: the array's."""
    phase: str = ""
    """QUEUED | STARTING | RUNNING | STOPPING | SUCCEEDED | FAILED | CANCELLED, or REFUSED."""
    reason: str = ""
    """Why it is in its phase, in one word."""
    message: str = ""
    """The same in a sentence."""
    queue: str = ""
    """Queue that it waits in."""
    priority: int = 0
    """Its priority now."""
    attempt: int = 0
    """Number of its starts."""
    restarts: int = 0
    """Restarts so far, of the job or of single replicas."""
    ready: str = ""
    """Running and wanted replicas of all roles: 3/4."""
    replicas: int = 0
    """Replicas of role worker that there are; for kubectl scale."""
    selector: str = ""
    """Labels of the pods of role worker; for kubectl scale and autoscalers."""
    roles: Mapping[str, RoleStatus] = {}
    """Replicas by role."""
    started_at: str | None = None
    """When it first ran."""
    ended_at: str | None = None
    """When it ended."""
    conditions: tuple[Condition, ...] = ()
    """Accepted, Running, Complete and Failed."""


class QueueStatus(StatusModel):
    """How the queue does."""

    observed_generation: int = 0
    """Newest edit of the object that was acted on."""
    waiting: int = 0
    """Jobs that wait."""
    active: int = 0
    """Jobs that hold resources."""
    gpus: str = ""
    """GPUs that they hold."""
    conditions: tuple[Condition, ...] = ()
    """Ready."""


# ---- documents ----


def manifests() -> list[Schema]:
    """Everything to install, in order: both definitions, the admission policy and its binding."""
    return [job_crd(), queue_crd(), *admission()]


def job_crd() -> Schema:
    whole = job_schema()
    defs = cast(dict[str, Schema], whole["$defs"])
    priority = cast(dict[str, Schema], defs["Job"]["properties"])["priority"]
    priority |= cast(list[Schema], priority.pop("anyOf"))[-1]  # here bounds can only hold for numbers: priority_class
    spec = _structural(defs["Job"], defs, "Job")
    spec["anyOf"] = [{"required": ["roles"]}, {"required": ["command"]}]
    cast(Schema, spec["properties"])["scale"] = _SCALE
    return _definition(
        KIND, JOBS, "trainingjob", ["tj", "tjob"], spec, _structural_of(JobStatus), _ROOT_RULES,
        columns=[
            ("Phase", "string", ".status.phase", ""), ("Reason", "string", ".status.reason", ""),
            ("Ready", "string", ".status.ready", "running/wanted replicas"),
            ("Queue", "string", ".status.queue", ""), ("Age", "date", ".metadata.creationTimestamp", ""),
            ("Restarts", "integer", ".status.restarts", "", 1), ("Priority", "integer", ".status.priority", "", 1),
            ("Message", "string", ".status.message", "", 1), ("Job", "string", ".status.jobId", "", 1),
        ],
        scale={"specReplicasPath": ".spec.scale.replicas", "statusReplicasPath": ".status.replicas",
               "labelSelectorPath": ".status.selector"},
    )  # fmt: skip


def queue_crd() -> Schema:
    spec = cast(Schema, QueueSpec.model_json_schema(ref_template="#/$defs/{model}"))
    return _definition(
        QUEUE_KIND, QUEUES, "trainingqueue", ["tq"], _structural(spec, cast(dict[str, Schema], spec["$defs"]), "Queue"),
        _structural_of(QueueStatus), _ROOT_RULES,
        columns=[
            ("Cohort", "string", ".spec.cohort", ""), ("Weight", "integer", ".spec.weight", ""),
            ("Waiting", "integer", ".status.waiting", ""), ("Active", "integer", ".status.active", ""),
            ("GPUs", "string", ".status.gpus", "GPUs in use"),
            ("Ready", "string", ".status.conditions[?(@.type==\"Ready\")].status", ""),
            ("Age", "date", ".metadata.creationTimestamp", ""),
        ],
    )  # fmt: skip


def _definition(
    kind: str, plural: str, singular: str, short: list[str], spec: Schema, status: Schema, rules: Sequence[Schema],
    columns: Sequence[tuple[object, ...]], scale: Mapping[str, str] | None = None,
) -> Schema:  # fmt: skip
    subresources: Schema = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": singular,
                      "shortNames": short, "categories": ["jobsched"]},
            "versions": [{
                "name": VERSION, "served": True, "storage": True,
                "schema": {"openAPIV3Schema": {
                    "description": spec.get("description", ""),
                    "type": "object",
                    "required": ["spec"],
                    "properties": {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
                                   "metadata": {"type": "object"}, "spec": spec, "status": status},
                    "x-kubernetes-validations": list(rules),
                }},
                "subresources": subresources | ({"scale": dict(scale)} if scale else {}),
                "additionalPrinterColumns": [_column(*column) for column in columns],
            }],
        },
    }  # fmt: skip


def _column(name: object, kind: object, path: object, description: object, priority: object = 0) -> Schema:
    column: Schema = {"name": name, "type": kind, "jsonPath": path}
    return column | ({"description": description} if description else {}) | ({"priority": priority} if priority else {})


# ---- schemas ----

_LIMITS: Mapping[str, tuple[str, ...]] = {
    "string": ("pattern", "minLength", "maxLength", "enum"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "multipleOf"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
    "boolean": (),
}
_ANYTHING: Schema = {"x-kubernetes-preserve-unknown-fields": True}


def _structural_of(model: type[StatusModel]) -> Schema:
    schema = cast(Schema, model.model_json_schema(ref_template="#/$defs/{model}"))
    found = _structural(schema, cast(dict[str, Schema], schema.get("$defs", {})), model.__name__)
    conditions = cast(Schema, cast(Schema, found["properties"])["conditions"])
    return found | {"properties": cast(Schema, found["properties"]) | {"conditions": conditions | {
        "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}}}


def _structural(schema: Schema, defs: Mapping[str, Schema], at: str) -> Schema:
    """A JSON Schema as a structural schema. `at` (`Model` or `Model.field`) names the rules that belong to it."""
    whole, choices = _choices(schema, defs, at)
    if not any({"type", "enum", "properties"} & choice.keys() for choice, _ in choices):
        return _ANYTHING
    kinds = {kind: choice for choice, _ in choices for kind in _kinds(choice)}
    found: Schema = {"description": whole["description"]} if "description" in whole else {}
    if "null" in kinds and _RULES.get(at) is None:
        found["nullable"] = True
    kinds.pop("null", None)
    if len(kinds) > 1 or len(choices) > 2:
        return found | _open(choices)
    [(kind, typed)] = kinds.items()
    name = next(name for choice, name in choices if choice is typed)
    found["type"] = kind
    found |= {limit: typed[limit] for limit in (*_LIMITS["string"], *_LIMITS["array"], *_LIMITS["object"])
              if limit in typed}
    found |= _bounds(typed)
    if "enum" in typed:
        found["maxLength"] = max(map(len, cast(list[str], typed["enum"])))
    if kind == "array":
        found["items"] = _structural(cast(Schema, typed["items"]), defs, f"{at}[]")
    if kind == "object" and "properties" in typed:
        properties = cast(dict[str, Schema], typed["properties"])
        found["properties"] = {key: _structural(part, defs, f"{name}.{key}") for key, part in properties.items()}
        found |= {"required": typed["required"]} if "required" in typed else {}
    elif kind == "object":
        found.setdefault("maxProperties", MOST_ENTRIES)
        values = typed.get("additionalProperties")
        found["additionalProperties"] = _structural(cast(Schema, values or {}), defs, f"{at}[]")
    if rules := [*_RULES.get(at, ()), *(_RULES.get(name, ()) if name != at else ())]:
        found["x-kubernetes-validations"] = rules
    return found


def _choices(schema: Schema, defs: Mapping[str, Schema], name: str) -> tuple[Schema, list[tuple[Schema, str]]]:
    """The schema with its reference followed, and what a value may be: each with the name of its model."""
    if "$ref" in schema:
        model = str(schema["$ref"]).rpartition("/")[2]
        target, choices = _choices(defs[model], defs, model)
        return target | {key: schema[key] for key in ("description",) if key in schema}, choices
    if "anyOf" not in schema:
        return schema, [(schema, name)]
    inner = [pair for choice in cast(list[Schema], schema["anyOf"]) for pair in _choices(choice, defs, name)[1]]
    return schema, inner


def _kinds(choice: Schema) -> list[str]:
    kinds = choice.get("type", "object")
    return cast(list[str], kinds) if isinstance(kinds, list) else [str(kinds)]


def _bounds(choice: Schema) -> Schema:
    """Limits of a number; in the OpenAPI of Kubernetes an exclusive bound is a flag beside the bound."""
    found: Schema = {limit: choice[limit] for limit in ("minimum", "maximum", "multipleOf") if limit in choice}
    if "exclusiveMinimum" in choice:
        found |= {"minimum": choice["exclusiveMinimum"], "exclusiveMinimum": True}
    return found


def _open(choices: Sequence[tuple[Schema, str]]) -> Schema:
    """Several kinds of values: limits that hold for each kind, since each limit is about one kind only; kinds that are
    not among them are excluded as far as that can be said (a number cannot be)."""
    found = dict(_ANYTHING)
    kinds = {kind for choice, _ in choices for kind in _kinds(choice)}
    if kinds == {"integer", "string"}:
        return {"x-kubernetes-int-or-string": True}
    for choice, _ in choices:
        for kind in _kinds(choice):
            found |= {limit: choice[limit] for limit in _LIMITS.get(kind, ()) if limit in choice and kind != "number"}
            if kind in ("number", "integer"):
                found |= _bounds(choice)
            if kind == "integer":
                found["multipleOf"] = 1
    excluded: list[object] = [] if "boolean" in kinds else [True, False]
    excluded += [] if "null" in kinds else [None]
    if "array" not in kinds:
        found["maxItems"] = 0
        excluded.append([])
    if "object" not in kinds:
        found["maxProperties"] = 0
        excluded.append({})
    return found | {"not": {"enum": excluded}}


_SCALE: Schema = {
    "description": "What kubectl scale writes: how many replicas role worker shall have now, instead of its prefer.",
    "type": "object",
    "properties": {"replicas": {"type": "integer", "minimum": 1, "maximum": MAX_REPLICAS,
                                "description": "Between the role's min and max."}},
}
"""Its own field, because a path of the scale subresource must lead to a number in every object, and `replicas` of a
role may be text or `{min, max, prefer}`; `jobsched.load` puts it there."""


# ---- rules that the schema can see ----


def _rule(rule: str, message: str, words: str = "") -> Schema:
    """`words`: CEL that makes the message; `message` is for when it cannot."""
    found: Schema = {"rule": rule, "message": message}
    return found | ({"messageExpression": words} if words else {})


def _keys(pattern: str, what: str) -> Schema:
    """Every key of a map matches."""
    wrong = f"!key.matches(r'^({pattern})$')"
    return _rule(f"!self.exists(key, {wrong})", f"a key is not {what}",
                 f"'not {what}: ' + self.filter(key, {wrong})[0]")


_ROOT_RULES = (
    _rule(f"self.metadata.name.matches(r'^({NAME.pattern})$')",
          "metadata.name is not a name; use lower-case letters, digits and '-', at most 52"),
    _rule("!has(self.spec.name) || self.spec.name == self.metadata.name",
          "spec.name is not metadata.name; keep one of the two"),
)  # fmt: skip
_AMOUNTS = (_keys(f"gpus|cpu|memory|{GPU_KIND.pattern}", "a resource (gpus, cpu, memory or a GPU kind)"),)
_RULES: Mapping[str, Sequence[Schema]] = {
    "Job.roles": (
        _rule("size(self) > 0", "a job needs at least one role with a command"),
        _keys("[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?", "a role name (lower-case letters, digits and -, at most 24)"),
        _rule("size(self) == 0 || self.exists(role, !(role in ['ps', 'evaluator']))",
              "a job needs a role that trains; ps and evaluator only serve"),
    ),
    "Job": (
        _rule("!has(self.success) || self.success != 'chief' || (has(self.roles) && 'chief' in self.roles)",
              "success is 'chief' but there is no role 'chief'"),
        _rule("!has(self.success) || self.success != 'worker0' || !has(self.roles) || 'worker' in self.roles",
              "success is 'worker0' but there is no role 'worker'"),
        _rule("has(self.after) == has(oldSelf.after) && (!has(self.after) || self.after == oldSelf.after)",
              "after cannot be changed; delete the job and apply it again"),
    ),
    "Placement": (
        _rule("!has(self.spread) || !has(self.within) || self.spread == '' || self.within == '' ||"
              " self.within == 'zone' && self.spread in ['node', 'rack'] ||"
              " self.within in ['nvlink', 'rack'] && self.spread == 'node'",
              "replicas cannot be within one domain and spread over larger ones"),
    ),
    "Queue.quota": _AMOUNTS, "Queue.borrowing_limit": _AMOUNTS, "Queue.lending_limit": _AMOUNTS,
}  # fmt: skip


# ---- rules that it cannot see: the admission policy ----


def admission() -> list[Schema]:
    """Rules about fields that are open in the schema, and about what an edit may do."""
    name = f"{JOBS}.{GROUP}"
    rules = {"apiGroups": [GROUP], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"], "resources": [JOBS]}
    policy: Schema = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [rules]},
            "variables": [
                {"name": "top", "expression": "dyn(object.spec)"},
                {"name": "roles", "expression": "has(variables.top.roles) ? variables.top.roles :"
                                                " dyn({'worker': variables.top})"},
                {"name": "old", "expression": "request.operation == 'UPDATE' ? dyn(oldObject.spec) : dyn({})"},
                {"name": "path", "expression": "has(variables.top.roles) ? 'spec.roles.' : 'spec.'"},
            ],
            "validations": list(_policy_rules()),
        },
    }
    binding: Schema = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    }
    return [policy, binding]


def _policy_rules() -> Iterator[Schema]:
    numbers = "['min', 'max', 'prefer']"
    low = "(has(F.min) ? F.min : 1)"
    high = "(has(F.max) ? F.max : has(F.prefer) ? F.prefer : has(F.min) ? F.min : 1)"
    yield _of_roles("replicas", f"type(F) != map || F.all(k, k in {numbers} && type(F[k]) == int)",
                    "has whole numbers min, max and prefer")
    yield _of_roles("replicas", f"type(F) != map || F.exists(k, !(k in {numbers}) || type(F[k]) != int) ||"
                    f" ({low} >= 1 && {low} <= (has(F.prefer) ? F.prefer : {high}) &&"
                    f" (has(F.prefer) ? F.prefer : {high}) <= {high})", "needs 1 <= min <= prefer <= max")
    yield _of_roles("replicas", f"r != 'chief' || (type(F) == map ? {high} == 1 : F == 1 || F == '1')",
                    "there is one chief; use role worker for the others")
    yield _of_roles("gpu", "type(F) != map || F.all(k, k in ['type', 'memory', 'count', "
                    + ", ".join(f"'{name}'" for name in GpuRequest.model_fields) + "])", "has type, memory and count")
    yield _of_roles("command", "type(F) == string || (type(F) == list && F.all(w, type(w) != map && type(w) != list))",
                    "is text for the shell, or a list of words")
    for field in ("env", "ports"):
        yield _of_roles(field, f"F.all(key, F[key] != null && key.matches(r'^({ENV_NAME.pattern})$'))",
                        "names have letters, digits and _, and every one a value")
    for field, pattern in (("env", ENV_NAME.pattern), ("labels", LABEL.pattern), ("placement.nodes", LABEL.pattern)):
        there = " && ".join(f"has(variables.top.{field[:end]})" for end in _ends(field))
        wrong = f"variables.top.{field}[key] == null || !key.matches(r'^({pattern})$')"
        yield {"expression": f"!({there}) || !variables.top.{field}.exists(key, {wrong})", "reason": "Invalid",
               "messageExpression": f"'spec.{field}: no name, or without a value: ' + variables.top.{field}.filter(key,"
                                    f" {wrong})[0]"}
    both = " || ".join(f"has(variables.top.{name})" for name in ROLE_ONLY)
    yield {"expression": f"!has(variables.top.roles) || !({both})", "reason": "Invalid",
           "message": f"spec.roles: with roles there, {', '.join(ROLE_ONLY)} belong to a role, not to the job"}
    yield {"expression": "request.operation != 'UPDATE' || !has(oldObject.status) || !has(oldObject.status.phase) ||"
                         f" !(oldObject.status.phase in {list(ENDED)}) || dyn(object.spec) == dyn(oldObject.spec)",
           "reason": "Invalid", "messageExpression": "'spec: the job has ended (' + oldObject.status.phase +"
                                                     " '); delete it and apply it again to run it anew'"}
    yield {"expression": "request.operation != 'UPDATE' || (has(variables.top.array) == has(variables.old.array) &&"
                         " (!has(variables.top.array) || variables.top.array == variables.old.array))",
           "reason": "Invalid", "message": "spec.array: cannot be changed; delete the job and apply it again"}


def _ends(field: str) -> list[int]:
    """Where the path ends, and each part of it."""
    return [*(match.start() for match in re.finditer(r"\.", field)), len(field)]


def _of_roles(field: str, holds: str, words: str) -> Schema:
    """A rule about a field of every role `r` that has it; `F` stands for its value."""
    value = f"variables.roles[r].{field}"
    good = re.sub(r"\bF\b", value, holds)
    return {
        "expression": f"variables.roles.all(r, !has({value}) || ({good}))",
        "reason": "Invalid",
        "messageExpression": f"variables.path + (has(variables.top.roles) ? variables.roles.filter(r, has({value}) &&"
                             f" !({good}))[0] + '.' : '') + '{field}: {words}'",
    }
