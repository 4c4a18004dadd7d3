"""What users are told: the values behind `jobs`, `describe`, `why`, `nodes` and `queues`.

Made by `core.explain` and `service`, carried by the API, shown by CLI, SDK and dashboard. No second set of API types:
a job on the wire is a `core.job.Job`, wrapped here with what is only known live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jobsched.core.job import Job, Reason
from jobsched.core.node import Cordon, Node
from jobsched.core.observation import Incident
from jobsched.core.resources import JobId, Resources
from jobsched.spec.queue import QueueSpec


@dataclass(frozen=True, slots=True)
class Why:
    """One reason that holds, with numbers in the sentence and what would help."""

    reason: Reason
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a job waits: every reason that holds, most important first.

    `position` counts jobs of the same queue that go first, plus one. `nearest_fit` says how much of the gang would fit
    now. `starts_after_ms` / `starts_before_ms`: expected start as a band (medians and 90th percentiles of run times),
    0 when unknown or not asked for; `starts` says it in words, or why nobody can tell. `sooner`: changes of the request
    that help, and when it then starts.
    """

    job_id: JobId
    reasons: tuple[Why, ...]
    position: int = 0
    nearest_fit: str = ""
    starts_after_ms: int = 0
    starts_before_ms: int = 0
    starts: str = ""
    sooner: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaProgress:
    """Newest report of one replica. Ages at the time of the answer; -1: never reported."""

    role: str
    index: int
    rank: int = -1
    node: str = ""
    state: str = ""
    restart: int = 0
    ident: str = ""
    step: int = -1
    step_age_ms: int = -1
    beat_age_ms: int = -1
    metrics: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class JobProgress:
    """A job's progress: the furthest step of its replicas, and metrics of the replica that reported it."""

    step: int = -1
    total: int = -1
    world_size: int = 0
    metrics: tuple[tuple[str, float], ...] = ()
    replicas: tuple[ReplicaProgress, ...] = ()


@dataclass(frozen=True, slots=True)
class JobAnswer:
    job: Job
    progress: JobProgress | None = None
    verdict: Verdict | None = None
    """Only while the job waits, or its running attempt waits for replicas."""
    headline: str = ""
    """One sentence for the reason column."""


@dataclass(frozen=True, slots=True)
class EditAnswer:
    """What an edit of a job changes, or would change."""

    job: Job
    headline: str = ""
    fields: tuple[str, ...] = ()
    """Paths of the fields that differ; empty: none."""
    restart: bool = False
    """Whether replicas that run have to save, stop and start anew to have it."""


@dataclass(frozen=True, slots=True)
class CheckpointAnswer:
    """Whose processes were asked to save."""

    job: Job
    asked: tuple[str, ...] = ()
    """Replicas, as `role/index`."""


@dataclass(frozen=True, slots=True)
class JobPage:
    jobs: tuple[JobAnswer, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class WhyAnswer:
    """`jobsched why`: the present in a sentence, the verdict or the root cause, and the story so far."""

    job: Job
    headline: str
    verdict: Verdict | None = None
    story: tuple[str, ...] = ()
    warnings: tuple[Incident, ...] = ()
    """What the engine says is out of order with its replicas and their nodes, newest last."""
    deadline: str = ""
    """When it is due, and whether it will be over by then; "": it has no deadline."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that a replica wrote, without its line end. `offset` is where the line begins in that replica's log."""

    role: str
    index: int
    rank: int
    attempt: int
    restart: int
    offset: int
    text: str


NodeState = Literal["ready", "not ready", "cordoned", "draining", "probation", "lost"]
"""Probation: cordoned by jobsched itself after failures of different jobs."""


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    node: Node
    free: Resources
    free_gpus: int
    state: NodeState = "ready"
    cordon: Cordon | None = None
    jobs: tuple[JobId, ...] = ()


@dataclass(frozen=True, slots=True)
class Holding:
    """What a queue or cohort holds of one resource that has a quota. GPUs and CPUs in units, memory in bytes."""

    resource: str
    quota: float
    used: float
    borrowed: float = 0.0
    lent: float = 0.0
    left: float = 0.0
    """What it may still take, borrowing included."""


@dataclass(frozen=True, slots=True)
class QueueAnswer:
    """A queue or cohort; cohorts come before their members. Counts and sums of a cohort include its members'."""

    queue: QueueSpec
    waiting: int = 0
    active: int = 0
    gpus_in_use: float = 0.0
    depth: int = 0
    """How many cohorts it is in."""
    is_cohort: bool = False
    share: float = 0.0
    """Its dominant share: the largest part that it holds of any of the cluster's resources, 0 to 1."""
    holdings: tuple[Holding, ...] = ()
    budget_left_gpu_h: float | None = None
    """GPU-hours left in this window of its budget; None: it has none."""


@dataclass(frozen=True, slots=True)
class UsageAnswer:
    """What one user's jobs in one queue used and waited."""

    queue: str
    owner: str
    jobs: int
    succeeded: int
    failed: int
    cancelled: int
    gpu_hours: float
    mean_wait_s: float
    """From submission to first placement, of those that were placed."""
    longest_wait_s: float


@dataclass(frozen=True, slots=True)
class RolePlan:
    role: str
    replicas: int
    each: str
    where: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlanVictim:
    """A job that would have to give way."""

    job_id: JobId
    name: str
    how: str
    """`stops`, `shrinks by 2`, or `shrinks from 4 to 2 replicas, by a new attempt`."""
    unsaved_gpu_s: float
    """GPU-seconds since its last checkpoint; what it saves while it stops is not lost."""


@dataclass(frozen=True, slots=True)
class QuotaAfter:
    """What a queue would hold of one limited resource (GPUs, CPUs, GiB of memory) once the job runs."""

    queue: str
    resource: str
    used: float
    quota: float
    borrowed: float


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """`jobsched plan`: where and when a job would run; nothing is changed. `code`: 0 now, 10 must wait (with `roles`:
    until the `victims` have left), 8 never."""

    code: int
    roles: tuple[RolePlan, ...] = ()
    verdict: Verdict | None = None
    victims: tuple[PlanVictim, ...] = ()
    quota: tuple[QuotaAfter, ...] = ()
    deadline: str = ""
    """When the job would be due, and whether it would be over by then; "": it has no deadline."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `jobsched doctor`."""

    name: str
    ok: bool
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """`jobsched debug verify`: the log replayed against the projections."""

    ok: bool
    events: int
    jobs: int
    problems: tuple[str, ...] = field(default_factory=tuple)
