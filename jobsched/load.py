"""The one reader of what people write: a YAML or JSON text, or a dict, becomes a validated spec.

CLI, SDK and server call it; it never talks to a server and never raises anything but `SpecError` (`ConfigError` for a
server's configuration, `UsageError` for a file that cannot be opened), whatever the text. An error carries every
problem found, each with file:line:column, the field as written, plain words and a hint.

The text first becomes a tree of nodes that know their places (`spec.document`); shorthands, the wrapped form,
`--set` and the caller's environment are edits of that tree; pydantic judges the result, and each of its complaints is
looked up in the tree again.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from jobsched.errors import ConfigError, Problem, SpecError, UsageError
from jobsched.spec import document
from jobsched.spec.document import MAX_CHARS, Malformed, Node, Place, join
from jobsched.spec.fields import SpecModel
from jobsched.spec.job import API_VERSION, KIND, ROLE_ONLY, JobSpec, Replicas
from jobsched.spec.problems import called, did_you_mean, explained, ordered
from jobsched.spec.quantity import format_duration, show
from jobsched.spec.queue import QueueSpec, distinct_queues
from jobsched.spec.schema import job_schema

if TYPE_CHECKING:
    from jobsched.spec.server import ServerConfig

EXTENSION = "x-"
"""Fields of the job that begin so are the author's own, for anchors that roles share (`x-common: &common {…}`)."""
ONE_ROLE = "worker"
TEMPLATES = ("ps", "ddp", "elastic", "array")

Overrides = Sequence[str] | Mapping[str, object]
"""`path=value` as `--set` takes it, or path -> value; a value that is text is read as YAML."""
M = TypeVar("M", bound=SpecModel)

_KUBERNETES_METADATA = frozenset({
    "annotations", "creationTimestamp", "deletionTimestamp", "finalizers", "generateName", "generation",
    "managedFields", "namespace", "ownerReferences", "resourceVersion", "selfLink", "uid",
})


# ---- jobs ----


def load_job(
    source: str | Mapping[str, object], *, file: str = "<spec>", environ: Mapping[str, str] | None = None,
    overrides: Overrides = (), directory: str = "",
) -> JobSpec:
    """The job that a YAML or JSON text (or a dict) describes, in normal form. Raises `SpecError` with every problem.

    `environ` fills environment variables without a value, and is None where they shall stay open. Relative
    directories are resolved against `directory`, in which the job also runs unless it says otherwise; empty: nothing
    is resolved. The wrapped form (`apiVersion`, `kind`, `metadata`, `spec`) and the one-role shorthand are accepted.
    """
    root, problems = _tree(source, file)
    if not isinstance(root.value, dict):
        raise SpecError([root.at.problem(f"a job is a mapping of fields, not {called(root.value)}",
                                         hint="for example: command: python train.py")])
    job = _unwrapped(root, problems)
    for key in [key for key in job.fields if key.startswith(EXTENSION)]:
        del job.fields[key]
    _one_role(job)
    _override(job, overrides, problems)
    _read_as_text(job)
    for env in _environments(job):
        _fill(env, environ, problems)
    return _resolved(_validated(JobSpec, job, problems), directory)


def load_job_dict(
    source: Mapping[str, object], *, environ: Mapping[str, str] | None = None, overrides: Overrides = (),
    directory: str = "",
) -> JobSpec:
    """`load_job` of a dict; its problems have fields but no lines."""
    return load_job(source, environ=environ, overrides=overrides, directory=directory)


def load_job_file(
    path: str | os.PathLike[str], *, environ: Mapping[str, str] | None = None, overrides: Overrides = ()
) -> JobSpec:
    """`load_job` of a file, whose directory is the one where the job runs; `-` reads standard input and runs here."""
    name = os.fspath(path)
    if name == "-":
        text = _decoded(sys.stdin.buffer.read(4 * MAX_CHARS), "<stdin>")
        return load_job(text, file="<stdin>", environ=environ, overrides=overrides, directory=os.getcwd())
    return load_job(_file_text(name), file=name, environ=environ, overrides=overrides, directory=_directory_of(name))


def warnings(spec: JobSpec) -> tuple[Problem, ...]:
    """Legal things that rarely are what was meant."""
    found = [
        Problem(f"role {name!r} asks for the fixed port {port} and has {role.replicas.max} replicas: two on one node "
                "cannot both bind it", f"roles.{name}.ports.{label}", hint="write 0 and read JOBSCHED_PORT_…")
        for name, role in spec.roles.items() if role.replicas.max > 1
        for label, port in role.ports.items() if port
    ]
    if spec.heartbeat_timeout < 5_000:
        found.append(Problem(
            f"{format_duration(spec.heartbeat_timeout)} is hardly longer than the 2s between two heartbeats",
            "heartbeat_timeout", hint="write 10s or more",
        ))
    return tuple(found)


