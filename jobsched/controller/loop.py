"""The controller: the one loop that joins the pure functions to the three ports.

`tick()`: read news -> observe -> judge -> append -> schedule -> append -> converge -> act. Always forward: intent is
stored before any act, so a crash anywhere is healed by the next tick. `run()` repeats it on a thread while this process
leads; a follower only folds the news. The simulator calls `tick()` itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import structlog

from jobsched.controller.actuate import actuate
from jobsched.controller.leader import DEFAULT_TTL_MS, Leader
from jobsched.controller.longevity import prepare, settle
from jobsched.controller.telemetry import Sampler, learn_again, progress_of
from jobsched.core import events as ev
from jobsched.core.answers import JobProgress
from jobsched.core.cluster import Cluster
from jobsched.core.converge import Addresses, converge
from jobsched.core.job import Job, Phase, ReplicaState
from jobsched.core.judge import Senses, judge, judge_nodes, settled_by
from jobsched.core.launch import launch_key
from jobsched.core.observation import NO_NEWS, Observation, Sight
from jobsched.core.passes import Policy
from jobsched.core.policies import provisioning
from jobsched.core.policies.health import doubts, next_look_ms
from jobsched.core.pools import Demand
from jobsched.core.recall import Recalled, note, recall
from jobsched.core.resources import JobId, NodeName
from jobsched.core.schedule import schedule
from jobsched.core.timers import Timers, deadline
from jobsched.errors import StaleFence, Unreachable
from jobsched.ports import Backend, Clock, JobQuery, Loaded, Provisioner, Store
from jobsched.spec.queue import QueueSpec, retired

log = structlog.get_logger("jobsched.controller")

JUDGE_ROUNDS = 8
"""Judging an event may call for judging another job (dependencies); more rounds than this wait for the next tick."""
OBSERVE_WAIT_MS = 1_000
NEWS = 10_000
"""Events read from the log at a time."""
RETRY_MS = 1_000
LEARNED_FROM = (Phase.SUCCEEDED, Phase.FAILED)
LEARNED_JOBS = 1_000
"""A new leader learns run times from so many of the jobs that ended last."""
RECALL_EVENTS = 20_000
"""After so many events what is known is kept sooner, so that the next leader never has many more to fold."""
IDLE_MS = 10_000
"""Longest sleep: a tick without news is cheap."""

Listener = Callable[[Sequence[ev.Stored], frozenset[JobId]], None]
"""Called after a tick with the new events and the jobs whose progress changed. Must return at once."""


@dataclass(slots=True)
class Health:
    """What `doctor` and the metrics tell of the loop."""

    ticks: int = 0
    last_tick_ms: float = 0.0
    store_error: str = ""
    backend_error: str = ""
    rejected: int = 0


@dataclass(slots=True)
class _State:
    """What is folded from the log; dropped as a whole and read again when anything went wrong."""

    cluster: Cluster
    nodes_known: bool = False
    """Whether the log has been told of every node sighted since this state was loaded."""
    queues_checked: Mapping[str, QueueSpec] | None = None
    """The cluster's queues when those of the configuration were last found among them."""
    timers: Timers = field(default_factory=Timers)
    sampler: Sampler = field(default_factory=Sampler)


