"""What a leader knows that jobs, nodes and queues do not tell: noted from time to time, recalled by the next leader.

Use that is over (fair shares, budgets), learned run times, the usual mix of requests: these follow from the log, and a
`Recall` says what they were at one place of it, so that the next leader folds only what came after instead of
everything. And paces by kind of GPU and what changes of size cost, which jobs reported and no log holds. Written and
read by the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster
from jobsched.core.events import Stored
from jobsched.core.job import Binding, Job, ReplicaId, RoleShape
from jobsched.core.node import Node
from jobsched.core.policies.estimate import Estimates, Noted
from jobsched.core.policies.fragmentation import Mix, MixNote
from jobsched.core.policies.paces import Paces, PacesNote
from jobsched.core.policies.pauses import Pauses, PausesNote
from jobsched.core.policies.quota import AccountNote, Amounts, Quotas, amounts_of
from jobsched.core.resources import JobId, NodeName
from jobsched.core.shape import shape_of
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec


@dataclass(frozen=True, slots=True)
class Held:
    """What a bound replica counts for in its queue."""

    job_id: JobId
    replica: ReplicaId
    queue: str
    owner: str
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Recall:
    """As of event `seq`."""

    seq: int
    queues: tuple[QueueSpec, ...]
    accounts: tuple[AccountNote, ...]
    held: tuple[Held, ...]
    half_life_ms: int
    entry_ms: int
    estimates: Noted
    mix: MixNote
    paces: PacesNote = field(default_factory=PacesNote)
    pauses: PausesNote = ()


@dataclass(frozen=True, slots=True)
class Recalled:
    """What a new leader's cluster begins with."""

    estimates: Estimates
    quotas: Quotas
    mix: Mix
    paces: Paces
    pauses: Pauses

    def give(self, cluster: Cluster) -> None:
        """To a cluster that was made with these estimates."""
        quotas = cluster.quotas
        quotas.half_life_ms, quotas.entry_ms = self.quotas.half_life_ms, self.quotas.entry_ms
        quotas.recall(self.quotas.noted())
        cluster.mix, cluster.paces, cluster.pauses = self.mix, self.paces, self.pauses


def note(cluster: Cluster, now_ms: int) -> Recall:
    """O(bound replicas + live jobs + families)."""
    jobs, quotas = cluster.jobs, cluster.quotas
    held = tuple(
        Held(job_id, replica, jobs[job_id].spec.queue, jobs[job_id].owner, amounts)
        for (job_id, replica), amounts in cluster.charges()
    )
    return Recall(
        cluster.seq, tuple(cluster.queues.values()), quotas.noted(), held, quotas.half_life_ms, quotas.entry_ms,
        cluster.estimates.noted(now_ms), cluster.mix.noted(), cluster.paces.noted(),
        cluster.pauses.noted(),
    )  # fmt: skip


def recall(
    noted: Recall, since: Iterable[Stored], nodes: Sequence[Node], job_of: Callable[[JobId], Job | None]
) -> Recalled:
    """What was noted, brought up to date by the events after it. `job_of`: any job as it is now. O(events)."""
    quotas = Quotas()
    for queue in noted.queues:
        quotas.define(queue)
    books = _Books(quotas, {node.name: node for node in nodes}, job_of)
    for each in noted.held:
        books.book(each, 1, 0)
    quotas.half_life_ms, quotas.entry_ms = noted.half_life_ms, noted.entry_ms
    quotas.recall(noted.accounts)
    estimates, mix, paces = Estimates.of(noted.estimates), Mix.of(noted.mix), Paces.of(noted.paces)
    for stored in since:
        event = stored.event
        books.fold(event)
        match event:
            case ev.QueueDefined(queue=queue):
                quotas.define(queue)
            case ev.JobSubmitted(spec=spec):
                mix.learn(shape_of(spec))
            case ev.AttemptEnded(job_id=job_id, phase=phase) | ev.JobEnded(job_id=job_id, phase=phase):
                job = job_of(job_id) if phase.terminal else None
                if phase.terminal:
                    paces.ended(job_id)
                if job is not None:
                    estimates.submitted(job)
                    estimates.ended(job)
            case _:
                pass
    return Recalled(estimates, quotas, mix, paces, Pauses.of(noted.pauses))


class _Books:
    """Bookings of queues, folded from events alone."""

    def __init__(
        self, quotas: Quotas, nodes: Mapping[NodeName, Node], job_of: Callable[[JobId], Job | None]
    ) -> None:
        self._quotas, self._nodes, self._job_of = quotas, nodes, job_of
        self._held: dict[JobId, dict[ReplicaId, Held]] = {}

    def book(self, held: Held, sign: int, at_ms: int) -> None:
        self._quotas.book(held.queue, held.owner, held.amounts, sign, at_ms)
        mine = self._held.setdefault(held.job_id, {})
        if sign > 0:
            mine[held.replica] = held
        else:
            del mine[held.replica]

    def fold(self, event: ev.Event) -> None:
        match event:
            case ev.AttemptPlaced(at_ms=at_ms, job_id=job_id, bindings=bindings) | ev.ReplicasBound(
                at_ms=at_ms, job_id=job_id, bindings=bindings
            ):
                job = self._job_of(job_id)
                for binding in bindings if job is not None else ():
                    assert job is not None
                    amounts = self._amounts(job.spec, binding)
                    self.book(Held(job_id, binding.id, job.spec.queue, job.owner, amounts), 1, at_ms)
            case ev.ReplicasUnbound() | ev.ReplicasGone():
                self._drop(event.job_id, event.replicas, event.at_ms)
            case ev.AttemptEnded(at_ms=at_ms, job_id=job_id):
                self._drop(job_id, tuple(self._held.get(job_id, ())), at_ms)
                self._held.pop(job_id, None)
            case _:
                pass

    def _drop(self, job_id: JobId, replicas: Iterable[ReplicaId], at_ms: int) -> None:
        for replica in replicas:
            held = self._held.get(job_id, {}).get(replica)
            if held is not None:
                self.book(held, -1, at_ms)

    def _amounts(self, spec: JobSpec, binding: Binding) -> Amounts:
        role: RoleShape = next(role for role in shape_of(spec).roles if role.role == binding.role)
        node = self._nodes.get(binding.node)
        mine = {share.gpu for share in binding.gpus}
        kind = next((gpu.kind.lower() for gpu in node.gpus if gpu.id in mine), "") if node is not None else ""
        return amounts_of(role, kind, sum(share.milli for share in binding.gpus))
