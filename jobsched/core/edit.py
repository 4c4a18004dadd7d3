"""What an edited spec changes, and what that takes. Pure; asked by `service.edit` before it records the wish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jobsched.spec.job import JobSpec, RoleSpec

IN_PLACE = frozenset({
    "labels", "priority", "priority_class", "expected", "deadline", "time_limit", "queue_deadline", "start_timeout",
    "heartbeat_timeout", "hang_timeout", "keep_after_finish",
})  # fmt: skip
"""Fields that replicas know nothing of: they hold from now on, whatever runs."""
FIXED = ("array", "after")
"""What a job was submitted as."""


@dataclass(frozen=True, slots=True)
class Edit:
    """The difference between two specs of a job."""

    fields: tuple[str, ...]
    """Paths of the fields that differ; empty: nothing to do."""
    wanted: Mapping[str, int] = field(default_factory=dict)
    """Elastic roles -> how many replicas they shall have now."""
    restart: bool = False
    """Whether replicas that run must start anew to have it."""


def compare(old: JobSpec, new: JobSpec) -> Edit:
    """O(fields)."""
    fields = tuple(_differences(old, new))
    elastic = {name for name, role in new.roles.items() if name in old.roles
               and role.replicas.elastic and old.roles[name].replicas.elastic}  # fmt: skip
    scaled = {name for name in elastic if f"roles.{name}.replicas" in fields}
    in_place = IN_PLACE | {f"roles.{name}.replicas" for name in scaled}
    wanted = {name: role.replicas.prefer for name, role in new.roles.items() if name in scaled}
    return Edit(fields, wanted, restart=not set(fields) <= in_place)


def _differences(old: JobSpec, new: JobSpec) -> Iterator[str]:
    for name in JobSpec.model_fields:
        if name != "roles" and getattr(old, name) != getattr(new, name):
            yield name
    for role in (*new.roles, *(name for name in old.roles if name not in new.roles)):
        if role not in old.roles or role not in new.roles:
            yield f"roles.{role}"
            continue
        for name in RoleSpec.model_fields:
            if getattr(old.roles[role], name) != getattr(new.roles[role], name):
                yield f"roles.{role}.{name}"