class Controller:
    def __init__(
        self,
        store: Store,
        backend: Backend,
        clock: Clock,
        policy: Policy | None = None,
        *,
        queues: Iterable[QueueSpec] = (QueueSpec(),),
        holder: str = "local",
        lease_ttl_ms: int = DEFAULT_TTL_MS,
        secret: bytes = b"",
        idle_ms: int = IDLE_MS,
        node_grace_ms: int | None = None,
        recall_every_ms: int = 0,
        sole_definer: bool = False,
    ) -> None:
        """`sole_definer`: nobody but `queues` defines any, so that those of earlier configurations are retired.
        `recall_every_ms`: how often what is known beyond the projections is kept for the next leader; 0: never.
        `secret`: what replicas' tokens are derived from; empty: they get none (in simulations)."""
        self._store = store
        self._backend = backend
        self._clock = clock
        self._policy = policy or Policy()
        self._queues, self._sole_definer = tuple(queues), sole_definer
        self._provisioner = backend if self._policy.node_pools and isinstance(backend, Provisioner) else None
        self._demanded: tuple[Demand, ...] | None = None
        self._secret = secret
        self._idle_ms = idle_ms
        self._leader = Leader(store, holder, lease_ttl_ms)
        self._lock = threading.RLock()
        self._weighed = threading.Condition(self._lock)
        self._weighed_seq = 0
        """Everything that the log held up to this event has been decided on; by a follower, folded."""
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._inbox: deque[Observation] = deque()
        self._sight = Sight()
        self._observer_runs = False
        self._listeners: list[Listener] = []
        self._state: _State | None = None
        self._fence: int | None = None
        self._looks = 0
        """Successful observations so far."""
        self._looks_wanted = 1
        """A leader decides nothing before its first look since it leads: what it saw in an earlier reign is stale."""
        self._stale = False
        self._recall_every_ms = recall_every_ms
        self._noted = (0, 0)
        """(when, at which event) that was last kept."""
        self.health = Health()
        caps = backend.capabilities
        self._senses = Senses(caps.absence_is_final, node_grace_ms or caps.lost_after_ms)
        self._addresses = Addresses(caps.name_template, caps.checkpoint_root)

    # ---- life ----

    def start(self) -> None:
        """Run on threads of its own until `stop`."""
        self._observer_runs = True
        for name, target in (("controller", self._run), ("observer", self._observe_for_ever)):
            thread = threading.Thread(target=target, name=f"jobsched-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop and hand the lease over. Running replicas go on."""
        self._stopping.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout_s)
        try:
            if self._state is not None and self._fence is not None and not self._stale:
                self._keep_recall(self._state.cluster, self._fence, self._clock.now_ms())
            self._leader.release()
        except (Unreachable, StaleFence) as error:
            log.warning("lease not released", error=error.message)

    def wake(self) -> None:
        """Look now: something was appended."""
        self._wake.set()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` after every tick that brought something; returns how to stop that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # ---- questions, under the lock ----

    @property
    def leading(self) -> bool:
        return self._fence is not None

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def ready(self) -> bool:
        """Whether the cluster knows the nodes that the backend showed."""
        return self._state is not None and self._state.nodes_known

    @contextmanager
    def view(self) -> Iterator[tuple[Cluster, Sight]]:
        """The folded state, to be read and let go quickly: the loop waits meanwhile."""
        with self._lock:
            state = self._state
            yield state.cluster if state is not None else Cluster(), self._sight

    def caught_up(self, seq: int, timeout_s: float) -> bool:
        """Wait until everything that the log holds up to this event has been decided on, or by a follower folded, at
        most so long; whether it has."""
        if not self._observer_runs:
            return False
        with self._weighed:
            if self._weighed_seq < seq:
                self._wake.set()
            return self._weighed.wait_for(lambda: self._weighed_seq >= seq, timeout_s)

    def progress(self, job_id: JobId) -> JobProgress | None:
        """Progress of an active job; None for others."""
        with self._lock:
            job = self._state.cluster.jobs.get(job_id) if self._state else None
            if job is None or self._state is None or not job.phase.active:
                return None
            return progress_of(job, self._sight, self._clock.now_ms())

    # ---- the loop ----

    def _run(self) -> None:
        prepare()
        while not self._stopping.is_set():
            try:
                wait_ms = self.tick()
                settle()
                self.health.store_error = ""
            except StaleFence:
                log.warning("another leader took over")
                self._step_down()
                wait_ms = RETRY_MS
            except Unreachable as error:
                # Whether the last append was written is unknown: until it is read again, memory serves readers only.
                self._stale = True
                self.health.store_error = error.message
                log.warning("store unreachable; nothing is decided meanwhile", error=error.message)
                wait_ms = RETRY_MS
            except Exception:
                log.exception("tick failed; state is read again from the store")
                self._step_down()
                wait_ms = RETRY_MS
            self._clock.wait_until(self._clock.now_ms() + wait_ms, self._wake)

    def _observe_for_ever(self) -> None:
        while not self._stopping.is_set():
            try:
                observation = self._backend.observe(OBSERVE_WAIT_MS)
                self.health.backend_error = ""
            except Unreachable as error:
                self.health.backend_error = error.message
                log.warning("backend unreachable; its replicas are left as they are", error=error.message)
                self._stopping.wait(RETRY_MS / 1000)
                continue
            except Exception:
                log.exception("observation failed")
                self._stopping.wait(RETRY_MS / 1000)
                continue
            if observation != NO_NEWS:
                self._inbox.append(observation)
            self._looks += 1
            if observation != NO_NEWS or self._looks == self._looks_wanted:
                self._wake.set()

    def _step_down(self) -> None:
        self._stale, self._fence = True, None
        self._leader.drop()

    def tick(self) -> int:
        """One round; returns for how many milliseconds nothing needs to be done unless something happens.

        Only this thread changes the state, and only under the lock; what merely reads it, like judge and converge,
        needs none. Store and backend are called without it: readers wait for computing, never for a disk or an engine.
        """
        now = self._clock.now_ms()
        if self._wake.is_set():
            self._wake.clear()
        fence = self._leader.hold(now)
        reigns_anew = fence != self._fence and fence is not None
        if reigns_anew:
            self._looks_wanted = self._looks + 1
        if reigns_anew or self._stale or self._state is None:
            fresh = self._load()
            with self._lock:
                self._state, self._stale = fresh, False
        self._fence = fence
        state = self._state
        news = self._read_news(state)
        progressed: frozenset[JobId] = frozenset()
        if fence is not None:
            progressed = self._decide(state, fence, now, news)
        elif self._observer_runs:
            with self._lock:
                for observation in self._observations():
                    self._sight.fold(observation, now)
        if self._observer_runs and (fence is None or self._looks >= self._looks_wanted):
            with self._weighed:
                self._weighed_seq = state.cluster.seq
                self._weighed.notify_all()
        done = self._clock.now_ms()
        self.health.ticks += 1
        self.health.last_tick_ms = done - now
        if self._listeners and (news or progressed):
            for listener in tuple(self._listeners):
                listener(news, progressed)
        return 0 if self._wake.is_set() else max(0, self._next_ms(state, now) - done)

    def _load(self) -> _State:
        loaded = self._store.load()
        recalled = self._recall(loaded)
        if recalled is not None:
            past: Iterable[Job] = ()
        else:
            past = reversed(self._store.jobs(JobQuery(phases=LEARNED_FROM, limit=LEARNED_JOBS)))
        cluster = Cluster.of(
            loaded.jobs, loaded.nodes, loaded.queues, loaded.lost_nodes, loaded.cordoned, loaded.ended, loaded.seq,
            self._policy.rank, past, recalled.estimates if recalled is not None else None, self._policy.alike,
        )  # fmt: skip
        if recalled is not None:
            recalled.give(cluster)
        self._noted = (self._clock.now_ms(), loaded.seq)
        cluster.touched.update(dict.fromkeys(cluster.jobs))
        if self._provisioner is not None:
            cluster.node_pools = self._policy.node_pools
            self._demanded = None
        self._note_absent(cluster, self._clock.now_ms())
        for job_id in cluster.elastic:
            learn_again(cluster, job_id, self._store.samples(job_id))
        return _State(cluster)

    def _recall(self, loaded: Loaded) -> Recalled | None:
        """What an earlier leader knew, brought up to date."""
        noted = self._store.recall() if self._recall_every_ms else None
        if noted is None or noted.seq > loaded.seq:
            return None
        live = {job.id: job for job in loaded.jobs}
        since = (stored for page in self._pages(noted.seq) for stored in page if stored.seq <= loaded.seq)
        return recall(noted, since, loaded.nodes, lambda job_id: live.get(job_id) or self._store.job(job_id))

    def _pages(self, after: int) -> Iterator[Sequence[ev.Stored]]:
        while page := self._store.read(after, NEWS):
            yield page
            after = page[-1].seq

    def _keep_recall(self, cluster: Cluster, fence: int, now: int) -> None:
        """Nothing is lost when it fails: the one before and the log say the same."""
        if self._recall_every_ms:
            self._noted = (now, cluster.seq)
            self._store.keep_recall(note(cluster, now), fence)

    def _decide(self, state: _State, fence: int, now: int, news: list[ev.Stored]) -> frozenset[JobId]:
        cluster, sight = state.cluster, self._sight
        if cluster.queues is not state.queues_checked:
            self._define_queues(state, fence, now, news)
        observations = self._observations()
        blind = self.health.backend_error != ""
        if self._senses.blind is not blind:
            self._senses = replace(self._senses, blind=not self._senses.blind)
        with self._lock:
            seen_jobs, seen_nodes = self._fold(state, observations, now)
        if self._looks < self._looks_wanted:
            cluster.touched.update(dict.fromkeys(sorted(seen_jobs)))
            return frozenset(seen_jobs)
        if seen_nodes:
            self._append(state, judge_nodes(cluster, sight, seen_nodes, now, self._senses), fence, news)
        state.nodes_known = True
        look = self._to_look_at(state, seen_jobs, now)
        everyone = dict(look)
        for _ in range(JUDGE_ROUNDS):
            cluster.touched.clear()
            found = judge(cluster, sight, look, now, self._senses)
            if sight.beat_at_ms:  # mostly nobody says anything
                self._sample(state, look, now)
            if not found:
                break
            alone = self._append(state, found, fence, news)
            everyone |= cluster.touched
            look = {job_id: None for job_id in cluster.touched if job_id in cluster.jobs}
            if look and alone:
                for job_id in settled_by(found):
                    look.pop(job_id, None)
            if not look:
                break
        health = self._policy.health
        if health is not None:
            with self._lock:
                doubted = doubts(cluster, now, health)
            self._append(state, doubted, fence, news)
        with self._lock:
            plan = schedule(cluster, now, self._policy)
        if plan.decisions:
            self._append(state, plan.decisions, fence, news)
        if self._provisioner is not None:
            with self._lock:
                asked = provisioning.provision(cluster, now)
            self._append(state, asked, fence, news)
        everyone |= cluster.touched
        cluster.touched.clear()
        actions = converge(cluster, sight, everyone, now, self._addresses)
        try:
            if actions:
                actuate(self._backend, actions, sight, now, self._secret, self._assert_leading)
            if self._provisioner is not None:
                self._demand(cluster, self._provisioner)
        except Unreachable as error:
            self.health.backend_error = error.message
            log.warning("backend unreachable; its replicas are left as they are", error=error.message)
            cluster.touched.update(everyone)
        if everyone:
            with self._lock:
                self._arm(state, everyone, now)
        if plan.more:
            self._wake.set()
        if self._recall_every_ms and (
            now - self._noted[0] >= self._recall_every_ms or cluster.seq - self._noted[1] >= RECALL_EVENTS
        ):
            self._keep_recall(cluster, fence, now)
        return frozenset(seen_jobs)

    def _sample(self, state: _State, look: Iterable[JobId], now: int) -> None:
        """Learn from what these jobs have reported, and keep it."""
        samples = state.sampler.samples(state.cluster, self._sight, look, now)
        if samples:
            with self._lock:
                for sample in samples:
                    state.cluster.reported(sample.job_id, sample.step, sample.total, now)
            self._store.add_samples(samples)

    def _assert_leading(self) -> None:
        if not self._leader.holds(self._clock.now_ms()):
            raise StaleFence("the lease ran out between deciding and acting", hint="another server may lead by now")

    def _demand(self, cluster: Cluster, provisioner: Provisioner) -> None:
        """Tell the backend which nodes should exist, whenever that changes."""
        with self._lock:
            demands = provisioning.demands(cluster)
        if demands != self._demanded:
            self._assert_leading()
            provisioner.provision(demands)
            self._demanded = demands

    def _fold(
        self, state: _State, observations: Iterable[Observation], now: int
    ) -> tuple[set[JobId], set[NodeName]]:
        """Jobs and nodes that the observations bring news of; absent nodes are looked at until they are lost."""
        cluster, sight = state.cluster, self._sight
        seen_jobs: set[JobId] = set()
        seen_nodes = set(sight.node_absent_at_ms)
        if not state.nodes_known:
            seen_nodes |= sight.nodes.keys()
        for observation in observations:
            jobs, nodes = sight.fold(observation, now)
            seen_jobs |= jobs
            seen_nodes |= nodes
            if observation.full:
                self._note_absent(cluster, now)
                seen_jobs.update(job_id for job_id, job in cluster.jobs.items() if job.phase.active)
                seen_nodes.update(cluster.fleet.nodes)
        return seen_jobs, seen_nodes

    @staticmethod
    def _to_look_at(state: _State, seen_jobs: Iterable[JobId], now: int) -> dict[JobId, None]:
        """Jobs that an event, an observation, a timer, a lost or a draining node names, in a definite order."""
        cluster = state.cluster
        look = dict.fromkeys([*cluster.touched, *sorted(seen_jobs), *state.timers.due(now)])
        if cluster.fleet.lost or cluster.fleet.cordoned:
            draining = (name for name, cordon in cluster.fleet.cordoned.items() if cordon.drain)
            for name in sorted({*cluster.fleet.lost, *draining}):
                look |= dict.fromkeys(cluster.fleet.jobs_on(name))
        return look

    def _arm(self, state: _State, job_ids: Iterable[JobId], now: int) -> None:
        """Set the jobs' next deadlines; forget what was sighted of those that are gone."""
        sight = self._sight
        for job_id in job_ids:
            job = state.cluster.jobs.get(job_id)
            state.timers.arm(job_id, None if job is None else deadline(job, sight, now, self._senses))
            if job is None or not job.phase.active:
                state.sampler.forget(job_id)
                if job_id in sight.by_job:
                    sight.forget_ended(job_id)

    def _note_absent(self, cluster: Cluster, now: int) -> None:
        """What the log expects and a full observation did not show is absent from now on."""
        sight = self._sight
        if not sight.observed_at_ms:
            return
        for name in cluster.fleet.nodes:
            if name not in sight.nodes and name not in cluster.fleet.lost:
                sight.node_absent_at_ms.setdefault(name, now)
        for job in cluster.jobs.values():
            for r in job.replicas.values():
                key = launch_key(job.id, job.attempt, r.role, r.index, r.restart)
                if r.state is ReplicaState.RUNNING and key not in sight.replicas:
                    sight.absent_at_ms.setdefault(key, now)

    def _define_queues(self, state: _State, fence: int, now: int, news: list[ev.Stored]) -> None:
        known = state.cluster.queues
        changed = [q for q in self._queues if known.get(q.name) is not q and known.get(q.name) != q]
        if self._sole_definer:
            changed += self._retired(state.cluster)
        if changed:
            self._append(state, [ev.QueueDefined(now, queue) for queue in changed], fence, news)
        state.queues_checked = state.cluster.queues

    def _retired(self, cluster: Cluster) -> list[QueueSpec]:
        """Queues that an earlier configuration defined and this one does not; cohorts lose what was said of them."""
        named, cohorts = {queue.name for queue in self._queues}, {queue.cohort for queue in self._queues}
        if named.issuperset(cluster.queues):
            return []
        used, found = {job.spec.queue for job in cluster.jobs.values()}, []
        for queue in cluster.queues.values():
            wanted = retired(queue, empty=queue.name not in used)
            if queue.name in cohorts:
                wanted = QueueSpec(name=queue.name)
            if queue.name not in named and wanted != queue:
                log.warning("a queue that is no longer configured takes no more jobs", queue=queue.name)
                found.append(wanted)
        return found

    def _observations(self) -> list[Observation]:
        if not self._observer_runs:
            try:
                observation = self._backend.observe()
            except Unreachable as error:
                self.health.backend_error = error.message
                return []
            self.health.backend_error = ""
            self._looks += 1
            return [observation]
        found = []
        while self._inbox:
            found.append(self._inbox.popleft())
        return found

    # ---- the log ----

    def _read_news(self, state: _State) -> list[ev.Stored]:
        news: list[ev.Stored] = []
        while batch := self._store.read(state.cluster.seq, NEWS):
            with self._lock:
                for stored in batch:
                    state.cluster.evolve(stored.event, stored.seq)
            news += batch
            if len(batch) < NEWS:
                break  # that was the end of the log a moment ago
        return news

    def _append(self, state: _State, events: Sequence[ev.Event], fence: int, news: list[ev.Stored]) -> bool:
        """Write decisions, then fold what the log now holds: usually these alone, which it tells, else wishes in
        between too."""
        if not events:
            return True
        jobs = state.cluster.jobs
        expected = {job_id: jobs[job_id].version for event in events if (job_id := event.job_id) in jobs}
        result = self._store.append(events, expected, fence)
        for rejected in result.rejected:
            self.health.rejected += 1
            log.info("job changed meanwhile; decided again next tick", job=rejected.job_id)
            state.cluster.ledger.unblock()
            self._wake.set()
        stored, cluster = result.stored, state.cluster
        if stored and stored[-1].seq == cluster.seq + len(stored):
            with self._lock:
                for entry in stored:
                    cluster.evolve(entry.event, entry.seq)
            news += stored
            return True
        news += self._read_news(state)
        return False

    # ---- time ----

    def _next_ms(self, state: _State, now: int) -> int:
        """When to tick again at the latest."""
        instants = [now + self._idle_ms, self._leader.next_ms(now)]
        deciding = self._fence is not None and self._looks >= self._looks_wanted
        if not deciding:  # a follower, or a leader that has not looked yet: no deadline is its own
            retry = [] if self._fence is None else [now + RETRY_MS]
            return min([*instants, *retry])
        cluster = state.cluster
        wake = state.timers.next_wake()
        if wake is not None:
            instants.append(wake)
        if cluster.next_pass_ms > now:
            instants.append(cluster.next_pass_ms)
        if cluster.parked:
            instants.append(cluster.parked[0][0])
        if self._policy.health is not None and (look := next_look_ms(cluster, self._policy.health)) > now:
            instants.append(look)
        if self._provisioner is not None and (look := provisioning.next_look_ms(cluster)) > now:
            instants.append(look)
        absent = self._sight.node_absent_at_ms
        if absent and not self._senses.absence_is_final:
            instants.append(min(absent.values()) + self._senses.lost_after_ms)
        return min(instants)
