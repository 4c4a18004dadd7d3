"""Elasticity: how many replicas each elastic job should have, and the decisions that bring it there.

Called by `schedule` at most every `Elasticity.every_ms`. What it knows of a job is its `SpeedModel` (what the job
itself reported) and the GPU time that it has attained. How long a job will still run is asked only to spare it a change
that does not pay any more, and where it says so itself. It maximises the sum of

    log(1 + speedup * GPUs of a replica) / (attained GPU time + 600 s) ** 0.3

over the GPUs that are free or held by elastic jobs. The logarithm is proportional fairness: it gives a small job its
second GPU before a big one its tenth, as the power means of Pollux (OSDI'21) and Sia (SOSP'23) do. The divisor favours
jobs that have had little, because most jobs are short (least attained service; Tiresias, NSDI'19). The sum is maximised
with a price per GPU, found by bisection, at which each job chooses for itself: O(jobs * sizes * log), where Pollux
evolves populations of whole schedules and Sia solves an integer program.

Nobody moves for little: a job that changes counts as slower by `doubt`, and by what the change costs, spread over
`horizon_ms`, or over what is left of the job where it reports that. A job is not trusted with more than `growth` times
the replicas that it was measured with. Minima are never touched, and a job that its user has scaled, or that reports no
speed, is left as it is. Higher priorities choose first.

Roles whose replicas come and go in place grow and shrink while the attempt runs. All others save, stop, and start again
with another size; the places found for them are kept in `Cluster.targets` until then. Nothing of this is in the log but
the decisions: after a crash sizes are worked out anew from where the jobs then stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, Target
from jobsched.core.job import Cause, FailureClass, Job, Outcome, Phase, Reason, Replica, ReplicaState, RoleShape, Shape
from jobsched.core.ledger import GpuClass, Short
from jobsched.core.plan import Decision
from jobsched.core.policies.admission import admit, more
from jobsched.core.policies.goodput import SpeedModel
from jobsched.core.policies.placement import Gang, Score, place_gang, place_more
from jobsched.core.policies.quota import Refused
from jobsched.core.resources import WHOLE_GPU, JobId
from jobsched.core.shape import elastic_role
from jobsched.spec.job import RestartScope, restart_policy

FAVOUR = 0.3
"""How strongly jobs that have attained little are favoured; 0: not at all, 1: fully."""
LITTLE_GPU_S = 600.0
"""Attained GPU time below which all jobs count alike."""
FIRST = 10.0
"""What a start is worth beside its size: more than any size."""
WAITING = 64
"""Most waiting jobs for which room is made at a time."""
REVISIONS = 4
"""How often the sizes are worked out again because a gang found no place."""
BISECTIONS = 40
COMPACT = Score.PACK
"""Peers near each other, holes filled first: what sizes were reckoned with."""


@dataclass(frozen=True, slots=True)
class Elasticity:
    every_ms: int = 10_000
    """How often sizes are reconsidered."""
    growth: int = 4
    """Most replicas for a job, in multiples of what it was measured with."""
    horizon_ms: int = 300_000
    """A change must pay for itself within this time."""
    restart_ms: int = 30_000
    """What a change costs where the job has to start again, unless it has shown how long it takes."""
    in_place_ms: int = 5_000
    """And where its replicas come and go in place."""
    doubt: float = 0.1
    """Measurements are only so good: a change must promise more than this part of the job's speed."""


Option = tuple[int, float]
"""(replicas, value)."""


@dataclass(frozen=True, slots=True)
class Mover:
    """One job whose size is to be decided."""

    job: Job
    shape: Shape
    role: RoleShape
    pool: GpuClass
    have: int
    """Replicas now; 0: it waits."""
    low: int
    options: tuple[Option, ...]
    in_place: bool

    @property
    def gpus(self) -> int:
        """Of one replica."""
        return self.role.gpu_milli // WHOLE_GPU


