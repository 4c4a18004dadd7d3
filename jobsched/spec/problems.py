"""What pydantic found wrong with a document, as problems with places, in plain words.

`jobsched.load` hands over pydantic's errors and the tree that they are about; nothing here reads or decides.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from jobsched.errors import Problem
from jobsched.spec.document import Node
from jobsched.spec.gpu import GpuRequest
from jobsched.spec.job import API_VERSION, KIND, ROLE_ONLY, JobSpec, RoleSpec
from jobsched.spec.quantity import show

MOST_PROBLEMS = 100

_SAID_ELSEWHERE = {
    "accelerator": "gpu", "accelerators": "gpu", "num_gpus": "gpu", "gres": "gpu",
    "cpus": "cpu", "cpus_per_task": "cpu", "mem": "memory", "ram": "memory",
    "cmd": "command", "run": "command", "script": "command", "entrypoint": "command",
    "envs": "env", "environment": "env", "workdir": "working_dir", "cwd": "working_dir", "chdir": "working_dir",
    "num_nodes": "replicas", "nodes": "replicas", "count": "replicas", "parallelism": "replicas",
    "nproc_per_node": "procs", "processes": "procs", "partition": "queue", "depends_on": "after", "dependency": "after",
    "timeout": "time_limit", "walltime": "time_limit", "max_duration": "time_limit",
    "activeDeadlineSeconds": "time_limit", "runPolicy": "time_limit, clean_up and restart",
    "restartPolicy": "restart", "backoffLimit": "restart.max", "max_restarts": "restart.max", "retries": "restart.max",
    "tasks": "roles", "replica_specs": "roles", "tfReplicaSpecs": "roles", "pytorchReplicaSpecs": "roles",
    "nodeSelector": "placement.nodes", "tolerations": "placement.tolerate", "resources": "cpu, memory and gpu",
}
"""Names that other schedulers give to what we have."""


def ordered(problems: Sequence[Problem]) -> list[Problem]:
    """Problems in document order, each once; beyond MOST_PROBLEMS they are only counted."""
    found = sorted(dict.fromkeys(problems), key=lambda p: (p.file, p.line, p.column))
    rest = len(found) - MOST_PROBLEMS
    if rest > 0:
        last = found[MOST_PROBLEMS]
        found[MOST_PROBLEMS:] = [replace(last, message=f"and {rest} more problems from here on", field="", hint="")]
    return found


def explained(error: ErrorDetails, model: type[BaseModel], root: Node) -> Problem:
    """A complaint of pydantic, with its place in the tree, in words."""
    about_key = "[key]" in error["loc"]
    location = [part for part in error["loc"] if part != "[key]"]
    node, found = root, 0
    for part in location:
        value = node.value
        if isinstance(value, dict) and part in value:
            node = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            node = value[part]
        else:
            break
        found += 1
    rest = [part for part in location[found:] if isinstance(part, str)] if isinstance(node.value, dict) else []
    path = ".".join([*([node.path] if node.path else []), *rest])
    unknown = error["type"] == "extra_forbidden"
    at = node.key_at if unknown or about_key or isinstance(node.value, (dict, list, type(None))) else node.at
    if unknown:
        return at.problem(f"unknown field {show(location[-1])}", path=path,
                          hint=_unknown_hint(str(location[-1]), _model_at(model, location[:-1]), root))
    message, hint = _in_words(error)
    if hint == _MAPPING_HINT and location[:1] == ["roles"] and location[-1] in RoleSpec.model_fields:
        hint = f"{location[-1]!r} is a field of a role: is it indented too little?"
    leaf = re.sub(r".*\.", "", path)
    return at.problem(f"{leaf}: {message}" if leaf else message, path=path, hint=hint)


_MAPPING_HINT = "write its fields on lines of their own, indented"


def _in_words(error: ErrorDetails) -> tuple[str, str]:
    """Message and hint; types as in https://docs.pydantic.dev/latest/errors/validation_errors/."""
    given, context = error["input"], error.get("ctx", {})
    kind = error["type"]
    if given is None and kind != "missing":
        return "has no value", "write one, or remove the line"
    match kind:
        case "value_error":
            return str(context["error"]), ""
        case "missing":
            return "is missing", ""
        case "literal_error" | "enum":
            choices = [choice for choice in re.findall(r"'([^']*)'", str(context.get("expected", ""))) if choice]
            return f"{show(given)} is not one of {', '.join(choices)}", did_you_mean(str(given), choices)
        case "string_type":
            quotes = "put it in quotes" if isinstance(given, (bool, int, float)) else ""
            return f"must be text, not {called(given)}", quotes
        case "int_type" | "int_from_float" | "int_parsing":
            return f"must be a whole number, not {called(given)}", ""
        case "bool_type" | "bool_parsing":
            return f"must be true or false, not {called(given)}", ""
        case "greater_than_equal":
            return f"must be at least {context['ge']:,}, not {show(given)}", ""
        case "less_than_equal":
            return f"must be at most {context['le']:,}, not {show(given)}", ""
        case "too_short":
            return f"needs at least {context['min_length']}", ""
        case "too_long":
            return f"has more than {context['max_length']:,} entries", ""
        case "string_too_long":
            return f"has more than {context['max_length']:,} characters", ""
        case "string_pattern_mismatch":
            return "holds a NUL character", ""
        case "tuple_type" | "list_type":
            return f"must be a list, not {called(given)}", "write [a, b], or one '- item' per line"
        case "model_type" | "mapping_type" | "dict_type":
            return f"must be a mapping of fields, not {called(given)}", _MAPPING_HINT
        case _:
            return error["msg"], ""


def called(value: object) -> str:
    """What kind of thing a value is, for "must be a mapping, not …"."""
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return f"the text {show(value)}"
        case _:
            return show(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest of the known words; empty when none is close."""
    near = _near(word, known)
    return f"did you mean {near[0]!r}?" if near else ""


def _near(word: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word[:64], list(known), 1)


def _unknown_hint(name: str, model: type[BaseModel] | None, root: Node) -> str:
    known = list(model.model_fields) if model is not None else []
    if model is GpuRequest:
        known = ["type", "memory", "count"]
    roles = root.fields.get("roles")
    in_role = model is JobSpec and roles is not None and roles.path != root.path  # not the one-role shorthand
    if in_role and (meant := _SAID_ELSEWHERE.get(name, next(iter(_near(name, ROLE_ONLY)), ""))) in ROLE_ONLY:
        return f"{meant!r} belongs to a role: put it under roles.NAME"
    if model is JobSpec and not in_role:
        known += ROLE_ONLY
    if model is RoleSpec and name in JobSpec.model_fields:
        return f"{name!r} belongs to the job: move it to the left, out of roles"
    if model is JobSpec and name in ("metadata", "spec"):
        return f"the wrapped form begins with apiVersion: {API_VERSION} and kind: {KIND}"
    if model in (JobSpec, RoleSpec) and name in _SAID_ELSEWHERE:
        return f"here it is called {_SAID_ELSEWHERE[name]}"
    return did_you_mean(name, known) or (f"known fields: {', '.join(known)}" if known else "")


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    """The model that judged what stands at a location."""
    kind: object = model
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field is not None else None
        else:
            kind = get_args(kind)[-1] if get_origin(kind) is Mapping else next(iter(get_args(kind)), None)
        kind = _bare(kind)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _bare(kind: object) -> object:
    """A type without `Annotated` and `| None`."""
    while get_origin(kind) in (Annotated, Union, UnionType):
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    return kind
