"""Runs a workload through the real controller, an in-memory store and the simulated engine, in virtual time.

Nothing here decides anything: time jumps to the next arrival, engine event or deadline of the controller. Called by
`jobsched simulate`, the benchmarks and the fault tests.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from jobsched.controller.loop import Controller
from jobsched.core import events as ev
from jobsched.core.accounting import Accounts, Summary
from jobsched.core.job import FailureClass, Job, Phase
from jobsched.core.launch import Launch, LaunchKey, parse_key
from jobsched.core.observation import Progress
from jobsched.core.passes import Policy
from jobsched.core.policies.backfill import Backfill
from jobsched.core.policies.defragmentation import Defragmentation
from jobsched.core.policies.elasticity import Elasticity
from jobsched.core.policies.estimate import REPORT_AFTER_MS
from jobsched.core.policies.fairness import FairShare
from jobsched.core.policies.families import gpus_milli
from jobsched.core.policies.health import Health
from jobsched.core.policies.kinds import Speed, by_kind, learned_left, learned_speed, where_alike
from jobsched.core.policies.ordering import (
    LEASE_MS,
    expected_service,
    fifo,
    finish_time_fairness,
    gpu_time,
    in_time,
    in_time_heads,
    knapsack,
    learned,
    learned_heads,
    least_attained,
    left_told,
    outlook,
    patient,
    priority,
    shortest,
)
from jobsched.core.policies.placement import Score
from jobsched.core.policies.preemption import Order, Replan, first
from jobsched.core.policies.victims import Preemption
from jobsched.core.resources import WHOLE_GPU, JobId, NodeName
from jobsched.sim.backend import FOREVER_MS, Script, SimBackend
from jobsched.sim.clock import SimClock
from jobsched.sim.throughput import SERVER, AdaptiveCourse, Course, Seats, ServedCourse, Steady, SteadyCourse
from jobsched.sim.workload import Arrival, Workload
from jobsched.spec.job import SERVING_ROLES
from jobsched.store.memory import MemoryStore

START_MS = 1_699_920_000_000
"""A midnight, so that passes at whole minutes and days fall where the traces' own simulators have them."""
NEVER_MS = 1 << 60
FAR_MS = NEVER_MS >> 3
"""Who has nothing to do for so long has nothing to do."""
LOSING = (FailureClass.USER, FailureClass.OOM, FailureClass.HANG, FailureClass.INFRA)
"""Ends that nobody could save before."""
REPORTS_MS = (1_000, *(1_000 + (REPORT_AFTER_MS << 2 * k) for k in range(9)))
"""When a job that runs steadily reports: more often would tell nothing new."""
FAIR_HALF_LIFE_MS = 7 * 86_400_000
MIN_RUN_MS = 60_000
"""How long a job stays on a kind of GPU at least."""
CHECK = Script(run_ms=20_000)
"""A pre-flight check finds nothing."""
STUCK_TICKS = 10_000
"""So many ticks at one instant mean that the loop chases its own tail."""


class Stuck(AssertionError):
    """Virtual time stands still although the controller keeps deciding."""


@dataclass(slots=True)
class _Run:
    """One attempt of a job on the engine."""

    attempt: int
    since_ms: int
    seats: Seats
    pause_ms: int
    """Time since then without progress."""
    checked_ms: int
    """When a pause was last looked at."""
    counted_ms: int = 0
    """Time with progress that the course knows of."""
    saved_ms: int = 0
    """Of that, when it last saved, and the step then."""
    saved_step: int = -1
    ends_at_ms: int = 0
    """0: not known yet."""
    keys: list[LaunchKey] = field(default_factory=list)

    def ran_ms(self, now_ms: int) -> int:
        """Time with progress."""
        return max(0, now_ms - self.since_ms - self.pause_ms)