def json_schema() -> dict[str, object]:
    """The JSON Schema of job files, for editors (`jobsched schema`)."""
    return job_schema()


def template(name: str) -> str:
    """The commented job file that `jobsched init --template NAME` writes; NAME is one of `TEMPLATES`."""
    return resources.files("jobsched.spec").joinpath("templates", f"{name}.yaml").read_text(encoding="utf-8")


# ---- servers and queues ----


class _QueueFile(SpecModel):
    queues: tuple[QueueSpec, ...] = ()


def load_queues(
    source: str | Sequence[object] | Mapping[str, object], *, file: str = "<queues>"
) -> tuple[QueueSpec, ...]:
    """Queues from a text or a plain value: a list, or `queues:` and a list. Raises `SpecError`."""
    root, problems = _tree(source, file)
    listed = Node({"queues": root}, root.at, root.key_at) if isinstance(root.value, list) else root
    queues = _validated(_QueueFile, listed, problems).queues
    try:
        return distinct_queues(queues)
    except ValueError as exc:
        raise SpecError([root.at.problem(str(exc), path="queues")]) from exc


def load_queues_file(path: str | os.PathLike[str]) -> tuple[QueueSpec, ...]:
    """`load_queues` of a file."""
    return load_queues(_file_text(os.fspath(path)), file=os.fspath(path))


def load_server_config(
    source: str | Mapping[str, object], *, file: str = "<config>", directory: str = ""
) -> ServerConfig:
    """A server's configuration from a text or a dict. Raises `ConfigError` with every problem.

    `queues` may name a file of queues. It, `home` and an SQLite file are relative to `directory`.
    """
    from jobsched.spec.server import ServerConfig  # clients, who read jobs only, need not wait for these models

    try:
        root, problems = _tree(source, file)
        queues = root.fields.get("queues")
        if queues is not None and isinstance(queues.value, str):
            root.fields["queues"] = _queue_tree(queues, directory, problems)
        config = _validated(ServerConfig, root, problems)
    except SpecError as exc:
        raise ConfigError(problems=exc.problems) from exc
    store = config.store
    if directory and store.startswith("sqlite:///") and len(store) > 10 and store[10] not in "/:":
        store = f"sqlite:///{_absolute(store[10:], directory)}"
    return config.model_copy(update={"home": _absolute(config.home, directory), "store": store})


def load_server_config_file(path: str | os.PathLike[str]) -> ServerConfig:
    """`load_server_config` of a file."""
    name = os.fspath(path)
    try:
        text = _file_text(name)
    except (SpecError, UsageError) as exc:
        raise ConfigError(exc.message, hint=exc.hint, problems=exc.problems) from exc
    return load_server_config(text, file=name, directory=_directory_of(name))


def _queue_tree(named: Node, directory: str, problems: list[Problem]) -> Node:
    """The list of queues in the file that `named` names."""
    path = _absolute(str(named.value), directory)
    try:
        root, found = _tree(_file_text(path), path)
    except UsageError as exc:
        raise SpecError([*problems, named.at.problem(exc.message, path=named.path)]) from exc
    problems += found
    return root.fields.get("queues", root)


# ---- text to tree ----


def _tree(source: object, file: str) -> tuple[Node, list[Problem]]:
    """The tree, and problems that do not hinder looking further."""
    try:
        if isinstance(source, str):
            return document.parse(source, file)
        return document.from_plain(source, file), []
    except Malformed as exc:
        raise SpecError([exc.problem]) from exc


def _file_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return _decoded(file.read(4 * MAX_CHARS), path)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise UsageError(f"cannot read {show(path)}: {why}") from exc


