"""Faults, seeded: what breaks in a simulated cluster, when, and the checks after every tick.

`Chaos` wraps a `Simulation`: the same seed breaks the same things at the same instants. Servers die or pause at any
call of a port; what they left half done must be healed by whoever comes next. Called by `jobsched simulate --faults`
and `tests/simulation`. Never decides anything for the scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

from jobsched.controller.loop import Controller
from jobsched.core import events as ev
from jobsched.core import invariants
from jobsched.core.job import Job, Phase
from jobsched.core.launch import LaunchKey
from jobsched.core.lifecycle import evolve_job
from jobsched.core.node import Node
from jobsched.core.observation import Observation
from jobsched.core.pools import Demand
from jobsched.core.resources import WHOLE_GPU, GpuId, JobId, NodeName
from jobsched.errors import StaleFence, StoreUnavailable, Unreachable
from jobsched.sim.backend import SimBackend
from jobsched.sim.run import NEVER_MS, START_MS, Simulation
from jobsched.sim.tally import Tally
from jobsched.spec.quantity import parse_duration_ms

KINDS = ("replica", "gpu", "node", "rack", "outage", "slow", "clock", "store", "crash", "leaders", "pool", "wish")
DEFAULT_MEAN_MS = {
    "replica": 3_600_000, "gpu": 7_200_000, "node": 5_400_000, "rack": 43_200_000, "outage": 14_400_000,
    "slow": 7_200_000, "clock": 43_200_000, "store": 14_400_000, "crash": 7_200_000, "leaders": 7_200_000,
    "pool": 14_400_000, "wish": 3_600_000,
}  # fmt: skip
LEAST_MEAN_MS = 60_000
REPAIR_MS = 900_000
OUTAGE_MS = 120_000
LEASE_MS = 60_000
RESTLESS_TICKS = 20
LEMON = 0.25
"""Part of the failures of nodes and GPUs that one node has on top of its share."""
WISHES = ("cancel", "hold", "suspend", "restart", "priority", "scale", "scale", "cordon", "drain")
THOROUGH_EVERY = 50
"""Ticks between two checks of everything; in between, what changed is checked."""
WATCHED_STORE = ("append", "read", "load", "lease", "add_samples", "keep_recall", "recall")
RECALL_EVERY_MS = 1_800_000
"""How often servers note for the next one what they know; they may die doing that, too."""
ACTS = ("start", "stop", "forget", "ask_stacks", "provision")
WATCHED_BACKEND = ("observe", *ACTS)


class Broken(AssertionError):
    """Something that must always hold does not; the message says what and how to see it again."""


class ServerDied(Exception):
    """The process is gone: nothing in its memory survives."""


def parse_faults(text: str) -> dict[str, int]:
    """`all`, or `node=6h,crash=30m`: kind -> mean time between such faults in the whole cluster, in milliseconds.
    ValueError names what is wrong."""
    if text == "all":
        return dict(DEFAULT_MEAN_MS)
    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        kind, _, mean = part.partition("=")
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not a kind of fault; there are {', '.join(KINDS)}, or 'all'")
        found[kind] = parse_duration_ms(mean) if mean else DEFAULT_MEAN_MS[kind]
        if found[kind] < LEAST_MEAN_MS:
            raise ValueError(f"{part!r}: the time between two such faults is at least a minute on average")
    return found


class _Server:
    """One server process: its controller, and the traps around its ports."""

    def __init__(self, chaos: Chaos, name: str) -> None:
        self.chaos, self.name = chaos, name
        self.controller = self.boot()

    def boot(self) -> Controller:
        sim = self.chaos.sim
        store: Any = _Trap(sim.store, WATCHED_STORE, self)
        self.adapter = _Adapter(sim.engine, self.chaos.servers)
        backend: Any = _Trap(self.adapter, WATCHED_BACKEND, self)
        self.controller = Controller(
            store, backend, sim.clock, sim.policy, queues=sim.workload.queues, holder=self.name,
            lease_ttl_ms=LEASE_MS, idle_ms=NEVER_MS, recall_every_ms=RECALL_EVERY_MS,
        )  # fmt: skip
        return self.controller

    def tick(self) -> int:
        """As `Controller._run` does: whatever goes wrong is read again from the store."""
        try:
            return self.controller.tick()
        except ServerDied:
            self.boot()
        except StaleFence:
            self.controller._step_down()
        except Unreachable:
            self.controller._stale = True
        return 1_000


class _Adapter:
    """A server's own connection to the engine: everything there is at first, then what changed since its last look,
    whoever else has looked meanwhile."""

    def __init__(self, engine: SimBackend, others: Iterable[_Server]) -> None:
        self._engine, self._others = engine, others
        self.news: list[Observation] = []
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def observe(self, timeout_ms: int = 0) -> Observation:
        latest = self._engine.observe(timeout_ms)
        for server in self._others:
            server.adapter.news.append(latest)
        if not self._begun:
            self._begun = True
            self._engine.close()
            self.news = [self._engine.observe(timeout_ms)]
        told, self.news = _merged(self.news), []
        return told


def _merged(news: Sequence[Observation]) -> Observation:
    """Several observations in a row as one."""
    if len(news) == 1:
        return news[0]
    nodes: dict[NodeName, Node | None] = {}
    for one in news:
        nodes |= {node.name: node for node in one.nodes} | dict.fromkeys(one.gone_nodes)
    return Observation(
        full=False,
        nodes=tuple(node for node in nodes.values() if node is not None),
        replicas=tuple({r.key: r for one in news for r in one.replicas}.values()),
        gone=tuple(key for one in news for key in one.gone),
        gone_nodes=tuple(name for name, node in nodes.items() if node is None),
    )


class _Trap:
    """Forwards to a port; the chaos may strike at any call, before or after it takes effect."""

    def __init__(self, target: Any, watched: tuple[str, ...], server: _Server) -> None:
        self._target, self._watched, self._server = target, watched, server

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if name not in self._watched:
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            chaos = self._server.chaos
            chaos.strike(self._server, name, before=True)
            result = attribute(*args, **kwargs)
            chaos.strike(self._server, name, before=False)
            return result

        return call

    def provision(self, demands: Sequence[Demand]) -> None:
        """Whether a port has this is asked of its class."""
        self.__getattr__("provision")(demands)


@dataclass(slots=True)
class _Pending:
    """A fault of the servers that waits for its call."""

    kind: str
    calls: int
    before: bool


class Chaos:
    """A simulation in which things break."""

    def __init__(self, sim: Simulation, faults: dict[str, int], until_ms: int, replay: str = "") -> None:
        self.sim, self.faults, self.replay = sim, faults, replay
        self.random = Random(f"faults {sim.seed}")
        self.counts: dict[str, int] = dict.fromkeys(faults, 0)
        self.tally = Tally()
        self._until_ms = START_MS + until_ms
        self._agenda: list[tuple[int, str]] = sorted(
            (self._next(kind, START_MS), kind) for kind in faults
        )
        self._repairs: list[tuple[int, Callable[[], None]]] = []
        self._pending: list[_Pending] = []
        self._sound = sim.engine.nodes()
        """Nodes as they are after a repair."""
        self._store_down_until = 0
        self._paused = False
        self._checked = self._checked_before = 0
        """Events of the log that are checked, and how many were at the tick before."""
        self._restless = 0
        self._launched = 0
        """How many replicas the engine had started at the last check of its GPUs."""
        self._jobs: dict[JobId, Job] = {}
        self._ended = 0
        """How many of the workload's jobs are over; not of the checks of nodes."""
        self.servers: list[_Server] = []
        for name in ("first", "second") if "leaders" in faults else ("first",):
            self.servers.append(_Server(self, name))

    def _next(self, kind: str, now: int) -> int:
        return now + max(1, round(self.random.expovariate(1 / self.faults[kind])))

    # ---- running ----

    def run(self, limit_ticks: int = 200_000) -> None:
        """Until every job has ended, checking after every tick. Raises Broken, also after so many ticks in which no job
        ended."""
        begin = time.process_time()
        try:
            self._run(limit_ticks)
        finally:
            self.sim.cpu_s = time.process_time() - begin

    def _run(self, limit_ticks: int) -> None:
        sim, ended, at_tick = self.sim, 0, 0
        while self._ended < len(sim.arrivals):
            if self._ended > ended:
                ended, at_tick = self._ended, sim.ticks
            now = sim.clock.now_ms()
            self._break_and_repair(now)
            sim.happen(now)
            pauses = [server.tick() for server in self.servers]
            sim.ticks += 1
            self._check()
            self._check_rest(min(pauses))
            self._advance(now, min(pauses))
            if sim.ticks - at_tick > limit_ticks:
                self._broken(f"no job ended within {limit_ticks} ticks: {dict(sim.store.count('phase'))}")

    def _advance(self, now: int, pause: int) -> None:
        sim = self.sim
        instants = [now + max(1, pause)]
        wake = sim.engine.next_event_ms()
        if wake is not None and not sim.engine.unreachable and now >= self._store_down_until:
            instants.append(max(wake, now + 1))
        instants += [at for at, _ in self._repairs]
        if every := sim.workload.rules.report_every_ms:
            instants.append(now - now % every + every)
        if now < self._until_ms and self._agenda:
            instants.append(self._agenda[0][0])
        coming = sim.next_arrival_ms()
        if coming is not None:
            instants.append(coming)
        sim.clock.advance_to(max(now + 1, min(instants)))

    # ---- what breaks ----

    def _break_and_repair(self, now: int) -> None:
        for due in [entry for entry in self._repairs if entry[0] <= now]:
            self._repairs.remove(due)
            due[1]()
        while self._agenda and self._agenda[0][0] <= now < self._until_ms:
            _, kind = self._agenda.pop(0)
            self._agenda = sorted([*self._agenda, (self._next(kind, now), kind)])
            self._strike_now(kind, now)

    def _strike_now(self, kind: str, now: int) -> None:
        engine, random = self.sim.engine, self.random
        self.counts[kind] += 1
        alive, nodes = sorted(engine.alive()), sorted(engine.nodes())
        match kind:
            case "replica" if alive:
                engine.kill(random.choice(alive))
            case "gpu" if nodes:
                self._break_gpu(engine.nodes()[self._weak(nodes)], now)
            case "node" if len(nodes) > 1:
                self._lose([self._weak(nodes)], now)
            case "rack" if len(nodes) > 1:
                rack = engine.nodes()[random.choice(nodes)].label("rack")
                self._lose([n for n in nodes if engine.nodes()[n].label("rack") == rack][: len(nodes) - 1], now)
            case "outage":
                engine.unreachable = True
                self._repairs.append((now + OUTAGE_MS, lambda: setattr(engine, "unreachable", False)))
            case "slow" if nodes:
                name = random.choice(nodes)
                for key in alive:
                    if engine.alive()[key].node == name:
                        engine.stall(key, random.randrange(1_000, 600_000))
            case "pool":
                engine.withholds = True
                self._repairs.append((now + REPAIR_MS, lambda: setattr(engine, "withholds", False)))
            case "wish" if self._jobs:
                self._wish(now)
            case "clock":
                self.sim.clock.advance_to(now + random.randrange(1_000, 600_000))
            case "store":
                self._store_down_until = now + random.randrange(1_000, OUTAGE_MS)
            case "crash" | "leaders":
                self._pending.append(_Pending(kind, random.randrange(1, 12), random.random() < 0.5))
            case _:
                self.counts[kind] -= 1

    def _wish(self, now: int) -> None:
        """Users change their minds, and somebody drains a node: what is held or closed is opened again."""
        random = self.random
        live = [job for job_id, job in self._jobs.items() if not job.phase.terminal and job_id in self.sim.arrivals]
        what = random.choice(WISHES)
        if what in ("cordon", "drain"):
            node = random.choice(list(self._sound))
            self._tell(ev.NodeCordoned(now, node, "ops", drain=what == "drain"))
            self._repairs.append((now + REPAIR_MS, lambda: self._tell(ev.NodeUncordoned(self._now(), node, "ops"))))
            return
        if not live:
            return
        job = random.choice(live)
        ranges = {name: role.replicas for name, role in job.spec.roles.items() if role.replicas.elastic}
        wanted = {name: random.randint(each.min, each.max) for name, each in ranges.items()}
        match what:
            case "cancel":
                self._tell(ev.JobCancelRequested(now, job.id, "user"))
            case "hold" | "suspend":
                self._tell(ev.JobHeld(now, job.id, "user", stop=what == "suspend"))
                self._repairs.append((now + REPAIR_MS, lambda: self._tell(ev.JobReleased(self._now(), job.id, "user"))))
            case "restart":
                self._tell(ev.JobRestartRequested(now, job.id, "user"))
            case "priority":
                self._tell(ev.JobPriorityChanged(now, job.id, "user", random.choice((-10, 0, 100))))
            case "scale" if wanted:
                self._tell(ev.JobScaled(now, job.id, "user", wanted))

    def _tell(self, wish: ev.Wish) -> None:
        """As the service does: nothing is asked of a job that is over."""
        job_id = wish.job_id
        if job_id is None or not self._jobs[job_id].phase.terminal:
            self.sim.store.append([wish])

    def _now(self) -> int:
        return self.sim.clock.now_ms()

    def _weak(self, nodes: Sequence[NodeName]) -> NodeName:
        """Failures are not spread evenly: one node has more of them than any other."""
        lemon = next(iter(self._sound))
        return lemon if self.random.random() < LEMON and lemon in nodes else self.random.choice(nodes)

    def _lose(self, names: list[NodeName], now: int) -> None:
        for name in names:
            self.sim.engine.lose_node(name)
            node = self._sound.get(name)
            if node is None:
                continue  # it was had on demand, and whoever wants it asks for another
            back = now + self.random.randrange(1, 2 * REPAIR_MS)
            self._repairs.append((back, partial(self.sim.engine.put_node, node)))

    def _break_gpu(self, node: Node, now: int) -> None:
        healthy = [gpu for gpu in node.gpus if gpu.healthy]
        if not healthy:
            return
        broken = self.random.choice(healthy)
        engine = self.sim.engine
        gpus = tuple(replace(gpu, healthy=gpu.healthy and gpu.id != broken.id) for gpu in node.gpus)
        engine.put_node(replace(node, gpus=gpus))
        for key, launch in list(engine.alive().items()):
            if any(share.gpu == broken.id for share in launch.gpus) and launch.node == node.name:
                engine.kill(key, 6)
        self._repairs.append((now + REPAIR_MS, lambda: self._repair_gpu(node.name, broken.id)))

    def _repair_gpu(self, name: NodeName, gpu_id: GpuId) -> None:
        node = self.sim.engine.nodes().get(name)
        if node is not None:
            gpus = tuple(replace(gpu, healthy=gpu.healthy or gpu.id == gpu_id) for gpu in node.gpus)
            self.sim.engine.put_node(replace(node, gpus=gpus))

    def strike(self, server: _Server, call: str, *, before: bool) -> None:
        """Called around every port call of a server: it may die here, or pause so long that another one leads."""
        if before and self.sim.clock.now_ms() < self._store_down_until and call in WATCHED_STORE:
            raise StoreUnavailable("the simulated store does not answer")
        if not self._pending or self._paused or not server.controller.leading:
            return
        pending = self._pending[0]
        if pending.kind == "leaders" and before and call in ACTS:
            return  # the controller looks at its lease just before it acts; only an engine that fences could do more
        pending.calls -= 1
        if pending.calls > 0 or pending.before is not before:
            return
        self._pending.pop(0)
        if pending.kind == "crash" or len(self.servers) < 2:
            raise ServerDied(call)
        self._paused = True
        try:
            other = next(s for s in self.servers if s is not server)
            for _ in range(self.random.randrange(2, 6)):
                self.sim.clock.advance_to(self.sim.clock.now_ms() + LEASE_MS)
                other.tick()
                self._check(paused=server)
        finally:
            self._paused = False

    # ---- what must hold ----

    def _check(self, paused: _Server | None = None) -> None:
        """`paused`: in the middle of a tick, it holds what it has decided and not told yet."""
        fresh = self._read_log()
        thorough = self.sim.ticks % THOROUGH_EVERY == 0
        for server in self.servers:
            with server.controller.view() as (cluster, _):
                if server.controller.leading and server is not paused:
                    part = self._touched(fresh)
                    for problem in invariants.check(cluster) if thorough else invariants.check_part(cluster, *part):
                        self._broken(problem)
        if self.sim.engine.launched == self._launched:
            return  # nothing can have come to run beside anything
        self._launched = self.sim.engine.launched
        held: dict[tuple[NodeName, GpuId], tuple[int, LaunchKey]] = {}
        for key, launch in self.sim.engine.alive().items():
            for share in launch.gpus:
                milli, other = held.get((launch.node, share.gpu), (0, key))
                if milli + share.milli > WHOLE_GPU:
                    self._broken(f"GPU {share.gpu} of {launch.node} runs {other} and {key} at once")
                held[launch.node, share.gpu] = (milli + share.milli, key)

    def _check_rest(self, pause: int) -> None:
        """A server that wants to go on at once has decided something, or soon has nothing more to do."""
        self._restless = 0 if pause or self._checked > self._checked_before else self._restless + 1
        self._checked_before = self._checked
        if self._restless > RESTLESS_TICKS:
            self._broken(f"{self._restless} ticks in a row wanted another one at once and decided nothing")

    def _read_log(self) -> list[ev.Event]:
        """What is new in the log, folded."""
        fresh = self.sim.store.read(self._checked, 1 << 30)
        for stored in fresh:
            self._checked += 1
            if stored.seq != self._checked:
                self._broken(f"the log has a gap at {self._checked}")
            job_id = stored.event.job_id
            if job_id is not None:
                job = self._jobs[job_id] = evolve_job(self._jobs.get(job_id), ev.of_job(stored.event))
                self._ended += job.phase.terminal and job_id in self.sim.arrivals
            self.tally.add(stored.event, self._jobs)
        return [stored.event for stored in fresh]

    def _touched(self, events: Iterable[ev.Event]) -> tuple[list[JobId], list[NodeName]]:
        """Jobs and nodes of which the invariants may have changed."""
        jobs = dict.fromkeys(job_id for event in events if (job_id := event.job_id) is not None)
        nodes = {event.node.name for event in events if isinstance(event, ev.NodeSeen)}
        for event in events:
            if isinstance(event, ev.AttemptPlaced | ev.ReplicasBound):
                nodes |= {binding.node for binding in event.bindings}
        return list(jobs), sorted(nodes)

    def verify(self) -> None:
        """At the end: the log gives the projections, no job is lost, nothing is left running."""
        for job_id in self.sim.arrivals:
            job = self.sim.store.job(job_id)
            if job is None or job != self._jobs.get(job_id):
                self._broken(f"job {job_id} differs from what the log says")
            elif not job.phase.terminal:
                self._broken(f"job {job_id} is {job.phase}")
            elif job.phase is Phase.FAILED and job.cause is None:
                self._broken(f"job {job_id} failed without a cause")
        for _ in range(200):
            if not self.sim.engine.alive():
                return
            pause = min(server.tick() for server in self.servers)
            self._break_and_repair(self.sim.clock.now_ms())
            self.sim.clock.advance_to(self.sim.clock.now_ms() + max(1, min(pause, 1_000)))
        self._broken(f"orphans: {sorted(self.sim.engine.alive())}")

    def _broken(self, problem: str) -> None:
        again = f"\nsee it again with: {self.replay}" if self.replay else ""
        raise Broken(f"seed {self.sim.seed}, tick {self.sim.ticks}: {problem}{again}")