class Player:
    """What each replica does and how far each job is: the engine's scripts, and the truth behind them."""

    def __init__(self, workload: Workload, store: MemoryStore, clock: SimClock, reports: bool = False) -> None:
        self.workload, self._reports = workload, reports
        self._store, self._clock = store, clock
        self._arrivals = {a.job_id: a for a in workload.arrivals}
        self._courses: dict[JobId, Course] = {}
        self._runs: dict[JobId, _Run] = {}
        self._seq = 0
        self._kinds = {n.name: {g.id: g.kind for g in n.gpus} for n in workload.nodes}
        self._widest_milli = WHOLE_GPU * max(1, *(len(n.gpus) for n in workload.nodes))
        self._asking: dict[JobId, Seats] = {}
        self._pooled = next((pool.gpu_kind for pool in workload.pools), "")

    def script(self, launch: Launch) -> Script:
        """Told to the engine when a replica starts."""
        job_id = JobId(launch.contract.job_id)
        arrival = self._arrivals.get(job_id)
        if arrival is None:  # a check of a node, by the scheduler itself
            return CHECK
        now, rules = self._clock.now_ms(), self.workload.rules
        run, job = self._runs.get(job_id), self._store.job(job_id)
        assert job is not None
        if run is None or run.attempt != job.attempt:
            if job.attempt > 1:
                self.catch_up()
            start_ms = 0 if rules.pause_everyone else arrival.work.start_ms
            start_ms += rules.restart_ms if job.attempt > 1 else 0
            run = self._runs[job_id] = _Run(job.attempt, now, self._seats(job), start_ms, now)
        run.keys.append(launch.key)
        course = self.course(job_id)
        if launch.contract.role in SERVING_ROLES:  # never ends by itself
            return Script(run_ms=FOREVER_MS, kill_ms=rules.kill_ms)
        left = run.pause_ms + course.left_ms(run.seats) - run.ran_ms(now) + run.counted_ms
        run_ms = max(1, round(left)) if left < FOREVER_MS else FOREVER_MS
        if not (self._reports and isinstance(course, SteadyCourse) and course.work.steps and len(run.keys) == 1):
            return Script(run_ms=run_ms, kill_ms=rules.kill_ms)

        def progress() -> Progress | None:
            ran = run.ran_ms(self._clock.now_ms())
            return Progress(course.step(run.seats, ran), course.work.steps) if ran or not run.pause_ms else None

        pause = round(run.pause_ms)
        instants = tuple(pause + after_ms for after_ms in REPORTS_MS if pause + after_ms < run_ms)
        return Script(run_ms=run_ms, kill_ms=rules.kill_ms, progress=progress, reports_ms=instants)

    @property
    def plays(self) -> bool:
        """Whether some attempt was still running when that was last looked at."""
        return bool(self._runs)

    def report(self, engine: SimBackend) -> None:
        """Elastic jobs tell how fast they are, and those that end before their next report get their end."""
        now = self._clock.now_ms()
        for job_id, run in self._runs.items():
            course, ran = self.course(job_id), run.ran_ms(now)
            if isinstance(course, ServedCourse) and ran:
                self._resize(engine, job_id, run, course)
                step, workers, told = course.told(run.seats, ran - run.counted_ms)
                saves = self.workload.rules.save_every_ms
                if saves and ran >= run.saved_ms + saves:
                    run.saved_ms, run.saved_step = ran, step
                for key in run.keys:
                    if parse_key(key).role not in SERVING_ROLES:
                        progress = Progress(step, course.work.steps, 0, 0, run.saved_step, "", workers, told)
                        engine.tell(key, progress)
            if not isinstance(course, AdaptiveCourse) or run.ends_at_ms or not ran:
                continue
            course.advance(run.seats, ran - run.counted_ms)
            run.counted_ms = ran
            left = course.left_ms(run.seats)
            if left < FOREVER_MS:
                run.ends_at_ms = now + round(left)
                for key in run.keys:
                    engine.end_at(key, run.ends_at_ms)
            if course.report is not None:
                replicas, metrics = course.report.replicas, course.report.metrics()
                engine.tell(run.keys[0], Progress(round(course.progress), world_size=replicas, metrics=metrics))

    def _resize(self, engine: SimBackend, job_id: JobId, run: _Run, course: ServedCourse) -> None:
        """Replicas that came or went in place since the last report make a job faster or slower from now on."""
        job, now = self._store.job(job_id), self._clock.now_ms()
        seats = self._seats(job) if job is not None and job.phase is Phase.RUNNING else run.seats
        if seats == run.seats:
            return
        ran = run.ran_ms(now)
        course.advance(run.seats, ran - run.counted_ms)
        run.counted_ms, run.seats = ran, seats
        for key in run.keys:
            if parse_key(key).role not in SERVING_ROLES:
                engine.end_at(key, now + max(1, round(course.left_ms(seats))))

    def course(self, job_id: JobId) -> Course:
        course = self._courses.get(job_id)
        if course is None:
            course = self._courses[job_id] = self._arrivals[job_id].work.begin()
        return course

    def left_ms(self, job: Job) -> int:
        """What an informed policy is told: the true time to the end on the seats that it asks for, of the kind by which
        run times are told (Gavel's reference worker type). Where it sits must not tell: who is shorter would change
        with every start and stop, and jobs would preempt each other in turns."""
        left, seats = self._left(job)
        asked, course = self._asked(job), self.course(job.id)
        here_ms = course.left_ms(seats)
        return round(left * course.left_ms(asked) / here_ms) if here_ms and seats != asked else left

    def work_left_ms(self, job: Job) -> float:
        """True work to the end: what is left of the time at speed 1."""
        left, seats = self._left(job)
        return left * self.speed(job, seats)

    def _left(self, job: Job) -> tuple[int, Seats]:
        """(true time to the end, on which seats): those that it has, or asks for."""
        course, run = self.course(job.id), self._runs.get(job.id)
        if run is not None and not job.phase.active:
            self.catch_up()
            run = None
        if run is None or run.attempt != job.attempt or not job.phase.active:
            seats = self._seats(job)
            return round(course.left_ms(seats)), seats
        return round(course.left_ms(run.seats)) - run.ran_ms(self._clock.now_ms()), run.seats

    def speed(self, job: Job, seats: Seats) -> float:
        """True speed on such seats."""
        work = self._arrivals[job.id].work
        return work.speed(seats) if isinstance(work, Steady) else 1.0

    def pause_everyone(self, engine: SimBackend) -> None:
        """Each running job makes no progress for its start cost, or since the last such pause if that is shorter."""
        now = self._clock.now_ms()
        for job_id, run in self._runs.items():
            pause = min(now - run.checked_ms, self._arrivals[job_id].work.start_ms)
            run.checked_ms = now
            if pause and run.ran_ms(now) < round(self.course(job_id).left_ms(run.seats)):
                run.pause_ms += pause
                for key in run.keys:
                    engine.stall(key, pause)

    def catch_up(self) -> None:
        """Read what ended since the last look, and count what it achieved."""
        news = self._store.read(self._seq, 1 << 30)
        self._seq += len(news)
        for event in [stored.event for stored in news]:
            if isinstance(event, ev.AttemptStopping):
                run = self._runs.get(event.job_id)
                if run is not None and run.attempt == event.attempt:
                    del self._runs[event.job_id]
                    ran = run.ran_ms(event.at_ms) - run.counted_ms
                    cause = event.outcome.cause
                    if cause is not None and cause.failure_class in LOSING and self.workload.rules.save_every_ms:
                        ran -= ran % self.workload.rules.save_every_ms
                    self.course(event.job_id).advance(run.seats, ran)

    def _seats(self, job: Job) -> Seats:
        seats: dict[NodeName, tuple[str, int]] = {}
        for replica in job.replicas.values():
            if replica.binding is not None and replica.binding.gpus:
                node, gpus = replica.binding.node, replica.binding.gpus
                milli = seats.get(node, ("", 0))[1] + sum([share.milli for share in gpus])
                kinds = self._kinds.get(node)
                seats[node] = (kinds[gpus[0].gpu] if kinds is not None else self._pooled, milli)
        if not seats:
            return self._asked(job)
        if "ps" not in job.spec.roles:
            return tuple(seats.values())
        servers = sum([r.role == "ps" and r.binding is not None for r in job.replicas.values()])
        return (*seats.values(), *(SERVER,) * servers)

    def _asked(self, job: Job) -> Seats:
        """What it asks for: on as few nodes as there can be."""
        known = self._asking.get(job.id)
        if known is None:
            roles = job.spec.roles
            milli = sum(r.gpu.milli * r.replicas.prefer for r in roles.values() if r.gpu) or WHOLE_GPU
            whole, rest = divmod(milli, self._widest_milli)
            servers = roles["ps"].replicas.prefer if "ps" in roles else 0
            seats = [*(self._widest_milli,) * whole, *((rest,) if rest else ())]
            known = self._asking[job.id] = (*(("", seat) for seat in seats), *(SERVER,) * servers)
        return known


