"""Elasticity: how many replicas each elastic job should have, and the decisions that bring it there.

Called by `schedule` at most every `Elasticity.every_ms`. What it knows of a job is its `SpeedModel` (what the job
itself reported) and the GPU time that it has attained. How long a job will still run is asked only to spare it a change
that does not pay any more, and where it says so itself. It maximises the sum of

    log(1 + speedup * GPUs of a replica) / (attained GPU time + 600 s) ** 0.3

over the GPUs that are free or held by elastic jobs. The logarithm is proportional fairness: it gives a small job its
second GPU before a big one its tenth, as the power means of Pollux (OSDI'21) and Sia (SOSP'23) do. The divisor favours
jobs that have had little, because most jobs are short (least attained service; Tiresias, NSDI'19). The sum is maximised
with a price per GPU at which each job chooses for itself: O(jobs * sizes * log), where Pollux
evolves populations of whole schedules and Sia solves an integer program.

Nobody moves for little: a job that changes counts as slower by `doubt`, and by what the change costs (`pauses`), spread
over `horizon_ms`, or over what is left of the job where it reports that; it has to pay in the places that are found,
which may be on more nodes than were reckoned with, and nobody is asked again before it has reported how fast the last
change made it. A job is not trusted with more than `growth` times the replicas that it was measured with. Minima are
never touched, and a job that its user has scaled, or that reports no speed, is left as it is. Higher priorities choose
first.

The number of parameter servers is decided together with that of the workers. Servers need CPUs and memory, seldom GPUs,
so where these are short, too, a size is priced by its dominant share of what is there (Optimus, EuroSys'18).

Roles whose replicas come and go in place grow and shrink while the attempt runs. All others, and parameter servers in
any case, save, stop, and start again with another size; the places found for them are kept in `Cluster.targets` until
then. Nothing of this is in the log but the decisions: after a crash sizes are worked out anew from where the jobs then
stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import groupby, islice, pairwise
from math import log
from operator import attrgetter, itemgetter, le, lt
from typing import NamedTuple

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, Target
from jobsched.core.job import (
    Binding,
    Cause,
    FailureClass,
    Job,
    Outcome,
    Phase,
    Reason,
    Replica,
    ReplicaState,
    RoleShape,
    Shape,
)
from jobsched.core.ledger import ANY, GpuClass, Short
from jobsched.core.plan import Decision
from jobsched.core.policies.admission import admit, more
from jobsched.core.policies.goodput import TINY, Size, SpeedModel
from jobsched.core.policies.placement import Gang, Score, place_gang, place_more
from jobsched.core.policies.quota import Refused
from jobsched.core.resources import NOTHING, WHOLE_GPU, JobId, Resources
from jobsched.core.shape import sized_roles
from jobsched.spec.job import resizes_in_place

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
AT_ONCE = 128
"""Most running jobs whose sizes are reconsidered in one pass."""
MANY = 64
"""With more jobs than that, what a price leaves is little, and divided in one way only."""
SERVERS_CLOSE = 8
"""Numbers of parameter servers up to which each is looked at; further apart beyond."""
WORTH = 0.01
"""Each further server has to bring at least so much of a job's speed, however many CPUs are free."""
NOBODY: Size = (0, 0)
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
    """What a change costs where the job has to start again, until it or its like have shown what it does."""
    in_place_ms: int = 5_000
    """And where its replicas come and go in place."""
    doubt: float = 0.1
    """Measurements are only so good: a change must promise more than this part of the job's speed."""


class Option(NamedTuple):
    """One size that a job may have."""

    size: Size
    takes: Resources
    """What all replicas of that size take."""
    value: float


