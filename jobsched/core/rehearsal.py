"""Plans for jobs that are not there yet: the real passes on a copy of the cluster, and what they would do for the job.

Asked by `jobsched plan`, and by `core.forecast` for what comes later. Nothing of the live cluster is touched: a
`Picture` of it is taken in O(what is bound + nodes), so that whoever decides meanwhile waits for no more than that, and
copies are made of the picture, in O(jobs in it + nodes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jobsched.core import events as ev
from jobsched.core.answers import PlanAnswer, PlanVictim, QuotaAfter, RolePlan, Verdict, Why
from jobsched.core.cluster import Cluster, Target
from jobsched.core.explain import could_ever_fit, each_of, many, verdict
from jobsched.core.job import Job, Phase, Reason
from jobsched.core.lines import Alike, Rank
from jobsched.core.node import Cordon, Node
from jobsched.core.passes import Policy
from jobsched.core.plan import Decision, Reservation
from jobsched.core.policies.estimate import Estimates
from jobsched.core.policies.fragmentation import Mix, MixNote
from jobsched.core.policies.paces import Paces
from jobsched.core.policies.pauses import Pauses
from jobsched.core.policies.quota import AccountNote
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName
from jobsched.core.schedule import schedule
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import MEMORY, QueueSpec

PROBE = JobId("probe")
PASSES = 4
"""As many as room is made and used in; more only find what others gain."""


PER_LINE, MOST = 100, 2_000
"""Waiting jobs in a picture: the first of each line, and of all lines together."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What a copy of a cluster is made of. Frozen values only, so that it may be looked at on any thread."""

    jobs: tuple[Job, ...]
    nodes: tuple[Node, ...]
    queues: tuple[QueueSpec, ...]
    lost: tuple[NodeName, ...]
    cordoned: tuple[tuple[NodeName, Cordon], ...]
    ended: tuple[tuple[JobId, bool], ...]
    seq: int
    rank: Rank
    alike: Alike
    mix: MixNote
    estimates: Estimates
    paces: Paces
    pauses: Pauses
    targets: Mapping[JobId, Target]
    reservations: tuple[Reservation, ...]
    accounts: tuple[AccountNote, ...]
    beyond: tuple[Job, ...] = ()
    """Some of those that wait but are not among `jobs`."""
    beyond_count: int = 0
    """How many these stand for."""

    def cluster(self, instead: Mapping[JobId, Job] | None = None) -> Cluster:
        """A cluster like the one that the picture was taken of, to be changed freely; `instead`: with other jobs in
        place of these."""
        jobs = [(instead or {}).get(job.id, job) for job in self.jobs]
        twin = Cluster.of(
            jobs, self.nodes, self.queues, self.lost, self.cordoned, self.ended, self.seq, self.rank,
            estimates=self.estimates, alike=self.alike,
        )  # fmt: skip
        twin.mix, twin.targets = Mix.of(self.mix), dict(self.targets)
        twin.paces, twin.pauses = self.paces.as_they_are(), self.pauses.as_they_are()
        for claim in self.reservations:
            twin.reservations[claim.job_id] = replace(claim, made_for=twin.fleet.moved)
        twin.quotas.recall(self.accounts)
        return twin


def picture_of(
    cluster: Cluster, waiting: Iterable[JobId] | None = None, beyond: Sequence[JobId] = (),
    beyond_count: int = 0,
) -> Picture:
    """The cluster with all that runs and these waiting jobs; without any named, the first of every line. `beyond`: some
    of the others, which stand for so many. O(bound replicas + nodes + those)."""
    fleet = cluster.fleet
    bound = dict.fromkeys(job_id for on_node in fleet.on_node.values() for job_id, _ in on_node)
    if waiting is None:
        lines = cluster.lines.values()
        each = min(PER_LINE, max(1, MOST // max(1, len(lines))))
        waiting = [place.job_id for line in lines for place in line.places[:each]]
    ids = dict.fromkeys((*bound, *waiting))
    return Picture(
        tuple(cluster.jobs[job_id] for job_id in ids), tuple(fleet.nodes.values()), tuple(cluster.queues.values()),
        tuple(sorted(fleet.lost)), tuple(fleet.cordoned.items()), tuple(cluster.ended.items()), cluster.seq,
        cluster.rank, cluster.alike, cluster.mix.noted(), cluster.estimates.as_they_are((*ids, *beyond)),
        cluster.paces.as_they_are(), cluster.pauses.as_they_are(),
        {job_id: cluster.targets[job_id] for job_id in ids if job_id in cluster.targets},
        tuple(c for c in cluster.reservations.values() if c.made_for == fleet.moved and c.job_id in ids),
        cluster.quotas.noted(), tuple(cluster.jobs[job_id] for job_id in beyond), beyond_count,
    )  # fmt: skip


def plan(twin: Cluster, spec: JobSpec, owner: str, now_ms: int, policy: Policy) -> PlanAnswer:
    """Where the job would run, who would have to give way and what they lose, and what its queue would then hold.
    `twin` is used up."""
    never = could_ever_fit(twin, spec)
    if never:
        why = Why(Reason.UNPLACEABLE, never, "jobsched nodes shows what there is")
        return PlanAnswer(8, (), Verdict(PROBE, (why,)))
    twin.evolve(ev.JobSubmitted(now_ms, PROBE, spec.name or str(PROBE), owner, spec))
    waits = verdict(twin, twin.jobs[PROBE], now_ms, policy.order(twin, now_ms))
    victims: list[PlanVictim] = []
    for _ in range(PASSES):
        decisions = schedule(twin, now_ms, policy).decisions
        victims += _victims(twin, decisions, now_ms)
        carry_out(twin, decisions, now_ms)
        if twin.jobs[PROBE].phase is not Phase.QUEUED or not decisions:
            break
    job = twin.jobs[PROBE]
    if job.phase is Phase.QUEUED:
        return PlanAnswer(10, (), waits)
    return PlanAnswer(
        10 if victims else 0, _roles(twin, job), waits if victims else None, tuple(victims), _quota(twin, job)
    )


def carry_out(twin: Cluster, decisions: Iterable[Decision], now_ms: int) -> None:
    """As if everything had happened, and everybody who must leave had left, at once."""
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
            case ev.AttemptStopping(job_id=job_id, outcome=outcome) if PROBE in (outcome.for_job, *outcome.also_for):
                job, how = twin.jobs[job_id], "stops"
                if outcome.reason is Reason.RESCALED:
                    left = len(twin.stays(job))
                    how = f"shrinks from {len(job.replicas)} to {many(left, 'replica')}, by a new attempt"
                yield PlanVictim(job_id, job.name, how, _unsaved_gpu_s(job, job.gpu_milli, now_ms))
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
