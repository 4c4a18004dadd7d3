"""The cluster: current state, folded from events by `evolve`, with the indexes that keep every tick cheap.

One leader owns one `Cluster` in memory. `evolve` is the only way it changes; applying an event costs O(1) in the number
of jobs (O(log n) for the ordered indexes) and O(replicas) of the event's own job. Ended jobs leave memory at once: the
store's projections serve them.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, replace
from typing import NamedTuple

from jobsched.core import events as ev
from jobsched.core.fleet import Fleet
from jobsched.core.job import Asked, Binding, Job, Phase, Reason, Replica, ReplicaId, ReplicaState, RoleShape, Shape
from jobsched.core.ledger import Ledger
from jobsched.core.lifecycle import REBINDS, take_evolved
from jobsched.core.lines import Alike, Line, LineKey, Lines, Place, Rank, all_alike, equal_rank
from jobsched.core.node import Cordon, Node
from jobsched.core.plan import Reservation
from jobsched.core.policies.ends import Ends
from jobsched.core.policies.estimate import Estimates
from jobsched.core.policies.fragmentation import Learned, Mix
from jobsched.core.policies.goodput import SpeedModel
from jobsched.core.policies.paces import Paces
from jobsched.core.policies.parts import Crowd, Parts, PoolKey, pool_key
from jobsched.core.policies.pauses import Pauses
from jobsched.core.policies.quota import Amounts, Quotas, amounts_of
from jobsched.core.pools import NodePool
from jobsched.core.resources import NOTHING, JobId, NodeName
from jobsched.core.shape import shape_of_job, sized_roles
from jobsched.core.suspicion import (
    ACCUSING,
    BY,
    accusation,
)
from jobsched.core.values import dataclass
from jobsched.spec.job import JobSpec
from jobsched.spec.queue import QueueSpec

ENDED_KEPT = 10_000
IMAGINED = 1_000
"""Most nodes of one pool that are imagined to see whether a job could ever fit."""
SHAPES_KEPT = 10_000


class Standing(NamedTuple):
    """Where a job stood in the last re-plan."""

    level: int
    place: int


class Target(NamedTuple):
    """How many replicas of its elastic roles the scheduler wants a job to have, what it gains by that, and the places
    found for them when it starts."""

    sizes: tuple[tuple[str, int], ...]
    why: str = ""
    bindings: tuple[Binding, ...] = ()
    coordinator_port: int = 0
    stays: tuple[ReplicaId, ...] = ()
    """Set: it makes room for another job by starting anew without the rest of its replicas; the places of these, which
    `bindings` are, remain its own meanwhile."""


@dataclass(slots=True)
class _Known:
    """What the indexes hold of a live job."""

    shape: Shape
    crowd: PoolKey
    line: Line | None = None
    """None: it may not start, or has."""
    place: Place | None = None
    """In the line."""


@dataclass(slots=True)
class Cluster:
    seq: int = 0
    """Position in the log that this state is folded up to."""
    jobs: dict[JobId, Job] = field(default_factory=dict)
    """Live jobs only."""
    queues: Mapping[str, QueueSpec] = field(default_factory=dict)
    """Another object whenever one is defined."""
    ledger: Ledger = field(default_factory=Ledger)
    fleet: Fleet = field(init=False)
    """The nodes, and what is bound on each."""

    lines: Lines = field(default_factory=Lines)
    """Jobs that may start now."""
    active: dict[str, dict[int, dict[JobId, None]]] = field(default_factory=dict)
    """Queue -> priority -> jobs that are starting or running."""
    surplus: dict[str, dict[JobId, None]] = field(default_factory=dict)
    """Queue -> such jobs that hold more than their minimum of an elastic role."""
    leaving: dict[JobId, tuple[JobId, ...]] = field(default_factory=dict)
    """Jobs that stop, or some of whose replicas do -> the jobs for which they make room."""
    nominated: dict[JobId, dict[JobId, None]] = field(default_factory=dict)
    """Waiting jobs for which room is being made -> who still leaves for them. Their places are kept; forgotten when
    they start, or when everybody has left and they do not fit all the same."""
    parked: list[tuple[int, JobId]] = field(default_factory=list)
    """Heap of (not_before_ms, job) for queued jobs in backoff; stale entries are skipped."""
    growing: dict[JobId, int] = field(default_factory=dict)
    """Running jobs with fewer replicas than wanted -> `Ledger.freed` when they were last found not to fit."""
    touched: dict[JobId, None] = field(default_factory=dict)
    """Jobs changed since the controller last converged them."""
    dependents: dict[JobId, list[JobId]] = field(default_factory=dict)
    ended: OrderedDict[JobId, bool] = field(default_factory=OrderedDict)
    """Recently ended job -> whether it succeeded; what jobs that wait for it are told."""
    node_pools: tuple[NodePool, ...] = ()
    """Nodes that do not exist yet and can be had; from the configuration."""
    asking: dict[JobId, Asked] = field(default_factory=dict)
    """Jobs that have asked for such."""
    late: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Pool -> how often in a row it did not deliver, and when last."""
    idle_since: dict[NodeName, tuple[str, int]] = field(default_factory=dict)
    """Node of a pool -> that pool, and since when nobody uses the node; scratch of `policies.provisioning`."""
    mix: Mix = field(default_factory=Mix)
    """What jobs usually ask for, learned from those that came."""
    quotas: Quotas = field(default_factory=Quotas)
    """What every queue holds and may still take."""
    rank: Rank = equal_rank
    alike: Alike = all_alike
    ripening: dict[LineKey, int] = field(default_factory=dict)
    """Lines for whose heads no room could be made yet -> when the next protected job may be stopped for them."""
    standing: dict[JobId, Standing] = field(default_factory=dict)
    """Where each runnable job stood in the last re-plan; scratch of `policies.preemption`."""
    crowds: dict[PoolKey, Crowd] = field(default_factory=dict)
    """Live jobs by where they may run."""
    reservations: dict[JobId, Reservation] = field(default_factory=dict)
    """Who does not fit now and is to fit next; scratch of `policies.backfill`."""
    claims_made: int = 0
    """Rises with every reservation that is made."""
    overdue_ms: int = 0
    """When reservations whose instant has passed are next looked at."""
    far_off: dict[JobId, int] = field(default_factory=dict)
    """Who is to fit next, but too late to tell when -> when it is worth another look."""
    stirred: dict[PoolKey, None] = field(default_factory=dict)
    """Pools in which a job came, went or waits anew since the last re-plan."""
    parts: Parts = field(default_factory=Parts)
    """Scratch of `policies.preemption`."""
    next_pass_ms: int = 0
    """When the order of a re-plan changes by itself; 0: not before something happens."""
    looked: tuple[int, int, int, int] | None = None
    """Scratch of `schedule`: what tells, once what it decided is folded, that no line is worth a try."""
    window_ms: int = 0
    """When the next budget window begins; 0: no queue has a budget."""
    estimates: Estimates = field(default_factory=Estimates)
    """How long jobs run, learned from those that ran."""
    ends: Ends = field(default_factory=Ends)
    """When running jobs are likely to end; scratch of `policies.backfill`."""
    paces: Paces = field(default_factory=Paces)
    """How fast jobs go on each kind of GPU, learned from what they report."""
    elastic: dict[JobId, None] = field(default_factory=dict)
    """Active jobs whose size `policies.elasticity` may decide, in the order in which it does when they are many."""
    speeds: dict[JobId, SpeedModel] = field(default_factory=dict)
    """What live jobs have shown of their speed; fed by `controller.telemetry`."""
    pauses: Pauses = field(default_factory=Pauses)
    """What changes of size cost, learned from those that were made."""
    targets: dict[JobId, Target] = field(default_factory=dict)
    """Sizes found in the last rebalancing; scratch of `policies.elasticity`. Absent: as the spec prefers."""
    resize_ms: int = 0
    """When sizes are next reconsidered."""
    tidy_ms: int = 0
    """When `policies.defragmentation` next looks for a way."""
    ever_fits: dict[Shape, str] = field(default_factory=dict)
    """On an `emptied` cluster: shape -> why it does not fit even there ("" when it does)."""
    _learned: Learned | None = None
    _emptied: Cluster | None = None
    _charged: dict[tuple[JobId, ReplicaId], Amounts] = field(default_factory=dict)
    """What each bound replica counts for in its queue; its GPUs' kind may be forgotten before it ends."""
    _known: dict[JobId, _Known] = field(default_factory=dict)
    """Live jobs."""
    _shapes: dict[Shape, Shape] = field(default_factory=dict)
    """Like jobs share one shape."""
    _shapes_of_specs: dict[int, tuple[JobSpec, Shape]] = field(default_factory=dict)
    """By identity of the spec, which is kept alive."""

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.ledger)

    # ---- evolve ----

    def evolve(self, event: ev.Event, seq: int = 0) -> None:
        """Apply one event. The only way in."""
        if seq:
            self.seq = seq
        if event.job_id is None:
            self._evolve_nodes(event)
            return
        before, kind = self.jobs.get(event.job_id), type(event)
        if kind in ACCUSING and (accused := accusation(before, event)) is not None:
            self.fleet.accuse(*accused)
        after = take_evolved(before, event)
        if before is None:
            self._add_job(after, event.at_ms)
        elif after.phase.terminal:
            self._remove_job(before, after, event.at_ms)
        else:
            self._change_job(before, after, event.at_ms, kind in REBINDS)
            if isinstance(event, ev.CapacityWithdrawn) and event.late:
                self.late[event.pool] = (self.late.get(event.pool, (0, 0))[0] + 1, event.at_ms)

    def _evolve_nodes(self, event: ev.ClusterEvent) -> None:
        if isinstance(event, ev.QueueDefined):
            self._put_queue(event.queue)
            self.ledger.unblock()
            return
        if isinstance(event, ev.NodeSeen):
            self._note_delivery(event.node)
        if isinstance(event, ev.NodeLost):
            self.idle_since.pop(event.node, None)
        else:
            self._emptied = None
        self.fleet.evolve(event)

    @classmethod
    def of(
        cls,
        jobs: Iterable[Job],
        nodes: Iterable[Node],
        queues: Iterable[QueueSpec],
        lost: Iterable[NodeName] = (),
        cordoned: Iterable[tuple[NodeName, Cordon]] = (),
        ended: Iterable[tuple[JobId, bool]] = (),
        seq: int = 0,
        rank: Rank = equal_rank,
        past: Iterable[Job] = (),
        estimates: Estimates | None = None,
        alike: Alike = all_alike,
    ) -> Cluster:
        """From a store's projections; equal to folding the log up to `seq`. `past`: jobs that ended, oldest first, to
        learn run times from; `estimates`: what was learned already."""
        cluster = cls(seq=seq, ended=OrderedDict(ended), rank=rank, alike=alike)
        cluster.fleet.cordoned.update(cordoned)
        cluster.estimates = estimates or cluster.estimates
        cluster.estimates.learn(past)
        for queue in queues:
            cluster._put_queue(queue)
        for node in nodes:
            cluster.fleet.put(node)
        for name in lost:
            cluster.fleet.lose(name)
        for job in jobs:
            cluster._add_job(job, job.running_since_ms or job.attempt_started_at_ms)
        waiting = [(job_id, cluster.jobs.get(job_id)) for job_id in cluster.nominated]
        for job_id, waits in waiting:
            if waits is None or (waits.phase is not Phase.QUEUED and not shrinks_anew(waits)):
                del cluster.nominated[job_id]
        return cluster

    def _put_queue(self, queue: QueueSpec) -> None:
        before = self.queues.get(queue.name)
        self.queues = {**self.queues, queue.name: queue}
        self.quotas.define(queue)
        if _tells_users_apart(before) is not _tells_users_apart(queue):
            waiting = [p.job_id for line in self.lines.of_queue.get(queue.name, {}).values() for p in line.places]
            for job_id in waiting:
                self._leave_line(job_id)
                self._line_up(self.jobs[job_id])

    def _note_delivery(self, node: Node) -> None:
        if self.late and (node.name not in self.fleet.nodes or node.name in self.fleet.lost):
            for pool in self.node_pools:
                if pool.has(node):
                    self.late.pop(pool.name, None)

    def emptied(self) -> Cluster:
        """The same nodes, all healthy, ready and used by nobody, and those that can be had; kept until a node changes.
        What could ever fit does here."""
        if self._emptied is None:
            self._emptied, nodes = Cluster(), self.fleet.nodes.values()
            for node in nodes:
                gpus = tuple(replace(gpu, healthy=True) for gpu in node.gpus)
                self._emptied.fleet.put(replace(node, gpus=gpus, foreign=NOTHING, foreign_gpus=(), ready=True))
            for pool in self.node_pools:
                have = sum(pool.has(node) for node in nodes)
                for index in range(min(pool.max, IMAGINED) - have):
                    self._emptied.fleet.put(pool.node(index))
        return self._emptied

    def _add_job(self, job: Job, at_ms: int) -> None:
        """A job came: usually just submitted, else as the projections have it."""
        job_id = job.id
        self.touched[job_id] = None
        self.jobs[job_id] = job
        shape = self._shape_of(job)
        self._join_crowd(job, shape)
        self.mix.learn(shape)
        self.estimates.submitted(job)
        for dependency in job.waiting_for:
            self.dependents.setdefault(dependency, []).append(job_id)
        if job.owner == BY:
            self.fleet.note_check(job, at_ms)
        if job.phase is Phase.QUEUED:
            self._note_asked(None, job)
            self._join_line(job)
            return
        self._rebind(None, job, at_ms)
        self._count_array(False, job)
        self._note_leaving(None, job)
        self._note_size(job, enters=True)

    def _remove_job(self, before: Job, after: Job, at_ms: int) -> None:
        """A job ended: with its attempt, or while it waited."""
        job_id, was_active = after.id, before.phase.active
        self.touched[job_id] = None
        if was_active:
            self._rebind(before, after, at_ms)
            self._count_array(True, after)
            self._note_leaving(before, after)
        else:
            self._leave_line(job_id)
            self._note_asked(before, None)
            self.nominated.pop(job_id, None)
        if after.owner == BY:
            self.fleet.note_check(after, at_ms)
        self.estimates.ended(after)
        self.paces.ended(job_id)
        self.ends.over(job_id)
        self._leave_crowd(job_id)
        self._remember_end(after)
        for known in (self.jobs, self._known, self.growing, self.standing, self.elastic, self.speeds, self.targets):
            known.pop(job_id, None)

    def _change_job(self, before: Job, after: Job, at_ms: int, rebinds: bool) -> None:
        """Something happened to a job that lives on; `rebinds`: its replicas may have other places now."""
        job_id, phase, was = after.id, after.phase, before.phase
        enters, moves = phase is not was, before.replicas is not after.replicas
        self.touched[job_id] = None
        if not was.active:
            self._leave_line(job_id, starts=phase.active)
        rebinds = rebinds and self._rebind(before, after, at_ms)
        if enters and after.array_id:
            self._count_array(was.active, after)
        if after.owner == BY:
            self.fleet.note_check(after, at_ms)
        if (phase.active or was.active) and (
            enters or before.outcome is not after.outcome or before.priority != after.priority
            or (moves and self._known[job_id].shape.elastic)
        ):  # fmt: skip
            self._note_leaving(before, after)
        if before.asked is not after.asked:
            self._note_asked(before, after)
        self.jobs[job_id] = after
        respecified = before.wanted is not after.wanted or before.spec is not after.spec
        if respecified:
            self._known[job_id].shape = self._shape_of(after)
        self._stir(before, after)
        if not phase.active:
            self._join_line(after)
        if enters or rebinds or respecified:
            self._note_size(after, enters)

    def _note_asked(self, before: Job | None, after: Job | None) -> None:
        """Keep `asking` true."""
        if after is not None and after.asked is not None:
            self.asking[after.id] = after.asked
        elif before is not None and before.asked is not None:
            self.asking.pop(before.id, None)

    def _note_size(self, job: Job, enters: bool) -> None:
        """Keep `elastic` and `growing` true when a job has entered a phase, or has or wants other replicas."""
        job_id, phase = job.id, job.phase
        if enters:
            if phase.active and self._known[job_id].shape.elastic and any(sized_roles(job.spec)):
                self.elastic[job_id] = None
            elif job_id in self.elastic:
                del self.elastic[job_id]
        if phase is Phase.RUNNING and self.lacking(job):
            self.growing[job_id] = -1
        elif job_id in self.growing:
            del self.growing[job_id]

    def _shape_of(self, job: Job) -> Shape:
        """One object for all jobs of like shape; computed once where they share their spec."""
        if not job.wanted and (known := self._shapes_of_specs.get(id(job.spec))) is not None:
            return known[1]
        if len(self._shapes) >= SHAPES_KEPT or len(self._shapes_of_specs) >= SHAPES_KEPT:
            self._shapes.clear()
            self._shapes_of_specs.clear()
        shape = shape_of_job(job)
        shape = self._shapes.setdefault(shape, shape)
        if not job.wanted:
            self._shapes_of_specs[id(job.spec)] = (job.spec, shape)
        return shape

    def _note_leaving(self, before: Job | None, after: Job) -> None:
        """Keep `active`, `surplus`, `leaving` and `nominated` true when a job's phase, replicas, outcome or priority
        change."""
        queue, job_id, phase = after.spec.queue, after.id, after.phase
        runs = phase.runs
        if before is None or before.phase is not phase or before.priority != after.priority:
            self._note_active(before, after)
            if self.nominated and phase is not Phase.QUEUED:
                self.nominated.pop(job_id, None)
            if self.targets and (phase is Phase.RUNNING or (phase is Phase.STOPPING and not shrinks_anew(after))) and (
                (target := self.targets.get(job_id)) is not None and target.stays
            ):  # fmt: skip
                del self.targets[job_id]  # it has made its room, and may be asked for more
                self.ledger.unblock()
        if runs and before is not None and before.replicas is after.replicas:
            return
        elastic = self._known[job_id].shape.elastic
        if runs and not elastic and job_id not in self.leaving and queue not in self.surplus:
            return
        if runs and elastic and has_surplus(after):
            self.surplus.setdefault(queue, {})[job_id] = None
        elif queue in self.surplus:
            self.surplus[queue].pop(job_id, None)
        was, now = self.leaving.pop(job_id, ()), _makes_room(after)
        if now is not None:
            self.leaving[job_id] = now
            for claimant in now:
                if before is None or ((waits := self.jobs.get(claimant)) is not None and waits.phase is Phase.QUEUED):
                    self.nominated.setdefault(claimant, {})[job_id] = None
            if now and shrinks_anew(after):
                self.nominated.setdefault(job_id, {})  # what it does not give stays its own
        for claimant in was:
            if claimant not in (now or ()) and claimant in self.nominated:
                self.nominated[claimant].pop(job_id, None)

    def _note_active(self, before: Job | None, after: Job) -> None:
        """Keep `active` true when a job's phase or priority changes."""
        job_id, runs = after.id, after.phase.runs
        if before is not None and before.phase.runs:
            if runs and before.priority == after.priority:
                return
            levels = self.active.get(before.spec.queue, {})
            level = levels.get(before.priority)
            if level is not None and job_id in level:
                del level[job_id]
                if not level:
                    del levels[before.priority]
        if runs:
            self.active.setdefault(after.spec.queue, {}).setdefault(after.priority, {})[job_id] = None
            self.ends.begins(job_id)

    def reported(self, job_id: JobId, step: int, total: int, at_ms: int) -> None:
        """A running job told how far it is of how much."""
        job = self.jobs[job_id]
        if total <= 0:
            return
        if self.estimates.reported(job, step, total, at_ms):
            self.stirred[self._known[job_id].crowd] = None
        if (kind := self.gpu_kind(job)) and not self.shape(job).elastic and (step_ms := self.estimates.step_ms(job)):
            self.paces.note(job, kind, step_ms)

    def _stir(self, before: Job, after: Job) -> None:
        """Note where something may be decided anew."""
        job_id, phase = after.id, after.phase
        if before.spec is not after.spec:
            known = self._known[job_id]
            self._leave_crowd(job_id)
            self._join_crowd(after, known.shape)
            return
        key, enters = self._known[job_id].crowd, before.phase is not phase
        if not phase.active:
            self.crowds[key].active.pop(job_id, None)
        elif not before.phase.active:
            self.crowds[key].active[job_id] = None
        turns = not phase.active or (enters and phase is Phase.RUNNING)  # its turn may end by itself only while it runs
        if turns or not _same_wishes(before, after):
            self.stirred[key] = None

    def _join_crowd(self, job: Job, shape: Shape) -> None:
        key = pool_key(shape)
        self._known[job.id] = _Known(shape, key)
        crowd = self.crowds.get(key)
        if crowd is None:
            crowd = self.crowds[key] = Crowd(shape)
        crowd.jobs[job.id] = None
        if job.phase.active:
            crowd.active[job.id] = None
        self.stirred[key] = None

    def _leave_crowd(self, job_id: JobId) -> None:
        key = self._known[job_id].crowd
        crowd = self.crowds[key]
        del crowd.jobs[job_id]
        crowd.active.pop(job_id, None)
        if not crowd.jobs:
            del self.crowds[key]
        self.stirred[key] = None

    def _remember_end(self, job: Job) -> None:
        self.ended[job.id] = job.phase is Phase.SUCCEEDED
        if len(self.ended) > ENDED_KEPT:
            self.ended.popitem(last=False)
        for dependent in self.dependents.pop(job.id, ()):
            self.touched[dependent] = None

    def _rebind(self, before: Job | None, after: Job, at_ms: int) -> bool:
        """Keep ledger, node index and queue usage true when a job's replicas change; whether any has another place."""
        old, new = before.replicas if before is not None else {}, after.replicas
        left, came = _only_in(old, new) if old else (), _only_in(new, old) if new else ()
        if not left and not came:
            return False
        roles = self.shape(after).by_name
        for rid, replica in left:
            assert before is not None
            self._book(before, rid, replica, roles[replica.role], -1, at_ms)
        for rid, replica in came:
            self._book(after, rid, replica, roles[replica.role], +1, at_ms)
        return True

    def _book(self, job: Job, rid: ReplicaId, replica: Replica, role: RoleShape, sign: int, at_ms: int) -> None:
        binding, key = replica.binding, (job.id, rid)
        assert binding is not None
        if sign > 0:
            self.fleet.on_node.setdefault(binding.node, {})[key] = (binding, role)
            self.ledger.take(binding, role)
            amounts = self._charged[key] = self.amounts(binding, role)
        else:
            del self.fleet.on_node[binding.node][key]
            self.ledger.give(binding, role)
            amounts = self._charged.pop(key)
        self.quotas.book(job.spec.queue, job.owner, amounts, sign, at_ms)

    def _count_array(self, was_active: bool, job: Job) -> None:
        if job.array_id and (change := job.phase.active - was_active):
            self.quotas.start(job.array_id, change)

    # ---- lines ----

    def _join_line(self, job: Job) -> None:
        if job.held or job.waiting_for or job.cancel_by:
            return
        if job.not_before_ms:
            heapq.heappush(self.parked, (job.not_before_ms, job.id))
            return
        self._line_up(job)

    def _line_up(self, job: Job) -> None:
        known, queue = self._known[job.id], job.spec.queue
        pool = known.crowd
        self.stirred[pool] = None
        owner = job.owner if _tells_users_apart(self.queues.get(queue)) else ""
        key = LineKey(queue, job.priority, known.shape, job.array_id, owner, self.alike(job, self.estimates))
        known.place = Place(self.rank(job, self.estimates), job.submitted_at_ms, job.id)
        known.line = self.lines.join(key, pool, self.ledger.stock(known.shape.node_labels), known.place)

    def _leave_line(self, job_id: JobId, starts: bool = False) -> None:
        known = self._known[job_id]
        if known.line is not None and known.place is not None:
            self.lines.leave(known.line, known.crowd, known.place, starts)
            known.line = known.place = None

    def unpark(self, now_ms: int) -> None:
        """Queued jobs whose backoff is over join their lines. Cost: those jobs."""
        while self.parked and self.parked[0][0] <= now_ms:
            instant, job_id = heapq.heappop(self.parked)
            job = self.jobs.get(job_id)
            if job is None or job.phase is not Phase.QUEUED or job.not_before_ms != instant or self.waits(job_id):
                continue
            self._line_up(job)

    # ---- inside a pass ----

    def trial(self) -> Trial:
        """Whatever a pass takes, lends and books inside is put back at the end. Not re-entrant."""
        return Trial(self)

    def mark(self) -> tuple[int, int]:
        """A point inside a trial to roll back to."""
        return self.ledger.mark(), self.quotas.mark()

    def rollback(self, mark: tuple[int, int]) -> None:
        self.ledger.rollback(mark[0])
        self.quotas.rollback(mark[1])

    def charge(self, job: Job, bindings: Iterable[Binding], starts: bool) -> None:
        """Inside a trial: count bindings, which the ledger has taken already, in the job's queue."""
        roles = self.shape(job).by_name
        for binding in bindings:
            self.quotas.book(job.spec.queue, job.owner, self.amounts(binding, roles[binding.role]), 1)
        if starts and job.array_id:
            self.quotas.start(job.array_id, 1)

    def lend(self, job: Job, replicas: Iterable[Replica]) -> None:
        """Inside a trial: as if these bound replicas of a job were gone, from their nodes and from its queue."""
        for replica in replicas:
            assert replica.binding is not None
            self.ledger.lend(replica.binding, self.fleet.on_node[replica.binding.node][job.id, replica.id][1])
            self.quotas.book(job.spec.queue, job.owner, self._charged[job.id, replica.id], -1)

    def take_back(self, job: Job, replicas: Iterable[Replica]) -> None:
        """Inside a trial: these are not gone after all."""
        for replica in replicas:
            binding = replica.binding
            assert binding is not None
            if binding.node in self.ledger.spaces:
                self.ledger.take(binding, self.fleet.on_node[binding.node][job.id, replica.id][1])
            self.quotas.book(job.spec.queue, job.owner, self._charged[job.id, replica.id], 1)

    def lend_leaving(self) -> None:
        """Inside a trial: as if everything that stops had stopped, and nothing had taken what it keeps. O(its
        replicas)."""
        for job_id in self.leaving:
            job = self.jobs[job_id]
            whole = job.phase is Phase.STOPPING
            stays = self.stays(job) if whole else ()
            self.lend(job, [
                r for r in job.replicas.values()
                if r.binding is not None and (whole or r.state is ReplicaState.STOPPING) and r.id not in stays
            ])  # fmt: skip

    def stays(self, job: Job) -> tuple[ReplicaId, ...]:
        """Whose places a job keeps that starts anew with fewer replicas to make room for another."""
        target = self.targets.get(job.id)
        return () if target is None or (job.outcome is not None and not shrinks_anew(job)) else target.stays

    # ---- questions ----

    @property
    def learned(self) -> Learned:
        """The fragmentation score for the mix of this cluster."""
        if self._learned is None:
            self._learned = Learned(self.mix)
        return self._learned

    def amounts(self, binding: Binding, role: RoleShape) -> Amounts:
        """What a binding would count for in its job's queue."""
        return amounts_of(role, self.fleet.kind_of(binding), sum([share.milli for share in binding.gpus]))

    def charges(self) -> Iterator[tuple[tuple[JobId, ReplicaId], Amounts]]:
        """What each bound replica counts for in its queue."""
        yield from self._charged.items()

    def gpu_kind(self, job: Job) -> str:
        """The kind of GPU that a job has; "": none, or several."""
        bound = [r.binding for r in job.replicas.values() if r.binding is not None and r.binding.gpus]
        kinds = dict.fromkeys([self.fleet.kind_of(binding) for binding in bound])
        return next(iter(kinds)) if len(kinds) == 1 else ""

    def lacking(self, job: Job) -> dict[str, int]:
        """Role -> how many replicas it has fewer than it should: than its target, its user's wish, or its spec."""
        missing, target = missing_replicas(job), self.targets.get(job.id)
        for role, count in target.sizes if target is not None else ():
            have = sum(r.role == role and r.binding is not None for r in job.replicas.values())
            missing.pop(role, None)
            if count > have:
                missing[role] = count - have
        return missing

    def shape(self, job: Job) -> Shape:
        known = self._known.get(job.id)
        return known.shape if known is not None else shape_of_job(job)

    def waits(self, job_id: JobId) -> bool:
        """Whether the job may start."""
        return self.line_of(job_id) is not None

    def line_of(self, job_id: JobId) -> Line | None:
        """The line that a job waits in; None when it may not start (held, backoff, dependency) or runs."""
        known = self._known.get(job_id)
        return None if known is None else known.line

    def waiting_count(self) -> int:
        return self.lines.waiting


