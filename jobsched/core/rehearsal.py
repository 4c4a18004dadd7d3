"""Plans for jobs that are not there yet: the real passes on a copy of the cluster, and what they would do for the job.

Asked by `jobsched plan`. Nothing of the live cluster is touched; a copy costs O(live jobs + nodes).
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

from jobsched.core import events as ev
from jobsched.core.answers import PlanAnswer, PlanVictim, QuotaAfter, RolePlan, Verdict, Why
from jobsched.core.cluster import Cluster
from jobsched.core.explain import could_ever_fit, each_of, verdict
from jobsched.core.job import Job, Phase, Reason
from jobsched.core.plan import Decision
from jobsched.core.resources import WHOLE_GPU, JobId
from jobsched.core.schedule import Policy, schedule
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import MEMORY

PROBE = JobId("probe")
PASSES = 4
"""As many as room is made and used in; more only find what others gain."""


def copy_of(cluster: Cluster) -> Cluster:
    """The same state, to be changed freely."""
    twin = Cluster.of(
        tuple(cluster.jobs.values()), tuple(cluster.nodes.values()), tuple(cluster.queues.values()),
        tuple(cluster.lost), tuple(cluster.cordoned.items()), tuple(cluster.ended.items()), cluster.seq, cluster.rank,
    )  # fmt: skip
    twin.mix = deepcopy(cluster.mix)
    twin.estimates = cluster.estimates
    for name, account in cluster.quotas.accounts.items():
        mine = twin.quotas.account(name)
        mine.spent_milli_ms, mine.spent_at_ms = account.spent_milli_ms, account.spent_at_ms
    return twin


def plan(twin: Cluster, spec: JobSpec, owner: str, now_ms: int, policy: Policy) -> PlanAnswer:
    """Where the job would run, who would have to give way and what they lose, and what its queue would then hold.
    `twin` is used up."""
    never = could_ever_fit(twin, spec)
    if never:
        why = Why(Reason.UNPLACEABLE, never, "jobsched nodes shows what there is")
        return PlanAnswer(8, (), Verdict(PROBE, (why,)))
    twin.evolve(ev.JobSubmitted(now_ms, PROBE, spec.name or str(PROBE), owner, spec))
    waits = verdict(twin, twin.jobs[PROBE], now_ms)
    victims: list[PlanVictim] = []
    for _ in range(PASSES):
        decisions = schedule(twin, now_ms, policy).decisions
        victims += _victims(twin, decisions, now_ms)
        _carry_out(twin, decisions, now_ms)
        if twin.jobs[PROBE].phase is not Phase.QUEUED or not decisions:
            break
    job = twin.jobs[PROBE]
    if job.phase is Phase.QUEUED:
        return PlanAnswer(10, (), waits)
    return PlanAnswer(
        10 if victims else 0, _roles(twin, job), waits if victims else None, tuple(victims), _quota(twin, job)
    )


def _carry_out(twin: Cluster, decisions: Iterable[Decision], now_ms: int) -> None:
    """As if everybody who must leave had left at once."""
    for decision in decisions:
        twin.evolve(decision)
        match decision:
            case ev.AttemptStopping(job_id=job_id, attempt=attempt, outcome=outcome):
                twin.evolve(ev.AttemptEnded(now_ms, job_id, attempt, outcome.phase))
            case ev.ReplicasReleased(job_id=job_id, attempt=attempt, replicas=replicas):
                twin.evolve(ev.ReplicasGone(now_ms, job_id, attempt, replicas))
            case _:
                pass


def _victims(twin: Cluster, decisions: Iterable[Decision], now_ms: int) -> Iterable[PlanVictim]:
    """Who leaves for the probe."""
    for decision in decisions:
        match decision:
            case ev.AttemptStopping(job_id=job_id, outcome=outcome) if outcome.for_job == PROBE:
                job = twin.jobs[job_id]
                yield PlanVictim(job_id, job.name, "stops", _unsaved_gpu_s(job, job.gpu_milli, now_ms))
            case ev.ReplicasReleased(job_id=job_id, replicas=replicas, for_job=beneficiary) if beneficiary == PROBE:
                job = twin.jobs[job_id]
                yield PlanVictim(job_id, job.name, f"shrinks by {len(replicas)}", 0.0)
            case _:
                pass


def _unsaved_gpu_s(job: Job, gpu_milli: int, now_ms: int) -> float:
    saved_ms = max(job.checkpoint.at_ms if job.checkpoint else 0, job.attempt_started_at_ms)
    return round(gpu_milli * max(0, now_ms - saved_ms) / WHOLE_GPU / 1_000, 1)


def _roles(twin: Cluster, job: Job) -> tuple[RolePlan, ...]:
    roles = []
    for role in twin.shape(job).roles:
        nodes = [str(r.binding.node) for r in job.replicas.values() if r.role == role.role and r.binding is not None]
        roles.append(RolePlan(role.role, len(nodes), each_of(role), tuple(dict.fromkeys(nodes))))
    return tuple(roles)


def _quota(twin: Cluster, job: Job) -> tuple[QuotaAfter, ...]:
    account = twin.quotas.account(job.spec.queue)

    def amount(key: str, value: int) -> float:
        return value / 2**30 if key == MEMORY else value / WHOLE_GPU

    return tuple(
        QuotaAfter(
            account.name, key, amount(key, account.used.get(key, 0)), amount(key, quota),
            amount(key, account.borrowed(key)),
        )
        for key, quota in account.nominal.items()
    )  # fmt: skip