def _decoded(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as exc:
        before = data[:exc.start]
        at = Place(file, before.count(b"\n") + 1, len(before) - before.rfind(b"\n"))
        problem = at.problem("this is not text in UTF-8", hint="is it a binary file, or an old encoding?")
        raise SpecError([problem]) from exc


def _directory_of(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


# ---- edits of the tree ----


def _unwrapped(root: Node, problems: list[Problem]) -> Node:
    """The job inside the wrapped form, with the metadata's name and labels; any other document as it is."""
    fields = root.fields
    if not fields.keys() & {"apiVersion", "kind"}:
        return root
    for key, right in (("apiVersion", API_VERSION), ("kind", KIND)):
        node = fields.get(key)
        if node is None:
            problems.append(root.at.problem(f"{key} is missing", path=key, hint=f"write {key}: {right}"))
        elif node.value != right:
            problems.append(node.at.problem(f"{key}: {show(node.value)} is not {right!r}", path=key))
    for key, node in fields.items():
        if key not in ("apiVersion", "kind", "metadata", "spec", "status"):
            problems.append(node.key_at.problem(f"unknown field {show(key)}", path=node.path,
                                                hint="fields of the job go under spec"))
    spec = fields.get("spec")
    if spec is None or not isinstance(spec.value, dict):
        at = root.at if spec is None else spec.at
        raise SpecError(ordered([*problems, at.problem("spec is missing, or not a mapping", path="spec")]))
    metadata = fields.get("metadata")
    if metadata is not None and not isinstance(metadata.value, dict):
        message = f"metadata: must be a mapping of fields, not {called(metadata.value)}"
        problems.append(metadata.at.problem(message, path="metadata"))
    for key, node in (metadata.fields if metadata is not None else {}).items():
        inner = spec.fields.get(key)
        if key == "labels" and inner is not None:
            inner.fields.update({k: v for k, v in node.fields.items() if k not in inner.fields})
        elif key == "name" and inner is not None and inner.value != node.value:
            problems.append(node.at.problem(f"metadata.name {show(node.value)} is not spec.name {show(inner.value)}",
                                            path=node.path, hint="keep one of the two"))
        elif key in ("name", "labels"):
            spec.fields[key] = node
        elif key not in _KUBERNETES_METADATA:
            problems.append(node.key_at.problem(f"unknown field {show(key)}", path=node.path,
                                                hint=did_you_mean(key, ("name", "labels"))))
    _rescaled(spec, problems)
    return spec


def _rescaled(spec: Node, problems: list[Problem]) -> None:
    """`scale: {replicas: 4}`, which `kubectl scale` writes, is what role worker shall have now: its `prefer`."""
    scale = spec.fields.pop("scale", None)
    count = scale.fields.get("replicas") if scale is not None else None
    if scale is None or count is None:
        return
    roles = spec.fields.get("roles")
    role = spec if roles is None else roles.fields.get(ONE_ROLE)
    replicas = role.fields.get("replicas") if role is not None else None
    try:
        bounds = Replicas.model_validate(replicas.plain if replicas is not None else 1)
    except ValidationError:
        return  # said of the field itself
    fits = isinstance(count.value, int) and bounds.min <= count.value <= bounds.max
    if role is None or not fits:
        allowed = f"role 'worker' can have {bounds}" if role is not None else "there is no role 'worker'"
        problems.append(count.at.problem(f"scale.replicas: {show(count.value)} replicas; {allowed}", path=count.path))
    elif bounds.elastic:
        fields = {"min": bounds.min, "max": bounds.max, "prefer": count.value}
        at = count.at
        role.fields["replicas"] = Node({key: Node(n, at, at, count.path, str(n)) for key, n in fields.items()}, at, at)


def _one_role(job: Node) -> None:
    """Move the fields of the one-role shorthand below `roles`; with `roles` there they stay, and are refused."""
    short = [name for name in job.fields if name in ROLE_ONLY]
    if short and "roles" not in job.fields:
        first = job.fields[short[0]].key_at
        role = Node({name: job.fields.pop(name) for name in short}, first, first, job.path)
        job.fields["roles"] = Node({ONE_ROLE: role}, first, first, job.path)


def _override(job: Node, overrides: Overrides, problems: list[Problem]) -> None:
    for text, path, value in _pairs(overrides):
        at = Place(f"--set {text}"[:80])
        try:
            read = isinstance(value, str) and value.strip()
            node = document.parse(str(value), "")[0] if read else document.from_plain(value or None, "")
            _set(job, _steps(path, at, job), node, at)
        except Malformed as exc:
            problems.append(at.problem(exc.problem.message, path=path, hint=exc.problem.hint))


def _pairs(overrides: Overrides) -> Iterator[tuple[str, str, object]]:
    """Each override as its text, path and value; without '=' the path is empty, and leads nowhere."""
    if isinstance(overrides, Mapping):
        yield from ((f"{path}={value}", path, value) for path, value in overrides.items())
    else:
        yield from ((text, text.partition("=")[0] if "=" in text else "", text.partition("=")[2]) for text in overrides)


_STEP = re.compile(r'(?:"([^"]+)"|([^."=\[\]\s]+))(?:\.(?!$)|$)')


def _steps(path: str, at: Place, job: Node) -> list[str]:
    """`roles.worker.replicas` -> its names; `labels."a.b"` quotes a name with dots; the field of a role may leave out
    the only role. Raises `Malformed`."""
    steps, end = [], 0
    while match := _STEP.match(path, end):
        steps.append(match[1] or match[2])
        end = match.end()
    if not steps or end < len(path):
        raise Malformed(at.problem("this is not FIELD=VALUE", hint="for example --set roles.worker.replicas=6"))
    if steps[0] in ROLE_ONLY:
        roles = job.fields["roles"].fields if "roles" in job.fields else {}
        if len(roles) > 1:
            raise Malformed(at.problem(f"{steps[0]!r} is a field of a role, and there are {len(roles)}",
                                       hint=f"write roles.{next(iter(roles))}.{path}"))
        steps = ["roles", next(iter(roles), ONE_ROLE), *steps]
    return steps


def _set(job: Node, steps: Sequence[str], new: Node, at: Place) -> None:
    """Put a node at the end of the steps, making the mappings that are missing on the way. Raises `Malformed`."""
    node, path = job, ""
    for depth, step in enumerate(steps):
        path, last = join(path, step), depth == len(steps) - 1
        if node.value is None:
            node.value = {}
        if isinstance(node.value, list) and step.isdigit() and int(step) < len(node.value):
            if last:
                node.value[int(step)] = new.moved(at, path)
            node = node.value[int(step)]
        elif isinstance(node.value, dict):
            missing = step not in node.value
            if missing and not last and steps[:depth] == ["roles"] and (hint := did_you_mean(step, node.value)):
                raise Malformed(at.problem(f"there is no role {show(step)}", hint=hint))
            if last:
                node.value[step] = new.moved(at, path)
            elif missing:
                node.value[step] = Node({}, at, at, path)
            node = node.value[step]
        else:
            parent = ".".join(steps[:depth])
            raise Malformed(at.problem(f"{parent} is {called(node.value)}, so {show(step)} cannot be set in it",
                                       hint=f"set the whole of {parent}"))


def _environments(job: Node) -> Iterator[Node]:
    roles = job.fields["roles"].fields.values() if "roles" in job.fields else ()
    for owner in (job, *roles):
        if "env" in owner.fields:
            yield owner.fields["env"]


def _read_as_text(job: Node) -> None:
    """Values that are text whatever they look like: `env: {VERSION: 1.10}`, `command: [train, --lr, 0.1]`."""
    roles = job.fields["roles"].fields.values() if "roles" in job.fields else ()
    placement = job.fields.get("placement")
    maps = [*_environments(job), job.fields.get("labels"), placement and placement.fields.get("nodes")]
    values = [value for node in maps if node is not None for value in node.fields.values()]
    for role in roles:
        command = role.fields.get("command")
        if command is not None and isinstance(command.value, list):
            values += command.value
    for value in values:
        value.as_text()


def _fill(env: Node, environ: Mapping[str, str] | None, problems: list[Problem]) -> None:
    """Give every variable without a value the caller's."""
    for name, node in env.fields.items() if environ is not None else ():
        if node.value is None and environ is not None:
            node.value = environ.get(name)
            if node.value is None:
                problems.append(node.key_at.problem(
                    f"variable {show(name)} has no value here and is not set where you are", path=node.path,
                    hint=f"export {name}, give it with -e {name}=…, or write \"\" for empty",
                ))


def _resolved(spec: JobSpec, directory: str) -> JobSpec:
    """With absolute directories, so that it means the same on the server."""
    working_dir = _absolute(spec.working_dir, directory) or directory
    roles = {
        name: role.model_copy(update={"working_dir": _absolute(role.working_dir, directory)})
        for name, role in spec.roles.items()
    }
    below = working_dir if os.path.isabs(working_dir) else ""
    checkpoint = spec.checkpoint.model_copy(update={"dir": _absolute(spec.checkpoint.dir, below)})
    return spec.model_copy(update={"working_dir": working_dir, "roles": roles, "checkpoint": checkpoint})


def _absolute(path: str, directory: str) -> str:
    if not path or "://" in path:
        return path
    path = os.path.expanduser(path)
    return os.path.normpath(os.path.join(directory, path)) if directory else path


# ---- tree to spec ----


def _validated(model: type[M], node: Node, problems: list[Problem]) -> M:
    """The model of a tree. Raises `SpecError` with these problems and pydantic's, in document order."""
    try:
        result = model.model_validate(node.plain)
    except ValidationError as exc:
        found = [explained(error, model, node) for error in exc.errors(include_url=False)]
        raise SpecError(ordered([*problems, *found])) from exc
    if problems:
        raise SpecError(ordered(problems))
    return result