@dataclass(frozen=True, slots=True)
class Mover:
    """One job whose size is to be decided."""

    job: Job
    shape: Shape
    role: RoleShape
    """The role that trains."""
    servers: RoleShape | None
    pool: GpuClass
    have: Size
    """Replicas and parameter servers now; zeros: it waits."""
    low: Size
    options: tuple[Option, ...]
    in_place: bool
    """Whether replicas of the role come and go while it trains; servers never do."""
    model: SpeedModel | None
    nodes: int
    """Nodes that its replicas are on."""
    kept: tuple[float, float] = (1.0, 1.0)
    """What is left of its speed after a change in place, and after one by a restart."""

    @property
    def shares(self) -> bool:
        """Whether a replica has a part of a GPU only."""
        return 0 < self.role.gpu_milli < WHOLE_GPU

    @property
    def gpus(self) -> float:
        """Of one replica; one that needs none counts as if it had one."""
        return self.role.gpu_milli / WHOLE_GPU or 1.0

    def per_node(self, cluster: Cluster) -> int:
        """Most replicas on one node."""
        each, widest = self.role.gpu_milli, cluster.fleet.widest(self.pool)
        if self.pool == ANY:
            return max(1, widest // max(1, self.role.cpu_milli))
        return max(1, widest * (WHOLE_GPU // each) if self.shares else widest // (each // WHOLE_GPU))

    def takes(self, size: Size) -> Resources:
        """What so many replicas and servers take."""
        role, count = self.role, size[0]
        found = Resources(count * role.cpu_milli, count * role.memory_bytes, count * role.gpu_milli)
        if (servers := self.servers) is None:
            return found
        return found + Resources(size[1] * servers.cpu_milli, size[1] * servers.memory_bytes)

    @property
    def may_start(self) -> bool:
        """Whether it waits, and may get its minimum."""
        return not any(self.have) and len(self.options) > 1

    def stays(self, size: Size) -> bool:
        """Whether the attempt goes on with this size."""
        return size == self.have or (self.in_place and size[1] == self.have[1])


def rebalance(cluster: Cluster, now_ms: int, how: Elasticity, waiting: Sequence[Job]) -> list[Decision]:
    """Stops and releases that bring running jobs nearer to their best sizes; sets `cluster.targets`. `waiting`: jobs,
    elastic or not, that found no place. Must run inside `cluster.trial()`, while nothing is in motion. O(nodes +
    jobs * sizes), of `AT_ONCE` jobs at most."""
    jobs = [cluster.jobs[job_id] for job_id in _in_turn(cluster, now_ms, how)]
    movers = [mover for job in (*jobs, *waiting) if (mover := _mover(cluster, job, now_ms, how)) is not None]
    for mover in movers:
        cluster.targets.pop(mover.job.id, None)
    free = _free(cluster, movers)
    for _ in range(REVISIONS):
        sizes = _sizes(movers, free)
        found, unplaced = _places(cluster, movers, sizes)
        if not unplaced:
            return _decisions(cluster, movers, sizes, found, now_ms)
        movers = [replace(m, options=_as_it_is(m)) if m.job.id in unplaced else m for m in movers]
    return []


def _in_turn(cluster: Cluster, now_ms: int, how: Elasticity) -> list[JobId]:
    """The running jobs whose sizes are reconsidered now: all, or, where they are many, those that waited longest for
    it, and the next the sooner."""
    elastic = cluster.elastic
    found = list(islice(elastic, AT_ONCE))
    cluster.resize_ms = now_ms + how.every_ms * len(found) // max(1, len(elastic))
    if len(found) < len(elastic):
        for job_id in found:
            elastic[job_id] = elastic.pop(job_id)
    return found


def in_motion(cluster: Cluster) -> bool:
    """Whether a change of size is under way: its places are not free yet. O(jobs that leave)."""
    return any(job_id in cluster.elastic for job_id in cluster.leaving)


# ---- who, and what each size is worth ----


@dataclass(slots=True)
class Supply:
    """An amount of everything: CPUs and memory, which all jobs take, and GPUs of each class."""

    hosts: Resources = NOTHING
    """Its GPUs mean nothing."""
    gpus: dict[GpuClass, int] = field(default_factory=dict)

    def copy(self) -> Supply:
        return Supply(self.hosts, dict(self.gpus))

    def of(self, pool: GpuClass) -> Resources:
        """What is there for the jobs of a pool."""
        return Resources(self.hosts.cpu_milli, self.hosts.memory_bytes, self.gpus.get(pool, 0))

    def give(self, pool: GpuClass, amount: Resources) -> None:
        self.hosts += amount
        self.gpus[pool] = self.gpus.get(pool, 0) + amount.gpu_milli

    def take(self, pool: GpuClass, amount: Resources) -> None:
        self.hosts -= amount
        self.gpus[pool] = self.gpus.get(pool, 0) - amount.gpu_milli


def _free(cluster: Cluster, movers: Iterable[Mover]) -> Supply:
    """What is free on usable nodes; of GPUs those that are wholly free, and where movers have shares, also what is left
    of others, in parts as large as the smallest of these shares."""
    free: dict[GpuClass, int] = {}
    cpu = memory = 0
    parts: dict[GpuClass, int] = {}
    for mover in movers:
        if mover.shares:
            parts[mover.pool] = min(mover.role.gpu_milli, parts.get(mover.pool, WHOLE_GPU))
    closed = [name for name in cluster.fleet.cordoned if not cluster.fleet.usable(name)]
    for name, space in cluster.ledger.spaces.items():
        if not space.node.ready or name in closed:
            continue
        cpu, memory = cpu + space.cpu_milli, memory + space.memory_bytes
        for gpu_class, count in space.whole.items():
            free[gpu_class] = free.get(gpu_class, 0) + count * WHOLE_GPU
        for gpu_class, part in parts.items():
            left = sum(level - level % part for level in space.levels(gpu_class) if level < WHOLE_GPU)
            free[gpu_class] = free.get(gpu_class, 0) + left
    return Supply(Resources(cpu, memory), free)


def _mover(cluster: Cluster, job: Job, now_ms: int, how: Elasticity) -> Mover | None:
    if job.phase is Phase.QUEUED:
        return _newcomer(cluster, job, now_ms, how)
    model = cluster.speeds.get(job.id)
    if job.phase is not Phase.RUNNING or model is None or not model.seen:
        return None
    known = model.known
    if not isinstance(known, _Known) or known.job is not job or known.moved != cluster.fleet.moved:
        known = model.known = _Known(job, cluster.fleet.moved, _standing(cluster, job, model))
    here = known.here
    if here is None or not model.shown(job.attempt, here.have):
        return None
    have, limits, low = here.have, [(n, n) for n in here.have], list(here.have)
    for place, (each, tried) in enumerate(zip((here.role, here.servers), model.most_tried, strict=True)):
        if each is not None and _elastic(job, each.role) and each.role not in job.wanted:
            bounds = job.spec.roles[each.role].replicas
            most = min(bounds.max, max(have[place], how.growth * tried))
            kind = here.pool[0] if place == 0 else ""
            limits[place] = bounds.min, have[place] + more(cluster, job, each, most - have[place], kind, now_ms)
            low[place] = bounds.min
    kept = _kept_after_change(cluster, job, model, True, how), _kept_after_change(cluster, job, model, False, how)
    asked, per_node = (*limits, kept), here.per_node(cluster)
    if known.asked != (asked, per_node):
        here = known.here = replace(here, low=(low[0], low[1]), kept=kept)
        known.asked, known.gains = (asked, per_node), _gains(here, limits, per_node)
    weight = _weight(job, now_ms)
    return replace(here, options=tuple([Option(size, takes, weight * gain) for size, takes, gain in known.gains]))


@dataclass(slots=True)
class _Known:
    """What was found out about a job, as it is, the last time; kept in its `SpeedModel` until that learns more."""

    job: Job
    moved: int
    """`Fleet.moved` then."""
    here: Mover | None
    """Without its options; None: its size cannot be changed as it is."""
    asked: tuple[object, ...] = ()
    """What its options depend on beside the job and its model."""
    gains: Sequence[tuple[Size, Resources, float]] = ()


def _standing(cluster: Cluster, job: Job, model: SpeedModel) -> Mover | None:
    """A running job as it is, if it may be changed. O(its replicas)."""
    (name, serves), shape = sized_roles(job.spec), cluster.shape(job)
    if all(role in job.wanted for role in (name, serves) if _elastic(job, role)):
        return None
    if job.cancel_by or job.stop_wish is not Reason.NONE or job.suspected_since_ms:
        return None
    bound = [r for r in job.replicas.values() if r.role in (name, serves) and r.binding is not None]
    trains = [r.binding for r in bound if r.role == name and r.binding is not None]
    if any(r.state is not ReplicaState.RUNNING for r in bound) or len(trains) < job.spec.roles[name].replicas.min:
        return None
    first, nodes = trains[0], len({binding.node for binding in trains})
    space = cluster.ledger.spaces.get(first.node)
    if space is None or any(share.gpu not in space.gpu_class for share in first.gpus):
        return None
    role, servers = shape.by_name[name], shape.by_name[serves] if serves else None
    pool, have = space.gpu_class[first.gpus[0].gpu] if first.gpus else ANY, (len(trains), len(bound) - len(trains))
    return Mover(job, shape, role, servers, pool, have, have, (), resizes_in_place(job.spec, name), model, nodes)


def _newcomer(cluster: Cluster, job: Job, now_ms: int, how: Elasticity) -> Mover | None:
    """A job that waits: nothing, or its minimum, which goes before what others have above theirs, or more."""
    shape = admit(cluster, job, now_ms)
    if isinstance(shape, Refused):
        return None
    devices = [role for role in shape.roles if role.gpu_milli] or [r for r in shape.roles if r.role != "ps"]
    (name, serves), model = sized_roles(job.spec), cluster.speeds.get(job.id)
    role = next((r for r in devices if r.role == name), devices[0] if len(devices) == 1 else None)
    if role is None:
        return None
    pools = cluster.ledger.matching(role) if role.gpu_milli else (ANY,)
    if not pools:
        return None
    servers = shape.by_name[serves] if serves else None
    limits = [(role.min, role.min), (servers.min, servers.min) if servers is not None else (0, 0)]
    for place, each in enumerate((role, servers)):
        if each is None or each.role not in (name, serves):
            continue
        if _elastic(job, each.role) and each.role not in job.wanted:
            bounds = job.spec.roles[each.role].replicas
            high = bounds.min
            if model is not None:
                high = max(high, min(bounds.max, how.growth * model.most_tried[place]))
            limits[place] = bounds.min, high
    low = limits[0][0], limits[1][0]
    mover = Mover(job, shape, role, servers, pools[0], NOBODY, low, (), False, model, 0)
    weight, gains = _weight(job, now_ms), _gains(mover, limits, mover.per_node(cluster))
    found = [Option(size, takes, weight * gain + FIRST) for size, takes, gain in gains]
    return replace(mover, options=(Option(NOBODY, NOTHING, 0.0), *found))


def _elastic(job: Job, role: str) -> bool:
    return bool(role) and job.spec.roles[role].replicas.elastic


def _kept_after_change(cluster: Cluster, job: Job, model: SpeedModel, in_place: bool, how: Elasticity) -> float:
    """What is left of a job's speed over the horizon when it changes its size."""
    cost_ms = how.in_place_ms
    if not in_place:
        shown = job.running_since_ms - job.attempt_started_at_ms if job.running_since_ms else 0
        cost_ms = max(how.restart_ms, shown)
    cost_ms = cluster.pauses.expected_ms(job, in_place, cost_ms)
    horizon_ms = min(how.horizon_ms, model.left_ms)
    return (1.0 - how.doubt) * (1.0 - cost_ms / horizon_ms) if horizon_ms > cost_ms else 0.0


def _weight(job: Job, now_ms: int) -> float:
    """How much its gains count."""
    return float((job.gpu_time(now_ms) / (1_000 * WHOLE_GPU) + LITTLE_GPU_S) ** -FAVOUR)


def _gains(mover: Mover, limits: Sequence[tuple[int, int]], per_node: int) -> list[tuple[Size, Resources, float]]:
    """(size, what it takes, the logarithm of what the job then does) within limits; left out are those on which the job
    makes no progress, and those with more servers that bring next to nothing."""
    numbers = _candidate_sizes(*limits[1], SERVERS_CLOSE, mover.have[1]) if limits[1][1] else [0]
    found: list[tuple[Size, Resources, float]] = []
    for count in _candidate_sizes(*limits[0], per_node, mover.have[0]):
        best, least = 0.0, numbers[0]
        for servers in numbers:
            size = count, servers
            speed = _speed(mover, size, per_node)
            if speed <= 0.0:
                continue
            speed *= mover.gpus * (1.0 if size == mover.have else mover.kept[not mover.stays(size)])
            if speed > best * (1.0 + WORTH * (servers - least)) or size == mover.have:
                best, least = (speed, servers) if speed > best else (best, least)
                found.append((size, mover.takes(size), log(1.0 + speed)))
    return found


def _speed(mover: Mover, size: Size, per_node: int) -> float:
    """Times that of a single replica."""
    if mover.model is None:
        return float(size[0])
    nodes = mover.nodes if size[0] == mover.have[0] else -(-size[0] // per_node)
    return mover.model.speedup(nodes, *size)


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
    here = tuple(option for option in mover.options if option.size == mover.have)
    return here or (Option(mover.have, mover.takes(mover.have), 0.0),)


# ---- sizes ----


def _sizes(movers: Sequence[Mover], free: Supply) -> dict[JobId, Size]:
    """The size of each job. Higher priorities choose first, among what the minima of the lower leave; within a priority
    pool by pool, among what the minima of the other pools leave, also of those who wait in them, as far as they fit."""
    sizes: dict[JobId, Size] = {}
    left, kept = free.copy(), Supply()
    for mover in movers:
        left.give(mover.pool, mover.takes(mover.have))
        if any(mover.have):
            kept.give(mover.pool, mover.takes(mover.low))
    for priority in sorted({mover.job.priority for mover in movers}, reverse=True):
        level = [mover for mover in movers if mover.job.priority == priority]
        for pool in dict.fromkeys(mover.pool for mover in level):
            group = [mover for mover in level if mover.pool == pool]
            waiting = [m for m in level if m.pool != pool and m.job.id not in sizes and m.may_start]
            hosts = _reserved(waiting, left, kept)
            for mover in group:
                if any(mover.have):
                    kept.take(pool, mover.takes(mover.low))
            chosen = share([mover.options for mover in group], left.of(pool) - kept.of(pool) - hosts)
            for mover, option in zip(group, chosen, strict=True):
                sizes[mover.job.id] = option.size
                left.take(pool, option.takes)
    return sizes


def _reserved(waiting: Iterable[Mover], left: Supply, kept: Supply) -> Resources:
    """CPUs and memory for the minima of those who wait, the first first, as far as they fit beside `kept`."""
    hosts, promised = NOTHING, kept.copy()
    for mover in waiting:
        low = mover.takes(mover.low)
        if low.fits(left.of(mover.pool) - promised.of(mover.pool)):
            promised.give(mover.pool, low)
            hosts += replace(low, gpu_milli=0)
    return hosts


def share(bidders: Sequence[Sequence[Option]], free: Resources) -> list[Option]:
    """Choose one option (they are of rising size) for each, such that all fit into `free`, for nearly the greatest sum
    of values.

    At the lowest price at which all choices fit; then what is left goes to the best further steps. Priced is the
    dominant share that an option takes of what there is too little of for everybody's largest: marginal gain per
    dominant resource share, as in Optimus; usually these are the GPUs. The smallest options are always granted.
    O(options log)."""
    amounts, limits, wanted = [[_amounts(o.takes) for o in options] for options in bidders], _amounts(free), [0, 0, 0]
    for rows in amounts:
        wanted = [total + max(column) for total, column in zip(wanted, zip(*rows, strict=True), strict=True)]
    scarce = [i for i, most in enumerate(limits) if wanted[i] > most]
    if not scarce:
        return [max(options, key=_value) for options in bidders]
    most = [limits[i] for i in scarce]
    offers = [
        [_offer(option, row, scarce, most) for option, row in zip(options, rows, strict=True)]
        for options, rows in zip(bidders, amounts, strict=True)
    ]
    chosen = [max(options, key=_dearest) for options in offers]
    if not _fit(chosen, most):
        least = [options[0] for options in offers]
        priced = _priced(offers, most)
        ways = ((priced, True), (priced, False), (least, False))[: 1 if len(offers) > MANY else 3]
        filled = [_fill(offers, *how, most) for how in ways]
        chosen = max(filled, key=lambda offers: sum([offer.value for offer in offers]))
    return [offer.option for offer in chosen]


class Offer(NamedTuple):
    """An option as `share` sees it."""

    value: float
    part: float
    """Its dominant share."""
    takes: tuple[int, ...]
    """Of each resource that is scarce."""
    option: Option


def _offer(option: Option, amounts: Sequence[int], scarce: Sequence[int], most: Sequence[int]) -> Offer:
    takes = tuple([amounts[i] for i in scarce])
    part = max([amount / max(1, whole) for amount, whole in zip(takes, most, strict=True)])
    return Offer(option.value, part, takes, option)


_value = attrgetter("value")


def _dearest(offer: Offer) -> tuple[float, float]:
    """What is best while nothing has a price; of equals, what takes least."""
    return offer.value, -offer.part


def _amounts(resources: Resources) -> tuple[int, int, int]:
    return resources.gpu_milli, resources.cpu_milli, resources.memory_bytes


def _fit(chosen: Sequence[Offer], most: Sequence[int]) -> bool:
    return all(sum([offer.takes[i] for offer in chosen]) <= limit for i, limit in enumerate(most))


def _hull(offers: Sequence[Offer]) -> list[Offer]:
    """Those that are the best at some price: the upper convex hull of value over part."""
    found: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.part, -offer.value)):
        if found and offer.value <= found[-1].value:
            continue
        while len(found) > 1:
            (first, at, *_), (second, then, *_) = found[-2], found[-1]
            if (second - first) * (offer.part - then) > (offer.value - second) * (then - at):
                break
            found.pop()
        found.append(offer)
    return found


def _priced(offers: Sequence[Sequence[Offer]], most: Sequence[int]) -> list[Offer]:
    """What each chooses at the lowest price at which all choices fit: along their hulls, the steps that bring most for
    their share go first."""
    hulls = [_hull(options) for options in offers]
    chosen = [hull[0] for hull in hulls]
    if not _fit(chosen, most):
        return [options[0] for options in offers]
    steps = [
        ((old.value - new.value) / (new.part - old.part), i, place)
        for i, hull in enumerate(hulls) for place, (old, new) in enumerate(pairwise(hull), 1)
    ]  # fmt: skip
    left = [limit - sum([offer.takes[j] for offer in chosen]) for j, limit in enumerate(most)]
    for _, group in groupby(sorted(steps), itemgetter(0)):
        fitted = {}
        for _, i, place in group:
            fitted[i] = hulls[i][place]
            old, new = hulls[i][place - 1], hulls[i][place]
            left = [room - more + less for room, more, less in zip(left, new.takes, old.takes, strict=True)]
        if min(left) < 0:
            break
        for i, offer in fitted.items():
            chosen[i] = offer
    return chosen


def _fill(
    offers: Sequence[Sequence[Offer]], chosen: Sequence[Offer], per_part: bool, most: Sequence[int]
) -> list[Offer]:
    """Further steps into what is left: those of the greatest gain per share, or of the greatest gain, first."""
    chosen, tops = list(chosen), [max([offer.value for offer in options]) for options in offers]
    left = [limit - sum([offer.takes[i] for offer in chosen]) for i, limit in enumerate(most)]

    def best(i: int) -> tuple[float, int, int] | None:
        """(Minus the gain, the bidder's place, the option's) of one bidder's best step from where it is."""
        value, part, takes, _ = chosen[i]
        if value >= tops[i]:
            return None
        room = [more + had for more, had in zip(left, takes, strict=True)]
        return min([
            (-(offer[0] - value) / (max(TINY, offer[1] - part) if per_part else 1.0), i, place)
            for place, offer in enumerate(offers[i]) if offer[0] > value and all(map(le, offer[2], room))
        ], default=None)  # fmt: skip

    steps = [step for i in range(len(offers)) if (step := best(i)) is not None]
    heapify(steps)
    while steps:
        _, i, place = heappop(steps)
        new, now = offers[i][place], chosen[i]
        after = [room - more + less for room, more, less in zip(left, new.takes, now.takes, strict=True)]
        if min(after) >= 0:
            left, chosen[i] = after, new
            if any(map(lt, new.takes, now.takes)):  # what it gave back may do for others
                steps = [step for j in range(len(offers)) if (step := best(j)) is not None]
                heapify(steps)
                continue
        if (found := best(i)) is not None:
            heappush(steps, found)
    return chosen


# ---- places ----


def _places(
    cluster: Cluster, movers: Sequence[Mover], sizes: Mapping[JobId, Size]
) -> tuple[dict[JobId, Gang], set[JobId]]:
    """Places of the gangs that start anew, the largest first, while everything else stays where it is; and the jobs
    for which there are none, or none in which the change pays. Leaves the ledger as it was."""
    found: dict[JobId, Gang] = {}
    unplaced: set[JobId] = set()
    mark = cluster.mark()
    try:
        for mover in movers:
            size = sizes[mover.job.id]
            if any(mover.have) and not mover.stays(size):
                cluster.lend(mover.job, [r for r in mover.job.replicas.values() if r.binding is not None])
            elif mover.in_place and size[0] < mover.have[0]:
                cluster.lend(mover.job, surplus(mover.job, mover.role.role, mover.have[0] - size[0]))
        fresh = [m for m in movers if any(sizes[m.job.id]) and not m.stays(sizes[m.job.id])]
        for mover in sorted(fresh, key=lambda m: -sizes[m.job.id][0] * m.gpus):
            size, here = sizes[mover.job.id], cluster.mark()
            gang = place_gang(cluster, sized(mover.shape, _named(mover, size)), score=COMPACT)
            if isinstance(gang, Gang) and _pays(cluster, mover, size, gang.bindings):
                found[mover.job.id] = gang
            else:
                cluster.rollback(here)
                unplaced.add(mover.job.id)
        for mover in movers:
            size = sizes[mover.job.id]
            if any(mover.have) and mover.stays(size) and size != mover.have and not _resizes(cluster, mover, size):
                unplaced.add(mover.job.id)
        return found, unplaced
    finally:
        cluster.rollback(mark)


def _resizes(cluster: Cluster, mover: Mover, size: Size) -> bool:
    """Whether there are places for a change of size in place, and it pays there."""
    job, by = mover.job, size[0] - mover.have[0]
    taken = [r.binding for r in job.replicas.values() if r.binding is not None]
    if by > 0:
        more = place_more(cluster, mover.shape, mover.role, range(mover.have[0], size[0]), taken)
        return bool(more) and _pays(cluster, mover, size, [*taken, *more])
    leaves = [r.id for r in surplus(job, mover.role.role, -by)]
    return _pays(cluster, mover, size, [binding for binding in taken if binding.id not in leaves])


def _pays(cluster: Cluster, mover: Mover, size: Size, seats: Iterable[Binding]) -> bool:
    """Whether a change that is to make a job faster does so there. What it gives to others it gives wherever it is."""
    if mover.model is None or not any(mover.have):
        return True
    per_node, nodes = mover.per_node(cluster), len({b.node for b in seats if b.role == mover.role.role})
    now = _speed(mover, mover.have, per_node)
    if nodes <= -(-size[0] // per_node) or _speed(mover, size, per_node) <= now:
        return True
    return mover.model.speedup(nodes, *size) * mover.kept[not mover.stays(size)] > now


def _named(mover: Mover, size: Size) -> dict[str, int]:
    """Role -> how many replicas."""
    return {role.role: n for role, n in zip((mover.role, mover.servers), size, strict=True) if role is not None}


def sized(shape: Shape, counts: Mapping[str, int]) -> Shape:
    """The same gang with exactly so many replicas of these roles."""
    return replace(
        shape, roles=tuple(replace(r, min=n, prefer=n) if (n := counts.get(r.role)) else r for r in shape.roles)
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
    cluster: Cluster, movers: Sequence[Mover], sizes: Mapping[JobId, Size], gangs: Mapping[JobId, Gang], now_ms: int
) -> list[Decision]:
    decisions: list[Decision] = []
    for mover in movers:
        job, size = mover.job, sizes[mover.job.id]
        if not any(size):
            continue
        gang, changes = gangs.get(job.id), any(mover.have) and size != mover.have
        why = _why(cluster, mover, size) if changes else ""
        named = tuple(_named(mover, size).items())
        cluster.targets[job.id] = Target(
            named, why, gang.bindings if gang else (), gang.coordinator_port if gang else 0
        )  # fmt: skip
        if not changes:
            continue
        if not mover.stays(size):
            outcome = Outcome(Phase.QUEUED, Reason.RESCALED, Cause(Reason.RESCALED, FailureClass.NONE, why))
            decisions.append(ev.AttemptStopping(now_ms, job.id, job.attempt, outcome))
        elif size[0] < mover.have[0]:
            leaving = tuple(r.id for r in surplus(job, mover.role.role, mover.have[0] - size[0]))
            decisions.append(ev.ReplicasReleased(now_ms, job.id, job.attempt, leaving, why=why))
        else:
            cluster.growing[job.id] = -1
    return decisions


def _why(cluster: Cluster, mover: Mover, size: Size) -> str:
    """`ps 1 to 2: predicted 1.31 times as fast`."""
    had = _named(mover, mover.have)
    changes = [f"{name} {had[name]} to {count}" for name, count in _named(mover, size).items() if count != had[name]]
    per_node = mover.per_node(cluster)
    before, after = _speed(mover, mover.have, per_node), _speed(mover, size, per_node)
    if before <= 0.0:
        return " and ".join(changes)
    others = ", where others gain more" if after < before else ""
    return f"{' and '.join(changes)}: predicted {after / before:.2f} times as fast{others}"


# ---- what other steps ask ----


def start_gang(cluster: Cluster, job: Job, shape: Shape, now_ms: int) -> Gang | Short:
    """The gang of a waiting job that has a target: in the places kept for it, else wherever as many fit. Short: there
    is no room, or somebody still leaves those places. Must run inside a trial; what it takes stays taken."""
    target = cluster.targets[job.id]
    roles = shape.by_name
    counts: dict[str, int] = {}
    for name, wanted in target.sizes:
        kinds = roles[name].gpu_kinds
        counts[name] = more(cluster, job, roles[name], wanted, kinds[0] if len(kinds) == 1 else "", now_ms)
    seats = [(binding, roles[binding.role]) for binding in target.bindings if cluster.fleet.usable(binding.node)]
    whole = bool(seats) and len(seats) == len(target.bindings) and tuple(counts.items()) == target.sizes
    if whole and cluster.ledger.take_all(seats):
        return Gang(target.bindings, target.coordinator_port)
    first = roles[target.sizes[0][0]]
    if in_motion(cluster):
        return Short(first, 0)
    for fewer in _fewer(counts, roles, first):
        gang = place_gang(cluster, sized(shape, fewer), score=COMPACT)
        if isinstance(gang, Gang):
            return gang
    return Short(first, 0)


def _fewer(counts: Mapping[str, int], roles: Mapping[str, RoleShape], first: RoleShape) -> Iterator[dict[str, int]]:
    """Ever smaller gangs down to the minimum of the role that trains, each with as many servers as wanted, else with
    as few as may be."""
    least = {name: min(count, roles[name].min) for name, count in counts.items()}
    for count in range(counts[first.role], first.min - 1, -1):
        yield {**counts, first.role: count}
        if any(least[name] != counts[name] for name in counts if name != first.role):
            yield {**least, first.role: count}