@dataclass(slots=True)
class Result:
    """What a run gave."""

    workload: str
    policy: str
    seed: int
    summary: Summary
    accounts: Accounts
    ticks: int
    cpu_s: float
    store: MemoryStore = field(repr=False)

    def row(self) -> dict[str, object]:
        """The final JSON line of `jobsched simulate`."""
        return {**self.summary.to_dict(), "ticks": self.ticks, "cpu_s": round(self.cpu_s, 3), "policy": self.policy,
                "seed": self.seed}  # fmt: skip


HEARS = ("learned", "guessed", "kinds-learned")
"""Policies under which jobs whose steps are known report how many they have made of how many."""
Told = Callable[[Job], int]
"""What a policy may know of a job's time to its end, in milliseconds."""
PolicyMaker = Callable[["Simulation"], Policy]
"""Policies that are told something get it from the simulation they run in."""


class Simulation:
    """Everything real but the engine and the time. `step()` is one tick; `run()` goes to the end."""

    def __init__(self, workload: Workload, make_policy: PolicyMaker, name: str = "", seed: int = 0) -> None:
        self.workload, self.name, self.seed = workload, name, seed
        self.clock = SimClock(START_MS)
        self.store = MemoryStore()
        self.player: Player = Player(workload, self.store, self.clock, name in HEARS)
        self.engine = SimBackend(self.clock, workload.nodes, self.player.script)
        self.arrivals: dict[JobId, Arrival] = {a.job_id: a for a in workload.arrivals}
        self._coming = sorted(workload.arrivals, key=lambda a: (a.at_ms, a.job_id), reverse=True)
        self._widest: dict[str, int] = {}
        """Kind -> how many GPUs of it one node has at most."""
        for node in workload.nodes:
            for kind, count in Counter(gpu.kind for gpu in node.gpus).items():
                self._widest[kind] = max(count, self._widest.get(kind, 0))
        self.policy = make_policy(self)
        self.ticks = 0
        self.cpu_s = 0.0
        self._still = 0
        self._turns_at = 0
        """When the order of a re-plan changes by itself."""
        self._reported_ms = -1
        self.controller = self.boot()

    def boot(self) -> Controller:
        """A new server process: nothing survives but store and engine."""
        self.engine.close()
        self.controller = Controller(
            self.store, self.engine, self.clock, self.policy, queues=self.workload.queues,
            lease_ttl_ms=NEVER_MS, idle_ms=NEVER_MS,
        )  # fmt: skip
        return self.controller

    def told_ms(self, job: Job) -> int:
        """What users say about a job's run time, or else the truth."""
        told = self.arrivals[job.id].told_ms
        return self.player.left_ms(job) if told is None else told

    def speed_on(self, job: Job, kind: str) -> float:
        """The job's true speed when all its GPUs are of that kind, on as few nodes as there can be."""
        nodes = -(-gpus_milli(job) // (WHOLE_GPU * self._widest.get(kind, 1)))
        return self.player.speed(job, ((kind, WHOLE_GPU),) * nodes)

    def step(self) -> bool:
        """Submit what is due, tick once, move on to the next instant; False when nothing will ever happen again."""
        now, rules = self.clock.now_ms(), self.workload.rules
        self.happen(now)
        pause = self.controller.tick()
        self.ticks += 1
        if rules.pause_everyone and self.policy.replan is not None:  # other passes come round as time goes by
            with self.controller.view() as (cluster, _):
                self._turns_at = cluster.next_pass_ms
        instants = [now + pause] if pause < FAR_MS else []
        if (wake := self.engine.next_event_ms()) is not None:
            instants.append(wake)
        if (coming := self.next_arrival_ms()) is not None:
            instants.append(coming)
        if (every := rules.report_every_ms) and not rules.pass_every_ms and self.player.plays:
            instants.append(now - now % every + every)
        if not instants:
            return False
        instant = min(instants)
        if instant > now:
            self._still = 0
            self.clock.advance_to(instant)
        else:
            self._still += 1
            if self._still > STUCK_TICKS:
                raise Stuck(f"{STUCK_TICKS} ticks at {now}")
        return True

    def happen(self, now: int) -> None:
        """Submit what is due; jobs pause and report as the rules have it."""
        rules, submitted = self.workload.rules, self.submit(now)
        if rules.pause_everyone and (submitted or self._turns_at == now or self.engine.ends_now()):
            self.player.catch_up()
            self.player.pause_everyone(self.engine)
        every = rules.report_every_ms
        if every and now % every == 0 and self._reported_ms != now:
            self._reported_ms = now
            self.player.catch_up()
            self.player.report(self.engine)

    def next_arrival_ms(self) -> int | None:
        """When the next job comes; None after the last."""
        return START_MS + self._coming[-1].at_ms if self._coming else None

    def submit(self, now: int) -> bool:
        """Submit what is due; whether anything was."""
        coming = self._coming
        if not coming or START_MS + coming[-1].at_ms > now:
            return False
        events: list[ev.Event] = []
        while coming and START_MS + coming[-1].at_ms <= now:
            a = coming.pop()
            events.append(ev.JobSubmitted(now, a.job_id, a.spec.name or str(a.job_id), a.owner, a.spec))
        self.store.append(events)
        return True

    def run(self, progress: Callable[[int], None] | None = None) -> Result:
        """To the end of the last job. `progress` is called with the number of ended jobs now and then."""
        begin = time.process_time()
        collects = gc.isenabled()
        gc.disable()  # the log only grows and holds no cycles: collecting it again and again takes a fifth of the time
        try:
            while self.step():
                if progress is not None and self.ticks % 500 == 0:
                    with self.controller.view() as (cluster, _):  # quicker than to ask the store
                        progress(len(self.arrivals) - len(self._coming) - len(cluster.jobs))
        finally:
            if collects:
                gc.enable()
        self.cpu_s = time.process_time() - begin
        return self.result()

    def result(self) -> Result:
        """What the log says so far."""
        accounts = Accounts.of(self.workload.nodes, (s.event for s in self.store.read(0, 1 << 60)), START_MS)
        return Result(
            self.workload.name, self.name, self.seed, accounts.summary(), accounts, self.ticks, self.cpu_s,
            self.store,
        )

    def ended(self) -> int:
        """How many jobs are over."""
        return self.store.ended()


def _ranked(rank: Callable[[Simulation], Told]) -> PolicyMaker:
    """Shortest first in some sense, without preemption."""
    def make(sim: Simulation) -> Policy:
        told = rank(sim)
        return _policy(sim, ordering=fifo, rank=lambda job, estimates: told(job))

    return make


def _preempting(order: Callable[[Simulation], Order], remember: bool = False) -> PolicyMaker:
    def make(sim: Simulation) -> Policy:
        rules = sim.workload.rules
        return _policy(sim, replan=Replan(order(sim), rules.repack, rules.running_first, remember, rules.settle))

    return make


def _left(sim: Simulation) -> Told:
    return sim.player.left_ms


def _shortest(
    order: Callable[[Told], Order], told_by: Callable[[Simulation], Told] = _left, frugal: bool = True
) -> PolicyMaker:
    """Preempting, told what is left: like jobs go in that order, so that their line's first are enough to look at."""
    def make(sim: Simulation) -> Policy:
        rules, told = sim.workload.rules, told_by(sim)
        how = Replan(order(told), rules.repack, settle=rules.settle, heads=first, frugal=frugal)
        return _policy(sim, replan=how, rank=lambda job, estimates: told(job))

    return make


def _in_time(sim: Simulation) -> Policy:
    rules, told = sim.workload.rules, sim.player.left_ms
    how = Replan(in_time(told), rules.repack, settle=rules.settle, heads=in_time_heads)
    return _policy(sim, replan=how, rank=lambda job, estimates: told(job))


def _learned(sim: Simulation) -> Policy:
    rules = sim.workload.rules
    how = Replan(learned, rules.repack, settle=rules.settle, heads=learned_heads, frugal=True)
    return _policy(sim, replan=how, rank=left_told, alike=outlook)


def _by_kind(sim: Simulation, speed: Speed) -> Policy:
    """Told the work that is left of each job, and its speed on each kind of GPU."""
    told = sim.player.left_ms
    order = by_kind(lambda cluster, job, now_ms: (max(1.0, sim.player.work_left_ms(job)), 0), speed, MIN_RUN_MS)
    how = Replan(order, settle=sim.workload.rules.settle, heads=where_alike(first))
    return _policy(sim, replan=how, rank=lambda job, estimates: told(job))


def _kinds_learned(sim: Simulation) -> Policy:
    how = Replan(by_kind(learned_left, learned_speed, MIN_RUN_MS), heads=where_alike(learned_heads))
    return _policy(sim, replan=how, rank=left_told, alike=outlook)


def _policy(sim: Simulation, **fields: object) -> Policy:
    rules = sim.workload.rules
    given: dict[str, object] = {
        "strict": rules.strict, "pass_every_ms": rules.pass_every_ms, "score": rules.score, **fields
    }  # fmt: skip
    return Policy(**given)  # type: ignore[arg-type]


def _las(sim: Simulation) -> Order:
    return least_attained(sim.workload.rules.thresholds_gpu_s, sim.workload.rules.whole_seconds)


def _deadline(sim: Simulation) -> Told:
    return lambda job: sim.arrivals[job.id].deadline_ms or NEVER_MS


def _elastic(sim: Simulation) -> Policy:
    """First come, first served; sizes by marginal goodput as reported, nothing told."""
    return _policy(sim, ordering=fifo, elastic=Elasticity(sim.workload.rules.report_every_ms or Elasticity().every_ms))


def _server(sim: Simulation) -> Policy:
    """All that a server does unless it is told otherwise (`spec.server.PolicyConfig`)."""
    return _policy(
        sim, fair=FairShare(FAIR_HALF_LIFE_MS), backfill=Backfill(1), preemption=Preemption(), elastic=Elasticity(),
        defragmentation=Defragmentation(), health=Health(), score=Score.AUTO, node_pools=sim.workload.pools,
    )  # fmt: skip


POLICIES: dict[str, PolicyMaker] = {
    "priority": lambda sim: _policy(sim, ordering=priority),
    "fifo": lambda sim: _policy(sim, ordering=fifo),
    "sjf": _ranked(lambda sim: sim.told_ms),
    "qssf": _ranked(lambda sim: gpu_time(sim.told_ms)),
    "edf": _ranked(_deadline),
    "edf-preempting": _shortest(shortest, _deadline),
    "srtf": _shortest(shortest),
    "srsf": _shortest(lambda told: shortest(gpu_time(told))),
    "knapsack": _shortest(knapsack, frugal=False),
    "las": _preempting(_las, remember=True),
    "learned": _learned,
    "silent": _learned,
    "guessed": _learned,
    "in-time": _in_time,
    "themis": _preempting(lambda sim: patient(finish_time_fairness(sim.player.left_ms), LEASE_MS)),
    "kinds": lambda sim: _by_kind(sim, lambda cluster, job, kind: sim.speed_on(job, kind)),
    "blind": lambda sim: _by_kind(sim, lambda cluster, job, kind: 1.0),
    "kinds-learned": _kinds_learned,
    "service": lambda sim: _policy(sim, ordering=fifo, rank=expected_service),
    "easy": lambda sim: _policy(sim, ordering=fifo, backfill=Backfill(1), strict=False),
    "conservative": lambda sim: _policy(sim, ordering=fifo, backfill=Backfill(64), strict=False),
    "elastic": _elastic,
    "server": _server,
}
"""Policies by the name that `jobsched simulate --policy` takes. Told true run times: sjf, qssf, srtf, srsf, knapsack,
in-time, themis, kinds, blind. Told nothing: server is all that a server does by default; learned goes by the past and
by the progress that jobs report where the trace knows their steps; silent by the past alone; guessed besides by what
users expect; service, easy and conservative by the past, las by what a job had; edf (which lets running jobs run) and
edf-preempting only the deadlines."""
