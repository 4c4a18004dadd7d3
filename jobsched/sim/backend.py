"""A simulated engine: replicas are entries that start, step, save and end as a script says, in virtual time.

Implements `ports.Backend` like any engine and passes the same contract suite. What a replica does is told by a `Script`
per launch; faults are injected by methods that real engines suffer from outside (`kill`, `lose_node`, `hang`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

from jobsched.core.job import Reason
from jobsched.core.launch import Launch, LaunchKey
from jobsched.core.node import Node
from jobsched.core.observation import NO_NEWS, Observation, Progress, ReplicaReport, Seen
from jobsched.core.pools import Demand, NodePool
from jobsched.core.resources import NodeName
from jobsched.core.values import dataclass
from jobsched.errors import BackendUnreachable
from jobsched.ports import Addressing, Capabilities, Clock, LogChunk

FOREVER_MS = 1 << 60
REPORT_EVERY_MS = 1_000
KILL_MS = 5
"""Even SIGKILL takes a moment: whoever starts something else meanwhile has bound a GPU twice."""


@dataclass(frozen=True, slots=True)
class Script:
    """What a replica does: runs `start_ms` after its order, makes a step every `step_ms` (0: reports nothing), ends by
    itself after `run_ms` of running with `exit_code`. Asked to stop, it needs `save_ms` to save (0: it does not)."""

    run_ms: int = FOREVER_MS
    exit_code: int = 0
    start_ms: int = 0
    step_ms: int = 0
    save_ms: int = 0
    kill_ms: int = KILL_MS
    failure: Reason = Reason.NONE
    """Set: it never runs and ends with this failure instead."""
    progress: Callable[[], Progress | None] | None = None
    """What it reports, looked at when it starts to run and `reports_ms` later."""
    reports_ms: tuple[int, ...] = ()


Scripts = Callable[[Launch], Script]


@dataclass(slots=True)
class _Replica:
    launch: Launch
    script: Script
    running_at_ms: int
    ends_at_ms: int
    exit_code: int | None
    signal: int | None = None
    hung_at_ms: int = FOREVER_MS
    saved_step: int = -1
    stacks: str = ""
    told: Progress | None = None
    """What it reports beside its script."""


class SimBackend:
    def __init__(
        self, clock: Clock, nodes: Sequence[Node], scripts: Scripts | None = None,
        takes_ms: Callable[[NodePool], int] = lambda pool: pool.delay_ms,
    ) -> None:  # fmt: skip
        """`takes_ms`: how long a node of the pool takes to come; `FOREVER_MS`: none ever does."""
        self._clock = clock
        self._nodes = {node.name: node for node in nodes}
        self._scripts = scripts or (lambda launch: Script())
        self._replicas: dict[LaunchKey, _Replica] = {}
        self._ever: set[LaunchKey] = set()
        self._due: list[tuple[int, LaunchKey, bool]] = []
        """Heap of (instant, replica that has news then, whether that is its end; one that was put off is skipped)."""
        self._changed: dict[LaunchKey, None] = {}
        self._gone: dict[LaunchKey, None] = {}
        self._vanished = False
        """Whether some of those went without anybody having asked to forget them."""
        self._nodes_changed: dict[NodeName, None] = {}
        self._full = True
        self._takes_ms = takes_ms
        self._coming: dict[str, list[tuple[int, Node]]] = {}
        """Pool -> (instant, node) of those that were asked for."""
        self._made = 0
        self.demands: tuple[Demand, ...] = ()
        """What was asked for last."""
        self.unreachable = False
        self.keeps = False
        """Whether nodes that should go stay."""
        self.withholds = False
        """Whether nodes that are asked for now will never come."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("sim", Addressing.NODE, absence_is_final=True, stacks=True)

    # ---- port ----

    def observe(self, timeout_ms: int = 0) -> Observation:
        self._reach()
        now = self._clock.now_ms()
        for name, coming in self._coming.items():
            for _, node in (come := [entry for entry in coming if entry[0] <= now]):
                self.put_node(node)
            self._coming[name] = [entry for entry in coming if entry not in come]
        due = self._due
        while due and due[0][0] <= now and (at := self._next_due_ms()) is not None and at <= now:
            self._changed[heapq.heappop(due)[1]] = None
        have, nodes = self._replicas, self._nodes
        if self._full:
            self._full = False
            observation = Observation(
                full=True, nodes=tuple(nodes.values()), replicas=tuple([self._report(r, now) for r in have.values()])
            )
        elif not (self._changed or self._gone or self._nodes_changed):
            return NO_NEWS
        else:
            names = self._nodes_changed
            observation = Observation(
                full=False,
                nodes=tuple([nodes[n] for n in names if n in nodes]) if names else (),
                replicas=tuple([self._report(have[key], now) for key in self._changed if key in have]),
                gone=tuple([k for k in self._gone if k not in have]) if self._gone else (),
                gone_nodes=tuple([n for n in names if n not in nodes]) if names else (),
            )
        self._changed.clear()
        self._gone.clear()
        self._vanished = False
        self._nodes_changed.clear()
        return observation

    def start(self, launches: Sequence[Launch]) -> None:
        self._reach()
        now = self._clock.now_ms()
        for launch in launches:
            if launch.key in self._ever or launch.node not in self._nodes:
                if launch.key in self._ever and launch.key not in self._replicas:
                    self._gone[launch.key] = None
                continue
            self._ever.add(launch.key)
            script = self._scripts(launch)
            running = now + script.start_ms
            ends = now if script.failure is not Reason.NONE else min(running + script.run_ms, FOREVER_MS)
            self._replicas[launch.key] = _Replica(launch, script, running, ends, script.exit_code)
            self._changed[launch.key] = None
            if now < running < ends:
                heapq.heappush(self._due, (running, launch.key, False))
            for after_ms in script.reports_ms:
                if now < running + after_ms < ends:
                    heapq.heappush(self._due, (running + after_ms, launch.key, False))
            if now < ends < FOREVER_MS:
                heapq.heappush(self._due, (ends, launch.key, True))

    def stop(self, keys: Sequence[LaunchKey], grace_ms: int) -> None:
        self._reach()
        now = self._clock.now_ms()
        for key in keys:
            replica = self._replicas.get(key)
            if replica is None or replica.ends_at_ms <= now:
                continue
            saves = 0 < replica.script.save_ms <= grace_ms and replica.hung_at_ms > now
            ends = now + (replica.script.save_ms if saves else replica.script.kill_ms)
            if ends < replica.ends_at_ms:
                replica.saved_step = self._step(replica, ends) if saves else -1
                self._end(replica, ends, signal=15)

    def ask_stacks(self, keys: Sequence[LaunchKey]) -> None:
        self._reach()
        now = self._clock.now_ms()
        for key in keys:
            replica = self._replicas.get(key)
            if replica is not None and replica.ends_at_ms > now:
                where = "stuck" if replica.hung_at_ms <= now else "all_reduce"
                replica.stacks = f'Thread 1 (active): "MainThread"\n    {where} (train.py:1)\n'
                self._changed[key] = None

    def forget(self, keys: Sequence[LaunchKey]) -> None:
        self._reach()
        now = self._clock.now_ms()
        for key in keys:
            replica = self._replicas.get(key)
            if replica is not None and replica.ends_at_ms <= now:
                del self._replicas[key]
                self._gone[key] = None  # told with the next news: whoever asked for it does not wait for it

    def logs(self, key: LaunchKey, offset: int = 0, follow: bool = False, timeout_ms: int = 0) -> Iterator[LogChunk]:
        """Simulated replicas say nothing."""
        return iter(())

    def provision(self, demands: Sequence[Demand]) -> None:
        """Nodes come one by one, each after its time; those not wanted any more do not come."""
        self._reach()
        self.demands = tuple(demands)
        now = self._clock.now_ms()
        for demand in demands:
            pool = demand.pool
            for name in demand.release:
                if name in self._nodes and not self.keeps:
                    assert all(r.launch.node != name or r.ends_at_ms <= now for r in self._replicas.values()), name
                    self.lose_node(name)
            have = sum(pool.has(node) for node in self._nodes.values())
            coming = self._coming.setdefault(pool.name, [])
            del coming[max(0, demand.nodes - have):]
            while have + len(coming) < demand.nodes:
                takes_ms = FOREVER_MS if self.withholds else self._takes_ms(pool)
                coming.append((min(now + takes_ms, FOREVER_MS), pool.node(self._made)))
                self._made += 1

    def close(self) -> None:
        """A later observer begins with a full observation again."""
        self._full = True

    # ---- faults ----

    def kill(self, key: LaunchKey, signal: int = 9) -> None:
        """A process dies."""
        self._end(self._replicas[key], self._clock.now_ms(), signal=signal)

    def remove(self, key: LaunchKey) -> None:
        """Somebody removes a replica behind the scheduler's back: its end is never seen."""
        self._remove(key)

    def hang(self, key: LaunchKey) -> None:
        """It lives on but makes no step any more."""
        self._replicas[key].hung_at_ms = self._clock.now_ms()

    def stall(self, key: LaunchKey, for_ms: int) -> None:
        """It makes no progress for so long, and ends that much later."""
        replica = self._replicas[key]
        if replica.ends_at_ms < FOREVER_MS:
            replica.ends_at_ms += for_ms
            heapq.heappush(self._due, (replica.ends_at_ms, key, True))

    def end_at(self, key: LaunchKey, at_ms: int) -> None:
        """It will end by itself then, unless it is gone or made to end."""
        replica = self._replicas.get(key)
        if replica is not None and replica.signal is None and replica.ends_at_ms > self._clock.now_ms():
            replica.ends_at_ms = at_ms
            heapq.heappush(self._due, (at_ms, key, True))

    def tell(self, key: LaunchKey, progress: Progress) -> None:
        """It reports."""
        replica = self._replicas.get(key)
        if replica is not None:
            replica.told = progress
            self._changed[key] = None

    def lose_node(self, name: NodeName) -> None:
        """The node and everything on it is gone."""
        del self._nodes[name]
        self._nodes_changed[name] = None
        for key in [k for k, r in self._replicas.items() if r.launch.node == name]:
            self._remove(key)

    def put_node(self, node: Node) -> None:
        """A node joins, returns or changes."""
        self._nodes[node.name] = node
        self._nodes_changed[node.name] = None

    # ---- inspection ----

    def nodes(self) -> dict[NodeName, Node]:
        """What is there."""
        return dict(self._nodes)

    @property
    def launched(self) -> int:
        """How many replicas were ever started."""
        return len(self._ever)

    def alive(self) -> dict[LaunchKey, Launch]:
        """What runs or is about to, by key."""
        now = self._clock.now_ms()
        return {key: r.launch for key, r in self._replicas.items() if r.ends_at_ms > now}

    def next_event_ms(self) -> int | None:
        """When there will be something to observe; None: never, unless somebody acts."""
        if self._full or self._changed or self._vanished or self._nodes_changed:
            return self._clock.now_ms()
        due = self._next_due_ms()
        if not self._coming:
            return due
        coming = [at for entries in self._coming.values() for at, _ in entries if at < FOREVER_MS]
        return min(coming if due is None else [*coming, due], default=None)

    def ends_now(self) -> bool:
        """Whether a replica comes to its end at this instant."""
        now, places = self._clock.now_ms(), [0]
        for place in places:  # grows: of a heap, only what is due can be followed by something due
            if place < len(self._due) and self._due[place][0] <= now:
                replica = self._replicas.get(self._due[place][1])
                if replica is not None and replica.ends_at_ms <= now:
                    return True
                places += (2 * place + 1, 2 * place + 2)
        return False

    # ---- inside ----

    def _reach(self) -> None:
        if self.unreachable:
            raise BackendUnreachable("the simulated engine does not answer")

    def _next_due_ms(self) -> int | None:
        """When the next replica has news."""
        while self._due:
            at_ms, key, ends = self._due[0]
            replica = self._replicas.get(key)
            if replica is not None and not (ends and replica.ends_at_ms > at_ms):
                return at_ms
            heapq.heappop(self._due)
        return None

    def _end(self, replica: _Replica, at_ms: int, signal: int) -> None:
        replica.ends_at_ms, replica.exit_code, replica.signal = at_ms, None, signal
        if at_ms <= self._clock.now_ms():
            self._changed[replica.launch.key] = None
        else:
            heapq.heappush(self._due, (at_ms, replica.launch.key, True))

    def _remove(self, key: LaunchKey) -> None:
        if self._replicas.pop(key, None) is not None:
            self._gone[key] = None
            self._vanished = True

    @staticmethod
    def _step(replica: _Replica, at_ms: int) -> int:
        if not replica.script.step_ms:
            return -1
        return max(0, min(at_ms, replica.hung_at_ms) - replica.running_at_ms) // replica.script.step_ms

    def _report(self, replica: _Replica, now: int) -> ReplicaReport:
        launch, script = replica.launch, replica.script
        ended, begun = replica.ends_at_ms <= now, replica.running_at_ms <= now
        progress = replica.told
        if script.progress is not None and begun and not ended:
            progress = replica.told = script.progress()
        if script.step_ms and begun:
            until = min(now, replica.ends_at_ms, replica.hung_at_ms)
            age = now - until + (until - replica.running_at_ms) % script.step_ms
            progress = Progress(self._step(replica, until), step_age_ms=age, saved_step=replica.saved_step)
            if not ended:
                heapq.heappush(self._due, (now + max(script.step_ms, REPORT_EVERY_MS), launch.key, False))
        return ReplicaReport(
            key=launch.key,
            node=launch.node,
            state=Seen.EXITED if ended else Seen.RUNNING if begun else Seen.STARTING,
            exit_code=replica.exit_code if ended else None,
            signal=replica.signal if ended else None,
            failure=script.failure if ended else Reason.NONE,
            progress=progress,
            stacks=replica.stacks,
            ident=f"sim-{launch.key}",
            ended_age_ms=now - replica.ends_at_ms if ended else 0,
            idle_age_ms=now - replica.hung_at_ms if replica.hung_at_ms <= now else 0,
        )
