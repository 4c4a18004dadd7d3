"""jobsched: a GPU-aware scheduler for ML training jobs.

    import jobsched
    job = jobsched.connect().submit("job.yaml")
    job.wait()

Everything below is imported when it is first used, so that `import jobsched` costs next to nothing, in notebooks as in
every training replica.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "jobsched.client.client": ("Client", "JobArray", "JobHandle", "connect"),
    "jobsched.client.function": ("Task", "task"),
    "jobsched.core.job": ("Phase", "Reason"),
    "jobsched.spec.job": ("JobSpec", "RoleSpec"),
    "jobsched.train.context": ("context",),
    "jobsched.errors": (
        "AuthError", "Conflict", "JobFailed", "JobschedError", "NotFound", "SpecError", "Unplaceable", "Unreachable",
        "WaitTimeout",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from jobsched.client.client import Client as Client
    from jobsched.client.client import JobArray as JobArray
    from jobsched.client.client import JobHandle as JobHandle
    from jobsched.client.client import connect as connect
    from jobsched.client.function import Task as Task
    from jobsched.client.function import task as task
    from jobsched.core.job import Phase as Phase
    from jobsched.core.job import Reason as Reason
    from jobsched.errors import AuthError as AuthError
    from jobsched.errors import Conflict as Conflict
    from jobsched.errors import JobFailed as JobFailed
    from jobsched.errors import JobschedError as JobschedError
    from jobsched.errors import NotFound as NotFound
    from jobsched.errors import SpecError as SpecError
    from jobsched.errors import Unplaceable as Unplaceable
    from jobsched.errors import Unreachable as Unreachable
    from jobsched.errors import WaitTimeout as WaitTimeout
    from jobsched.spec.job import JobSpec as JobSpec
    from jobsched.spec.job import RoleSpec as RoleSpec
    from jobsched.train.context import context as context


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jobsched' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