def rebalance(cluster: Cluster, now_ms: int, how: Elasticity, waiting: Sequence[Job]) -> list[Decision]:
    """Stops and releases that bring running jobs nearer to their best sizes; sets `cluster.targets`. `waiting`: jobs,
    elastic or not, that found no place. Must run inside `cluster.trial()`. O(nodes + jobs * sizes)."""
    if in_motion(cluster):
        return []
    cluster.resize_ms = now_ms + how.every_ms
    free = _free(cluster)
    movers = [
        mover
        for job in (*(cluster.jobs[job_id] for job_id in cluster.elastic), *waiting)
        if (mover := _mover(cluster, job, now_ms, how)) is not None
    ]
    for mover in movers:
        cluster.targets.pop(mover.job.id, None)
    for _ in range(REVISIONS):
        counts = _sizes(movers, free)
        found = _places(cluster, movers, counts)
        if isinstance(found, dict):
            return _decisions(cluster, movers, counts, found, now_ms)
        movers = [m if m.job.id != found else replace(m, options=_as_it_is(m)) for m in movers]
    return []


def in_motion(cluster: Cluster) -> bool:
    """Whether a change of size is under way: its places are not free yet. O(jobs that leave)."""
    return any(job_id in cluster.elastic for job_id in cluster.leaving)


# ---- who, and what each size is worth ----


def _free(cluster: Cluster) -> dict[GpuClass, int]:
    """GPUs that are wholly free on usable nodes, by class."""
    free: dict[GpuClass, int] = {}
    for name, space in cluster.ledger.spaces.items():
        if cluster.usable(name):
            for gpu_class, count in space.whole.items():
                free[gpu_class] = free.get(gpu_class, 0) + count
    return free


def _mover(cluster: Cluster, job: Job, now_ms: int, how: Elasticity) -> Mover | None:
    if job.phase is Phase.QUEUED:
        return _newcomer(cluster, job, now_ms, how)
    name, model, shape = elastic_role(job.spec), cluster.speeds.get(job.id), cluster.shape(job)
    if name in job.wanted or job.cancel_by or job.stop_wish is not Reason.NONE:
        return None
    role = next(r for r in shape.roles if r.role == name)
    in_place = restart_policy(job.spec, name).scope is RestartScope.REPLICA
    limits = job.spec.roles[name].replicas
    bound = [r for r in job.replicas.values() if r.role == name and r.binding is not None]
    if job.phase is not Phase.RUNNING or job.suspected_since_ms or model is None or not model.seen:
        return None
    if any(r.state is not ReplicaState.RUNNING for r in bound) or len(bound) < limits.min:
        return None
    nodes = {r.binding.node for r in bound if r.binding is not None}
    first = bound[0].binding
    assert first is not None
    space = cluster.ledger.spaces.get(first.node)
    if space is None or not first.gpus or first.gpus[0].gpu not in space.gpu_class:
        return None
    pool = space.gpu_class[first.gpus[0].gpu]
    most = min(limits.max, max(len(bound), how.growth * model.most_tried))
    most = len(bound) + more(cluster, job, role, most - len(bound), pool[0], now_ms)
    kept = _kept_after_change(job, model, in_place, how)
    options = _options(cluster, job, role, pool, model, (limits.min, most), len(bound), len(nodes), kept, now_ms)
    return Mover(job, shape, role, pool, len(bound), limits.min, options, in_place)


def _newcomer(cluster: Cluster, job: Job, now_ms: int, how: Elasticity) -> Mover | None:
    """A job that waits: nothing, or its minimum, which goes before what others have above theirs, or more."""
    shape = admit(cluster, job, now_ms)
    if isinstance(shape, Refused):
        return None
    devices = [role for role in shape.roles if role.gpu_milli]
    name, model = elastic_role(job.spec), cluster.speeds.get(job.id)
    role = next((r for r in devices if r.role == name), devices[0] if len(devices) == 1 else None)
    pools = cluster.ledger.matching(role) if role is not None and role.gpu_milli >= WHOLE_GPU else ()
    if role is None or not pools:
        return None
    free_to_choose = role.role == name and name not in job.wanted
    low = job.spec.roles[name].replicas.min if free_to_choose else role.min
    high = low
    if free_to_choose and model is not None:
        high = max(low, min(job.spec.roles[name].replicas.max, how.growth * model.most_tried))
    options = _options(cluster, job, role, pools[0], model, (low, high), 0, 0, 1.0, now_ms)
    return Mover(
        job, shape, role, pools[0], 0, low, ((0, 0.0), *((n, value + FIRST) for n, value in options)), False
    )  # fmt: skip