@dataclass(slots=True)
class Trial:
    """What `Cluster.trial` opens and closes."""

    cluster: Cluster

    def __enter__(self) -> None:
        self.cluster.ledger.begin()
        self.cluster.quotas.begin()

    def __exit__(self, *raised: object) -> None:
        self.cluster.quotas.end()
        self.cluster.ledger.end()


def _tells_users_apart(queue: QueueSpec | None) -> bool:
    return queue is not None and queue.max_gpus_per_user is not None


def _only_in(
    some: Mapping[ReplicaId, Replica], others: Mapping[ReplicaId, Replica]
) -> list[tuple[ReplicaId, Replica]]:
    """Of some replicas, those whose places the others do not have."""
    return [
        (rid, r) for rid, r in some.items()
        if r.binding is not None and ((other := others.get(rid)) is None or other.binding is not r.binding)
    ]  # fmt: skip


def _same_wishes(one: Job, other: Job) -> bool:
    return one.stop_wish is other.stop_wish and one.cancel_by == other.cancel_by and one.wanted == other.wanted


def _makes_room(job: Job) -> tuple[JobId, ...] | None:
    """The jobs for which it, or some of it, is leaving; None: nothing leaves."""
    if job.outcome is not None:
        found = [job.outcome.for_job, *job.outcome.also_for]
    elif job.phase.runs and (leaving := [r for r in job.replicas.values() if r.state is ReplicaState.STOPPING]):
        found = [replica.for_job for replica in leaving]
    else:
        return None
    return tuple(filter(None, dict.fromkeys(found)))


def shrinks_anew(job: Job) -> bool:
    """Whether it stops to make room for another job by starting anew with fewer replicas."""
    return job.outcome is not None and job.outcome.reason is Reason.RESCALED and bool(job.outcome.for_job)


def has_surplus(job: Job) -> bool:
    """Whether the job holds more than its minimum of an elastic role."""
    for name, role in job.spec.roles.items():
        if role.replicas.elastic:
            bound = sum(r.role == name and r.binding is not None for r in job.replicas.values())
            if bound > role.replicas.min:
                return True
    return False


def missing_replicas(job: Job) -> dict[str, int]:
    """Role -> how many replicas it has fewer than wanted; only roles that lack some."""
    have: dict[str, int] = {}
    for replica in job.replicas.values():
        if replica.binding is not None:
            have[replica.role] = have.get(replica.role, 0) + 1
    return {
        name: job.wanted_count(name) - have.get(name, 0)
        for name in job.spec.roles
        if job.wanted_count(name) > have.get(name, 0)
    }
