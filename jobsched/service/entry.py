"""What a spec must be before it is recorded, by `submit`, `plan` or `edit`: complete, with a priority that is a number,
for a queue that takes it, and not beyond every node."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from jobsched.core import explain
from jobsched.core.cluster import Cluster
from jobsched.errors import Conflict, NotFound, Problem, SpecError, Unreachable
from jobsched.live import LiveView
from jobsched.service.finding import suggest
from jobsched.spec.job import JobSpec


def examine(
    spec: JobSpec, live: LiveView, classes: Mapping[str, int], *, fits: bool = True
) -> tuple[JobSpec, NotFound | Conflict | None, str]:
    """The spec as it would be recorded, why its queue does not take it, and why it would never fit (asked with `fits`).
    Raises `SpecError` when it is incomplete."""
    spec = completed(spec, classes)
    with live.view() as (cluster, _):
        queues = tuple(cluster.queues)
        closed = _closed(cluster, spec.queue)
        never = explain.could_ever_fit(cluster, spec) if fits and cluster.fleet.nodes else ""
    return spec, unknown_queue(spec.queue, queues) or closed, never


def completed(spec: JobSpec, classes: Mapping[str, int]) -> JobSpec:
    """With the number of its priority class. Raises `SpecError` when something is missing."""
    _refuse_incomplete(spec)
    if not spec.priority_class:
        return spec
    return spec.model_copy(update={"priority": priority_of(spec.priority_class, classes)})


def priority_of(name: str, classes: Mapping[str, int]) -> int:
    known = classes.get(name)
    if known is None:
        listed = ", ".join(f"{each} ({value})" for each, value in classes.items()) or "none"
        close = difflib.get_close_matches(name, classes, n=1, cutoff=0.6)
        guess = f"did you mean {close[0]}? " if close else ""
        hint = f"{guess}classes of this server: {listed}; a number is fine, too"
        raise SpecError([Problem(f"there is no priority class {name!r}", field="priority", hint=hint)])
    return known


def unknown_queue(name: str, queues: Collection[str]) -> NotFound | None:
    """Raises `Unreachable` without a single queue: such a cluster has not been read yet, or not since the store was
    away."""
    if not queues:
        raise Unreachable("the server has not read its state yet", hint="try again in a moment")
    if name in queues:
        return None
    return NotFound(f"there is no queue {name!r}", hint=suggest(name, queues, "queues"))


def _closed(cluster: Cluster, queue: str) -> Conflict | None:
    """Why a queue takes no jobs, if so."""
    members = [name for name, spec in cluster.queues.items() if spec.cohort == queue]
    if members:
        return Conflict(f"{queue} is a cohort, jobs wait in its queues", hint=f"one of {', '.join(members[:5])}")
    if queue in cluster.queues and cluster.queues[queue].draining:
        return Conflict(f"queue {queue} is being drained and takes no more jobs", hint="'jobsched queues' shows others")
    return None


def _refuse_incomplete(spec: JobSpec) -> None:
    """Variables without a value are filled by the caller's side, which knows the caller's environment."""
    tables = [("env", spec.env), *((f"roles.{name}.env", role.env) for name, role in spec.roles.items())]
    problems = [
        Problem(f"variable {name} has no value", field=f"{where}.{name}", hint="set it where you submit")
        for where, table in tables for name, value in table.items() if value is None
    ]  # fmt: skip
    if problems:
        raise SpecError(problems)