def _kept_after_change(job: Job, model: SpeedModel, in_place: bool, how: Elasticity) -> float:
    """What is left of a job's speed over the horizon when it changes its size."""
    cost_ms = how.in_place_ms
    if not in_place:
        shown = job.running_since_ms - job.attempt_started_at_ms if job.running_since_ms else 0
        cost_ms = max(how.restart_ms, shown)
    horizon_ms = min(how.horizon_ms, model.left_ms)
    return (1.0 - how.doubt) * (1.0 - cost_ms / horizon_ms) if horizon_ms > cost_ms else 0.0


def _options(
    cluster: Cluster, job: Job, role: RoleShape, pool: GpuClass, model: SpeedModel | None, limits: tuple[int, int],
    have: int, nodes: int, kept: float, now_ms: int,
) -> tuple[Option, ...]:  # fmt: skip
    """Sizes within limits, each with its value; sizes on which the job makes no progress are left out."""
    gpus = role.gpu_milli // WHOLE_GPU
    per_node = max(1, cluster.widest(pool) // gpus)
    weight = (job.gpu_time(now_ms) / (1_000 * WHOLE_GPU) + LITTLE_GPU_S) ** -FAVOUR
    found: list[Option] = []
    for count in _candidate_sizes(limits[0], limits[1], per_node, have):
        on = nodes if count == have else -(-count // per_node)
        speed = model.speedup(on, count) if model is not None else float(count)
        if speed > 0.0:
            speed *= gpus * (1.0 if count == have else kept)
            found.append((count, weight * log(1.0 + speed)))
    return tuple(found)


def _candidate_sizes(low: int, high: int, per_node: int, have: int) -> list[int]:
    """Every size on one node, then whole nodes, which leave no holes, further apart the more there are; always the
    present one."""
    sizes = {low, high, *range(low, min(high, per_node) + 1)}
    nodes = 2
    while nodes * per_node <= high:
        sizes.add(nodes * per_node)
        nodes += max(1, nodes // 16)
    sizes = {size for size in sizes if size >= low}
    if have:
        sizes.add(have)
    return sorted(sizes)


def _as_it_is(mover: Mover) -> tuple[Option, ...]:
    return tuple(option for option in mover.options if option[0] == mover.have) or ((mover.have, 0.0),)


# ---- sizes ----


def _sizes(movers: Sequence[Mover], free: Mapping[GpuClass, int]) -> dict[JobId, int]:
    """Replicas for each job: within a pool higher priorities choose first, among what the minima of the lower leave."""
    counts: dict[JobId, int] = {}
    for pool in dict.fromkeys(mover.pool for mover in movers):
        mine = [mover for mover in movers if mover.pool == pool]
        left = free.get(pool, 0) + sum(mover.have * mover.gpus for mover in mine)
        kept = sum(mover.low * mover.gpus for mover in mine if mover.have)
        for priority in sorted({mover.job.priority for mover in mine}, reverse=True):
            group = [mover for mover in mine if mover.job.priority == priority]
            kept -= sum(mover.low * mover.gpus for mover in group if mover.have)
            chosen = share([(mover.gpus, mover.options) for mover in group], left - kept)
            for mover, count in zip(group, chosen, strict=True):
                counts[mover.job.id] = count
                left -= count * mover.gpus
    return counts


def share(bidders: Sequence[tuple[int, Sequence[Option]]], gpus: int) -> list[int]:
    """Divide `gpus` among bidders, each (GPUs a replica, options by rising size), for nearly the greatest sum.

    At the lowest price at which all choices fit; then what is left goes to the best further steps. The smallest options
    are always granted."""
    chosen = [options[0] for _, options in bidders]
    low, high = 0.0, 1.0 + 2.0 * max((value for _, options in bidders for _, value in options), default=0.0)
    cheap = _bids(bidders, 0.0)
    if _taken(bidders, cheap) <= gpus:
        return [count for count, _ in cheap]
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        bids = _bids(bidders, price)
        if _taken(bidders, bids) > gpus:
            low = price
        else:
            high, chosen = price, bids
    least = [options[0] for _, options in bidders]
    filled = [_fill(bidders, *how) for how in ((chosen, gpus, True), (chosen, gpus, False), (least, gpus, False))]
    return [count for count, _ in max(filled, key=lambda options: sum(value for _, value in options))]


def _fill(
    bidders: Sequence[tuple[int, Sequence[Option]]], chosen: Sequence[Option], gpus: int, per_gpu: bool
) -> list[Option]:
    """Further steps into what is left: those of the greatest gain per GPU, or of the greatest gain, first."""
    chosen = list(chosen)
    left = gpus - _taken(bidders, chosen)
    while left > 0:
        steps = [
            ((value - chosen[i][1]) / ((count - chosen[i][0]) * each if per_gpu else 1), -i, count, value)
            for i, (each, options) in enumerate(bidders)
            for count, value in options
            if 0 < (count - chosen[i][0]) * each <= left and value > chosen[i][1]
        ]
        if not steps:
            break
        _, minus_i, count, value = max(steps)
        left -= (count - chosen[-minus_i][0]) * bidders[-minus_i][0]
        chosen[-minus_i] = (count, value)
    return chosen


def _bids(bidders: Sequence[tuple[int, Sequence[Option]]], price: float) -> list[Option]:
    return [max(options, key=lambda o: (o[1] - price * o[0] * each, -o[0])) for each, options in bidders]


def _taken(bidders: Sequence[tuple[int, Sequence[Option]]], chosen: Sequence[Option]) -> int:
    return sum(count * each for (each, _), (count, _) in zip(bidders, chosen, strict=True))


# ---- places ----


def _places(cluster: Cluster, movers: Sequence[Mover], counts: Mapping[JobId, int]) -> dict[JobId, Gang] | JobId:
    """Places of the gangs that start anew, the largest first, while everything else stays where it is; or the first job
    for which there are none. Leaves the ledger as it was."""
    mark = cluster.mark()
    try:
        for mover in movers:
            count = counts[mover.job.id]
            if mover.have and count != mover.have and not mover.in_place:
                cluster.lend(mover.job, [r for r in mover.job.replicas.values() if r.binding is not None])
            elif mover.in_place and count < mover.have:
                cluster.lend(mover.job, surplus(mover.job, mover.role.role, mover.have - count))
        found: dict[JobId, Gang] = {}
        fresh = [m for m in movers if counts[m.job.id] not in (0, m.have) and not (m.have and m.in_place)]
        for mover in sorted(fresh, key=lambda m: -counts[m.job.id] * m.gpus):
            gang = place_gang(cluster, sized(mover.shape, mover.role.role, counts[mover.job.id]), score=COMPACT)
            if not isinstance(gang, Gang):
                return mover.job.id
            found[mover.job.id] = gang
        for mover in movers:
            by = counts[mover.job.id] - mover.have
            if mover.in_place and mover.have and by > 0 and not _grows(cluster, mover, by):
                return mover.job.id
        return found
    finally:
        cluster.rollback(mark)


def _grows(cluster: Cluster, mover: Mover, by: int) -> bool:
    taken = [r.binding for r in mover.job.replicas.values() if r.binding is not None]
    return bool(place_more(cluster, mover.shape, mover.role, range(mover.have, mover.have + by), taken))


def sized(shape: Shape, role: str, count: int) -> Shape:
    """The same gang with exactly so many replicas of a role."""
    return replace(
        shape, roles=tuple(replace(r, min=count, prefer=count) if r.role == role else r for r in shape.roles)
    )


def surplus(job: Job, role: str, count: int) -> list[Replica]:
    """The `count` replicas of a role that leave first: those on the nodes where the job has fewest, then the highest
    index; never the first one, which others may look for."""
    serving = (ReplicaState.BOUND, ReplicaState.RUNNING)
    held = sorted(
        (r for r in job.replicas.values() if r.role == role and r.state in serving and r.binding is not None),
        key=lambda r: r.index,
    )
    per_node: dict[str, int] = {}
    for replica in held:
        assert replica.binding is not None
        per_node[replica.binding.node] = per_node.get(replica.binding.node, 0) + 1

    def leaves(replica: Replica) -> tuple[int, int]:
        assert replica.binding is not None
        return per_node[replica.binding.node], -replica.index

    return sorted(held[1:], key=leaves)[:count]


# ---- decisions ----


def _decisions(
    cluster: Cluster, movers: Sequence[Mover], counts: Mapping[JobId, int], gangs: Mapping[JobId, Gang], now_ms: int
) -> list[Decision]:
    decisions: list[Decision] = []
    for mover in movers:
        job, count = mover.job, counts[mover.job.id]
        if not count:
            continue
        gang = gangs.get(job.id)
        cluster.targets[job.id] = Target(
            mover.role.role, count, gang.bindings if gang else (), gang.coordinator_port if gang else 0
        )
        if not mover.have or count == mover.have:
            continue
        if not mover.in_place:
            text = f"{mover.have} to {count} replicas"
            outcome = Outcome(Phase.QUEUED, Reason.RESCALED, Cause(Reason.RESCALED, FailureClass.NONE, text))
            decisions.append(ev.AttemptStopping(now_ms, job.id, job.attempt, outcome))
        elif count < mover.have:
            leaving = tuple(r.id for r in surplus(job, mover.role.role, mover.have - count))
            decisions.append(ev.ReplicasReleased(now_ms, job.id, job.attempt, leaving))
        else:
            cluster.growing[job.id] = -1
    return decisions


# ---- what other steps ask ----


def start_gang(cluster: Cluster, job: Job, shape: Shape, now_ms: int) -> Gang | Short:
    """The gang of a waiting job that has a target: in the places kept for it, else wherever as many fit. Short: there
    is no room, or somebody still leaves those places. Must run inside a trial; what it takes stays taken."""
    target = cluster.targets[job.id]
    role = next(r for r in shape.roles if r.role == target.role)
    count = more(cluster, job, role, target.replicas, role.gpu_kinds[0] if len(role.gpu_kinds) == 1 else "", now_ms)
    if count == target.replicas and _all_free(cluster, job, target):
        roles = {r.role: r for r in shape.roles}
        for binding in target.bindings:
            cluster.ledger.take(binding, roles[binding.role])
        return Gang(target.bindings, target.coordinator_port)
    if in_motion(cluster):
        return Short(role, 0)
    for fewer in range(count, role.min - 1, -1):
        gang = place_gang(cluster, sized(shape, target.role, fewer), score=COMPACT)
        if isinstance(gang, Gang):
            return gang
    return Short(role, 0)


def _all_free(cluster: Cluster, job: Job, target: Target) -> bool:
    cpu: dict[str, int] = {}
    memory: dict[str, int] = {}
    for binding in target.bindings:
        space, role = cluster.ledger.spaces.get(binding.node), job.spec.roles[binding.role]
        if space is None or not cluster.usable(binding.node) or space.ports_used.intersection(binding.ports):
            return False
        cpu[binding.node] = cpu.get(binding.node, 0) + role.cpu
        memory[binding.node] = memory.get(binding.node, 0) + role.memory
        if any(space.gpu_free.get(s.gpu, 0) < s.milli for s in binding.gpus):
            return False
        if cpu[binding.node] > space.cpu_milli or memory[binding.node] > space.memory_bytes:
            return False
    return bool(target.bindings)
