"""Preemptive re-planning: at each pass all runnable jobs are placed anew in the policy's order, as if the cluster were
empty; those that find no place are stopped, and what runs stays where it is whenever that is possible.

Used by `schedule` when the policy names a `Replan` (SRTF, SRSF, Tiresias). Stopping and starting are two passes apart:
what a victim holds is free only once its replicas are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from jobsched.core import events as ev
from jobsched.core.cluster import Cluster, Standing
from jobsched.core.job import Binding, Cause, FailureClass, Job, Outcome, Phase, Reason, RoleShape, Shape
from jobsched.core.lines import Line
from jobsched.core.plan import Decision
from jobsched.core.policies.estimate import ran_ms
from jobsched.core.policies.gathering import exchange, gather, lend
from jobsched.core.policies.parts import PoolKey
from jobsched.core.policies.placement import Gang, Score, place_gang
from jobsched.core.policies.quota import Refused
from jobsched.core.resources import JobId


class Turn(NamedTuple):
    """One runnable job in its place: lower level first. `until_ms`: when it changes by itself (0: never). `kind`: the
    GPUs that it should have ("": those that its spec prefers); one that runs on others moves. `gather`: so does one
    that runs on more nodes than it would have to."""

    job: Job
    level: int
    until_ms: int = 0
    kind: str = ""
    gather: bool = False


FEW, DEEPER = 4, 16
"""With `Replan.frugal`: of each kind of jobs that wait so many are looked at first, so many times more whenever all of
these would run."""
FOR_ANOTHER = "a job that goes first needs the place"
Heads = Callable[[Cluster, Sequence[Line], int, int], Iterable[JobId]]
"""(cluster, lines that differ in nothing but their outlook, how many, now) -> the first so many, of each sort that the
order tells apart, and whoever else it has to see."""


def first(cluster: Cluster, lines: Sequence[Line], most: int, now_ms: int) -> Iterable[JobId]:
    """The first of each line, and everybody who has run before: of them not the same is left."""
    return [place.job_id for line in lines for place in line.places[: None if line.key.has_run else most]]


Order = Callable[[Cluster, Sequence[Job], int], list[Turn]]
"""(cluster, runnable jobs by age, now) -> the same jobs, best first."""


@dataclass(frozen=True, slots=True)
class Replan:
    """How a preemptive policy re-plans."""

    order: Order
    repack: bool = False
    """Place everybody from nothing, and move running jobs too when a better one finds no place between them; else
    whoever runs keeps its seats or is stopped."""
    running_first: bool = False
    """Within a level, jobs that run stand before those that wait (Tiresias in Muri's simulator)."""
    remember: bool = False
    """The order looks at where jobs stood the last time."""
    settle: bool = False
    """Start nobody before everything that was stopped is gone."""
    heads: Heads | None = None
    """Which jobs of a line the order needs to be asked about; None: all. Where it never puts a later job of a line
    before an earlier one (`Policy.rank` and `Policy.alike` make such lines), `first` are enough."""
    frugal: bool = False
    """Whether `heads` may be asked for fewer than could run: the order ranks each job by itself, so that behind one
    that does not fit nobody of its kind does."""


Admit = Callable[[Job], Shape | Refused]
"""The shape in which a job passes its queue's quota, counting what was admitted before."""
Booked = Callable[[Job, tuple[Binding, ...]], None]


def replan(
    cluster: Cluster, now_ms: int, how: Replan, score: Score, admit: Admit, booked: Booked
) -> tuple[list[Decision], int]:
    """Decisions that bring the cluster nearer to the wanted set of running jobs, and how many jobs were looked at. Must
    run inside `cluster.trial()`. O(n log n) in the running jobs of those parts of the cluster where something changed
    or comes due and in the jobs that wait there: with `Replan.heads` in as many of each kind as could run, where it is
    frugal in their kinds and in those that start."""
    parts = cluster.parts
    everything = parts.renew(
        (cluster.fleet.moved, cluster.ledger.unblocked), cluster.queues.values(), cluster.crowds, cluster.fleet.pool,
        cluster.fleet.nodes,
    )
    dirty = {parts.part_of[key]: None for key in cluster.stirred if key in parts.part_of}
    dirty |= {part: None for part, due in parts.due_ms.items() if due <= now_ms}
    cluster.stirred.clear()
    crowds: dict[int, list[PoolKey]] = {}
    for key in cluster.crowds:
        part = parts.part_of[key]
        if everything or part in dirty:
            crowds.setdefault(part, []).append(key)
    decisions: list[Decision] = []
    examined = 0
    for part, keys in crowds.items():
        contest = _Contest(cluster, keys, parts.gpus[part], now_ms, how)
        found, until_ms = _replan_part(cluster, contest, now_ms, how, score, admit, booked)
        decisions += found
        examined += contest.examined
        parts.due_ms.pop(part, None)
        if until_ms:
            parts.due_ms[part] = until_ms
    cluster.next_pass_ms = min(parts.due_ms.values(), default=0)
    return decisions, examined


class _Contest:
    """Who competes for one part of the cluster: all that hold something there, and of each kind of jobs that wait the
    first few; more of those kinds of which all that were looked at would run."""

    def __init__(self, cluster: Cluster, keys: Sequence[PoolKey], gpu_milli: int, now_ms: int, how: Replan) -> None:
        self._cluster, self._now_ms, self._heads = cluster, now_ms, how.heads
        crowds = [cluster.crowds[key] for key in keys]
        ids = [job_id for crowd in crowds for job_id in (crowd.jobs if how.heads is None else crowd.active)]
        self.known = [cluster.jobs[job_id] for job_id in ids]
        self.examined = len(ids)
        self._kinds: list[_Kind] = []
        for key in keys if how.heads is not None else ():
            for akin, lines in cluster.lines.of_pool.get(key, {}).items():
                least = sum([role.min * role.gpu_milli for role in akin.shape.roles])
                most = gpu_milli // least if least else len(cluster.jobs)
                self._kinds.append(_Kind(tuple(lines.values()), most, min(FEW, most) if how.frugal else most))

    def jobs(self) -> list[Job]:
        """Those to put in order."""
        found = list(self.known)
        for kind in self._kinds:
            if kind.seen is None:
                assert self._heads is not None
                kind.seen = list(self._heads(self._cluster, kind.lines, kind.few, self._now_ms))
                self.examined += len(kind.seen)
            found += [self._cluster.jobs[job_id] for job_id in kind.seen]
        return found

    def deepen(self, wanted: Container[JobId]) -> bool:
        """Whether there are others that might run too: jobs of a kind go in their order, so that behind one that would
        not run nobody would."""
        deeper = False
        for kind in self._kinds:
            seen = kind.seen or ()
            if kind.few < kind.most and len(seen) < kind.waiting and sum([i in wanted for i in seen]) >= kind.few:
                kind.few, kind.seen, deeper = min(DEEPER * kind.few, kind.most), None, True
        return deeper


@dataclass(slots=True)
class _Kind:
    """Jobs that wait and differ in nothing but their outlook."""

    lines: tuple[Line, ...]
    most: int
    """No more of them could run at once if nobody else did."""
    few: int
    """So many are looked at, of each outlook or urgency."""
    seen: list[JobId] | None = None

    @property
    def waiting(self) -> int:
        return sum([len(line.places) for line in self.lines])


def _replan_part(
    cluster: Cluster, contest: _Contest, now_ms: int, how: Replan, score: Score, admit: Admit, booked: Booked
) -> tuple[list[Decision], int]:
    """The same for jobs that compete with each other and with nobody else; and when their order changes by itself."""
    held = {job.id: _held(cluster, job) for job in contest.known if job.replicas}
    for job_id in held:  # whoever has run so long teaches what to expect of its like
        cluster.estimates.ran(job := cluster.jobs[job_id], ran_ms(job, now_ms))
    choose, mark = _choose if how.repack else _choose_beside, cluster.quotas.mark()
    while True:
        runnable = [
            job
            for job in contest.jobs()
            if (job.phase is Phase.QUEUED and cluster.waits(job.id))
            or (job.phase in (Phase.STARTING, Phase.RUNNING) and not job.cancel_by and not job.stop_wish)
        ]
        turns = how.order(cluster, runnable, now_ms)
        wanted = choose(cluster, turns, held, score, admit, booked)
        if not contest.deepen(wanted):
            break
        cluster.quotas.rollback(mark)
    stays = {job_id for job_id in wanted if job_id in held}
    moves: set[JobId] = set()
    fresh = [turn.job for turn in turns if turn.job.id in wanted and turn.job.id not in held]
    if not how.repack or not _fits_beside(cluster, fresh, held, stays, wanted, score):
        moves = {job_id for job_id in stays if set(wanted[job_id].bindings) != {b for b, _ in held[job_id]}}
        stays -= moves
    decisions: list[Decision] = []
    for turn in turns if len(stays) < len(held) else ():
        job = turn.job
        if job.id in held and job.id not in stays:
            reason = Reason.MOVED if job.id in moves else Reason.PREEMPTED
            text = f"it goes on elsewhere on {turn.kind}" if job.id in moves and turn.kind else FOR_ANOTHER
            cause = Cause(reason, FailureClass.PREEMPTED, text)
            outcome = Outcome(Phase.QUEUED, reason, cause)
            decisions.append(ev.AttemptStopping(now_ms, job.id, job.attempt, outcome))
    leaving = bool(decisions) or any(job.phase is Phase.STOPPING for job in contest.known)
    running = set(stays)
    if not (how.settle and leaving):
        for job in fresh:
            gang = _seat(cluster, job, wanted[job.id], score)
            if gang is None:
                break
            running.add(job.id)
            decisions.append(ev.AttemptPlaced(now_ms, job.id, job.attempt + 1, gang.bindings, gang.coordinator_port))
    if how.remember:
        _remember(cluster, turns, running if not leaving else set(wanted), how.running_first)
    return decisions, min((t.until_ms for t in turns if t.until_ms and _counts(t, running)), default=0)


def _counts(turn: Turn, running: set[JobId]) -> bool:
    """Whether it matters when a turn changes: who is being stopped comes back as one that waits."""
    return turn.job.id in running or turn.job.phase is Phase.QUEUED


@dataclass(frozen=True, slots=True)
class _Wanted:
    shape: Shape
    bindings: tuple[Binding, ...]
    exchanged: Gang | None = None
    """Set: it must have exactly these seats, as others go elsewhere for it."""


_Bookings = Sequence[tuple[Binding, RoleShape]]
_Held = dict[JobId, list[tuple[Binding, RoleShape]]]


def _held(cluster: Cluster, job: Job) -> list[tuple[Binding, RoleShape]]:
    roles = cluster.shape(job).by_name
    return [(r.binding, roles[r.role]) for r in job.replicas.values() if r.binding is not None]


def _choose(
    cluster: Cluster, turns: Sequence[Turn], held: _Held, score: Score, admit: Admit, booked: Booked
) -> dict[JobId, _Wanted]:
    """Who would run on the empty cluster, best first, and where. Leaves the ledger as it was."""
    ledger = cluster.ledger
    mark = ledger.mark()
    for bookings in held.values():
        for binding, role in bookings:
            ledger.lend(binding, role)
    wanted: dict[JobId, _Wanted] = {}
    too_big: set[tuple[int, str]] = set()
    for turn in turns:
        # like jobs share their shape, and hashing one costs as much as placing it
        asked = (id(cluster.shape(turn.job)), turn.kind)
        if asked in too_big:  # less and less is free
            continue
        shape = admit(turn.job)
        if isinstance(shape, Refused):
            continue
        shape = of_kind(shape, turn.kind)
        gang = place_gang(cluster, shape, (), score)
        if isinstance(gang, Gang):
            wanted[turn.job.id] = _Wanted(shape, gang.bindings)
            booked(turn.job, gang.bindings)
        else:
            too_big.add(asked)
    ledger.rollback(mark)
    return wanted


def _choose_beside(
    cluster: Cluster, turns: Sequence[Turn], held: _Held, score: Score, admit: Admit, booked: Booked
) -> dict[JobId, _Wanted]:
    """Who would run, best first, when nobody who runs is moved: a waiting job may take the seats of those that stand
    after it, of as few of the last as it needs. Leaves the ledger as it was.

    O(turns + waiting shapes * log(running) placements); one that fits nowhere is tried once per shape."""
    start = cluster.ledger.mark()
    for job_id, bookings in held.items():
        if cluster.jobs[job_id].phase is Phase.STOPPING:
            lend(cluster, bookings)
    last = [turn.job.id for turn in reversed(turns) if turn.job.id in held]
    kinds = {job_id: _kinds(cluster, held[job_id]) for job_id in last} if any(turn.kind for turn in turns) else {}
    seats = _Seats(cluster, held, score, admit, last, kinds)
    wanted: dict[JobId, _Wanted] = {}
    for turn in turns:
        found = seats.of(turn)
        if found is not None:
            wanted[turn.job.id] = found
            booked(turn.job, found.bindings)
    _exchange(cluster, turns, held, wanted, score)
    cluster.ledger.rollback(start)
    return wanted


@dataclass(slots=True)
class _Seats:
    """Who sits where, as one turn after the other is given its seats."""

    cluster: Cluster
    held: _Held
    score: Score
    admit: Admit
    last: list[JobId]
    """Who runs and still has its seats, worst first."""
    kinds: dict[JobId, tuple[str, ...]]
    """On which GPUs each of them runs, where that matters."""
    lent: set[JobId] = field(default_factory=set)
    """Who had to give up its seats."""
    too_big: set[tuple[int, str]] = field(default_factory=set)
    """(Shape, kind) that fitted nowhere: less and less is free, and fewer and fewer stand after."""

    def of(self, turn: Turn) -> _Wanted | None:
        """Where a job would run; None: nowhere."""
        job_id, mine = turn.job.id, self.held.get(turn.job.id)
        if mine is None:
            return self._anew(turn)
        if job_id not in self.lent:
            self.last.pop()
        elsewhere = self._anew(turn) if turn.kind and self.kinds[job_id] != (turn.kind,) else None
        if elsewhere is None:
            return self._here(turn, mine)
        if job_id not in self.lent:
            lend(self.cluster, mine)
        return elsewhere

    def _anew(self, turn: Turn) -> _Wanted | None:
        """In free seats, else in those of as few of the last as it needs."""
        asked = (id(self.cluster.shape(turn.job)), turn.kind)
        admitted = self.admit(turn.job) if asked not in self.too_big else None
        if not isinstance(admitted, Shape):
            return None
        shape = of_kind(admitted, turn.kind)
        near = [job_id for job_id in self.last if turn.kind in self.kinds[job_id]] if turn.kind else self.last
        victims, gang = _fewest_victims(self.cluster, shape, near, self.held, self.score)
        if gang is None:
            self.too_big.add(asked)
            return None
        if victims:
            leave = dict.fromkeys(near[:victims])
            self.lent.update(leave)
            self.last = [job_id for job_id in self.last if job_id not in leave]
        return _Wanted(shape, gang.bindings)

    def _here(self, turn: Turn, mine: _Bookings) -> _Wanted | None:
        """In its own seats, or on fewer nodes where it gathers; None when others sit there now."""
        shape, gave_up, gang = self.cluster.shape(turn.job), turn.job.id in self.lent, None
        if turn.gather and not gave_up:
            gang = gather(self.cluster, of_kind(shape, turn.kind), mine, self.score)
        if gang is not None:
            return _Wanted(shape, gang.bindings)
        if gave_up and not _sit_again(self.cluster, mine):
            return None
        return _Wanted(shape, tuple([binding for binding, _ in mine]))


def _exchange(
    cluster: Cluster, turns: Sequence[Turn], held: _Held, wanted: dict[JobId, _Wanted], score: Score
) -> None:
    """Those that would be on more nodes than they have to change places with others; changes `wanted`."""
    shapes, seats = {}, {}
    for turn in turns:
        job_id = turn.job.id
        if turn.gather and (want := wanted.get(job_id)) is not None:
            roles = want.shape.by_name
            shapes[job_id] = of_kind(want.shape, turn.kind)
            seats[job_id] = [(binding, roles[binding.role]) for binding in want.bindings]
    for job_id, gang in exchange(cluster, shapes, seats, held, score).items():
        wanted[job_id] = replace(wanted[job_id], bindings=gang.bindings, exchanged=gang)


def _seat(cluster: Cluster, job: Job, want: _Wanted, score: Score) -> Gang | None:
    """The seats of one that is to start, taken."""
    gang = want.exchanged
    if gang is not None and not any(b.node in job.avoid or not cluster.fleet.usable(b.node) for b in gang.bindings):
        roles = want.shape.by_name
        if _sit_again(cluster, [(binding, roles[binding.role]) for binding in gang.bindings]):
            return gang
    placed = place_gang(cluster, want.shape, job.avoid, score)
    return placed if isinstance(placed, Gang) else None


@lru_cache(maxsize=4_096)
def of_kind(shape: Shape, kind: str) -> Shape:
    """The same gang on GPUs of one kind; "": as it is. Like jobs share one, asked for in each pass."""
    if not kind:
        return shape
    roles = [replace(role, gpu_kinds=(kind,)) if role.gpu_milli else role for role in shape.roles]
    return replace(shape, roles=tuple(roles))


def _kinds(cluster: Cluster, bookings: _Bookings) -> tuple[str, ...]:
    return tuple(dict.fromkeys([cluster.fleet.kind_of(binding) for binding, _ in bookings if binding.gpus]))


def _fewest_victims(
    cluster: Cluster, shape: Shape, last: Sequence[JobId], held: _Held, score: Score
) -> tuple[int, Gang | None]:
    """How many of `last` must give up their seats for a gang, which is then placed; None when all are not enough."""

    def seat(beyond: int, count: int) -> Gang | None:
        for job_id in last[beyond:count]:
            lend(cluster, held[job_id])
        gang = place_gang(cluster, shape, (), score)
        return gang if isinstance(gang, Gang) else None

    mark = cluster.ledger.mark()
    gang, few, many = seat(0, 0), 0, 0
    while gang is None and many < len(last):  # few are enough as a rule
        few, many = many, min(len(last), 2 * many + 1)
        gang = seat(few, many)
    if gang is None:
        cluster.ledger.rollback(mark)
        return 0, None
    while many - few > 1:
        cluster.ledger.rollback(mark)
        middle = (few + many) // 2
        few, many = (few, middle) if seat(0, middle) is not None else (middle, many)
    cluster.ledger.rollback(mark)
    return many, seat(0, many)


def _sit_again(cluster: Cluster, bookings: _Bookings) -> bool:
    """Give lent seats back to whom they belonged, unless somebody sits there now. Where a node is gone, and the job
    with it, that is not ours to decide."""
    ledger = cluster.ledger
    return ledger.take_all([(binding, role) for binding, role in bookings if binding.node in ledger.spaces])


def _fits_beside(
    cluster: Cluster, fresh: Sequence[Job], held: _Held, stays: set[JobId], wanted: dict[JobId, _Wanted], score: Score
) -> bool:
    """Whether the newcomers fit while everything that stays keeps its place. Leaves the ledger as it was."""
    ledger = cluster.ledger
    mark = ledger.mark()
    for job_id, bookings in held.items():
        if job_id not in stays:
            for binding, role in bookings:
                ledger.lend(binding, role)
    fits = all(isinstance(place_gang(cluster, wanted[job.id].shape, (), score), Gang) for job in fresh)
    ledger.rollback(mark)
    return fits


def _remember(cluster: Cluster, turns: Sequence[Turn], running: set[JobId], running_first: bool) -> None:
    ordered = sorted(turns, key=lambda t: (t.level, running_first and t.job.id not in running))
    for place, turn in enumerate(ordered):
        cluster.standing[turn.job.id] = Standing(turn.level, place)
